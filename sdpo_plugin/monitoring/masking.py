"""`masked`: what is written or printed of a run's arguments, without keys, tokens and passwords.

By name where there is one (`logger.wandb.key`, `HF_TOKEN`), by shape everywhere: URIs with a password, the tokens of
well-known services, and names with a value in running text, as in a traceback. A column's name (`data.input_key`) or a
number of tokens is not a secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

MASK = "***"
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
SECRETS = {
    "accesskey", "accesstoken", "apikey", "apitoken", "auth", "authorization", "authtoken", "bearer", "credential",
    "jwt", "key", "pass", "passphrase", "passwd", "password", "pwd", "secret", "secretkey", "token",
}  # fmt: skip
# What stands before `key` or `token` in the names of columns and of a tokenizer's tokens.
OPEN = {
    "answer", "audio", "bos", "cache", "chosen", "cls", "column", "context", "end", "eos", "group", "image", "images",
    "input", "label", "mask", "messages", "metric", "new", "output", "pad", "primary", "privileged", "prompt", "public",
    "rejected", "response", "reward", "sep", "sort", "special", "start", "stop", "think", "tool", "tools", "unk",
    "video",
}  # fmt: skip

NAMED = re.compile(
    r"""(?<![\w.-])
    (?P<name>-{0,2}[\w.-]*(?:key|token|passphrase|passwd|password|pwd|secret|credential|authorization)s?)
    (?P<sep>(?P<quote>["']?)\s{0,3}[=:]\s{0,3}|(?<=\w)[ ]{1,3})
    (?P<value>"[^"\n]*"|'[^'\n]*'|(?:(?:bearer|basic|token)[ ])?[^\s,;&"'(){}\[\]<>]+)""",
    re.IGNORECASE | re.VERBOSE,
)
# A password with / ? or # in it is not a proper URI, but libraries read it; a number before these is a port.
URI = re.compile(
    r"""(?<=//)(?P<user>[^\s/?\#:@"'<>]*:)(?:[^\s/?\#"'<>]{1,2048}@|(?!\d{1,5}[/?\#])[^\s@"'<>]{1,256}@)""", re.VERBOSE
)
QUERY = re.compile(r"(?P<name>[?&;](?:key|token|sig|auth|code|[\w.-]*signature)=)[^&#\s\"'<>;]+", re.IGNORECASE)
TOKEN = re.compile(
    r"""(?<![\w-])(?:
    sk-[\w-]{16,} | hf_\w{16,} | gh[opsur]_\w{16,} | github_pat_\w{16,} | glpat-[\w-]{16,} | xox[a-z]-[\w-]{10,} |
    (?:AKIA|ASIA)[A-Z0-9]{16} | AIza[\w-]{30,} | ya29\.[\w-]{16,} | eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]* | gsk_\w{16,} |
    nvapi-[\w-]{16,} | wandb_v\d_\w{16,} | local-[0-9a-f]{40} | dapi[0-9a-f]{32} | r8_\w{16,} | pypi-[\w-]{16,}
    )""",
    re.VERBOSE,
)
USER = re.compile(r"(?<=//)\w{16,}(?=@)")  # a token in the place of a user's name
BEARER = re.compile(r"(?<![\w-])(bearer) +[\w.~+/=-]{16,}", re.IGNORECASE)


def masked(value: Any, name: str = "") -> Any:
    """A value as it may be shown: what is secret in it is `***`, everything else is as it was.

    Args:
        value: text, or what is made of texts: mappings (whose keys are names), OpenRLHF's nested arguments, lists,
            tuples. Anything else stays.
        name: what the value is called, with dots or without.
    """
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**masked(vars(value)))
    if isinstance(value, Mapping):
        return {key: masked(part, str(key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([masked(part, name) for part in value])
    if not isinstance(value, str):
        return value
    return MASK if value and is_secret(name) else _masked_text(value)


def is_secret(name: str) -> bool:
    """Whether what has this name is a secret: `logger.wandb.key`, `OPENAI_API_KEY`, `dbPassword`."""
    words = [word.lower() for word in WORD.findall(name.rpartition(".")[2])]
    last = words[-1] if words else ""
    if last not in SECRETS and (last == "tokens" or last.removesuffix("s") not in SECRETS):
        return False
    return len(words) == 1 or words[-2] not in OPEN


def _masked_text(text: str) -> str:
    text = URI.sub(rf"\g<user>{MASK}@", text)
    text = USER.sub(MASK, text)
    text = QUERY.sub(rf"\g<name>{MASK}", text)
    text = BEARER.sub(rf"\1 {MASK}", text)
    text = TOKEN.sub(MASK, text)
    return NAMED.sub(_masked_pair, text)


def _masked_pair(found: re.Match[str]) -> str:
    name, sep, value = found["name"], found["sep"], found["value"]
    flag, quoted = name.startswith("--"), value[0] in "\"'"
    # In prose and in code, `key: x` and `token = x` are not secrets.
    plain = name.lower() in ("key", "token", "keys", "tokens") and not (quoted and (sep == "=" or found["quote"]))
    if not is_secret(name) or (sep.isspace() and not flag) or plain:
        return found[0]
    return f"{name}{sep}{value[0]}{MASK}{value[0]}" if quoted else f"{name}{sep}{MASK}"
