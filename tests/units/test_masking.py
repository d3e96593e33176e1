"""What is shown of arguments: secrets by name and by shape are masked, everything else is as it was."""

import string
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo_plugin.monitoring.masking import MASK, is_secret, masked

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "name",
    ["logger.wandb.key", "logger.swanlab.key", "key", "HF_TOKEN", "WANDB_API_KEY", "judge.apiKey", "judge.apikey",
     "db.password", "dbPassword", "AWS_SECRET_ACCESS_KEY", "client_secret", "judge.access-token", "api_keys",
     "api_key_2", "openai_key", "credentials", "Authorization", "DB_PASS", "token"],
)  # fmt: skip
def test_a_secret_is_known_by_its_name(name):
    assert is_secret(name) and masked({name: "x"}) == {name: MASK} and masked(["x", "y"], name) == [MASK, MASK]
    assert masked({name: None}) == {name: None} and masked({name: ""}) == {name: ""}


@pytest.mark.parametrize(
    "name",
    ["data.input_key", "data.label_key", "data.image_key", "reprompt.privileged_key", "ckpt.best_metric_key", "monkey",
     "rollout.max_new_tokens", "distill.skip_tokens", "pad_token", "actor.adam.lr", "logger.wandb.org", "keyboard",
     "reprompt.thinking_tags", "", "."],
)  # fmt: skip
def test_what_is_no_secret_stays(name):
    for value in ("label", 7, 0.5, True, None, ["a", 1], ("b",)):
        found = masked({name: value})
        assert found == {name: value} and type(found[name]) is type(value)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("https://me:sesame@h.org:8080/x", "https://me:***@h.org:8080/x"),
        ("postgresql+psycopg2://me:se/sa?m#e@h/db", "postgresql+psycopg2://me:***@h/db"),
        ("mysql://me:se@same@h/db", "mysql://me:***@h/db"),
        ("redis://:sesame@h:6379/0", "redis://:***@h:6379/0"),
        ("http://me:12345@h/x, ftp://me:sesame@h", "http://me:***@h/x, ftp://me:***@h"),
        (f"https://{KEY}@github.com/x.git", "https://***@github.com/x.git"),
        ("http://h:8080/users/me@h.org", "http://h:8080/users/me@h.org"),
        ("sqlite:////tmp/a:b@c.db", "sqlite:////tmp/a:b@c.db"),
        ("git@github.com:org/repo, ssh://git@host/x", "git@github.com:org/repo, ssh://git@host/x"),
        ("https://h/judge?model=x&api_key=sesame&n=2", "https://h/judge?model=x&api_key=***&n=2"),
        ("https://h/x?X-Amz-Signature=sesame#a", "https://h/x?X-Amz-Signature=***#a"),
        ("https://h/x?sig=sesame", "https://h/x?sig=***"),
        ("https://h/x?sort_key=name", "https://h/x?sort_key=name"),
        ("namespace(key='sesame', org=None)", "namespace(key='***', org=None)"),
        ('{"api_key": "sesame", "n": 1}', '{"api_key": "***", "n": 1}'),
        ("{'key': 'sesame'}", "{'key': '***'}"),
        ("train --logger.wandb.key sesame --algo sdpo", "train --logger.wandb.key *** --algo sdpo"),
        ("--logger.swanlab.key=sesame", "--logger.swanlab.key=***"),
        ("WANDB_API_KEY=sesame python", "WANDB_API_KEY=*** python"),
        ("Server=h;Password=sesame;n=1", "Server=h;Password=***;n=1"),
        ("Authorization: Bearer sesame.sesame", "Authorization: ***"),
        ("a header, Bearer sesame.sesame.sesame", "a header, Bearer ***"),
        ("api key hf_abcdefghijklmnopqrstuvwx is not valid", "api key *** is not valid"),
        ("sk-proj-abcdefghijklmnop1234, ghp_abcdefghijklmnop1234", "***, ***"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.sig-nature", "***"),
        ("basic instructions, bearer of news", "basic instructions, bearer of news"),
        ("KeyError: 'prompt'", "KeyError: 'prompt'"),
        ("--data.input_key prompt --data.label_key=label", "--data.input_key prompt --data.label_key=label"),
        ("recipe: unknown key actor.lr", "recipe: unknown key actor.lr"),
        ("    token = tokens[i]\n    key: str = 'x'", "    token = tokens[i]\n    key: str = 'x'"),
        ("the key is to mask tokens: 12 of 40", "the key is to mask tokens: 12 of 40"),
        (f"snapshots/{KEY}/config.json", f"snapshots/{KEY}/config.json"),
        ("File \"a.py\", line 3, in <module>", "File \"a.py\", line 3, in <module>"),
    ],
)  # fmt: skip
def test_a_secret_is_known_by_its_shape(text, shown):
    assert masked(text) == shown == masked(shown)
    assert masked({"found": [text]}) == {"found": [shown]}


def test_nested_arguments_stay_nested():
    args = SimpleNamespace(logger=SimpleNamespace(wandb=SimpleNamespace(key="sesame", org="me")), urls=["http://a:b@c"])
    shown = SimpleNamespace(logger=SimpleNamespace(wandb=SimpleNamespace(key=MASK, org="me")), urls=["http://a:***@c"])
    assert masked(args) == shown and args.logger.wandb.key == "sesame"


@given(st.text(string.ascii_letters + string.digits + "/?#:=&;,.()[]{}%$é", min_size=3), st.text("ab: ?'\n"))
@settings(max_examples=50, deadline=None)
def test_no_password_of_a_uri_is_left(password, around):
    shown = masked(f"{around} mysql+pymysql://me:#{password}#@host/x {around}")
    assert f"#{password}#" not in shown and "mysql+pymysql://me:***@host/x" in shown


@pytest.mark.parametrize(
    "piece", ["a", "://a:", "key=", "key='", "--x.key ", "?key=", "a:b@", "//", "eyJ.", "token\n: "]
)
def test_a_long_text_takes_linear_time(piece):
    def seconds(times):
        text, began = piece * times, time.process_time()
        masked(text)
        return time.process_time() - began

    seconds(1000)
    assert seconds(40_000) < 8 * max(seconds(10_000), 0.01)
