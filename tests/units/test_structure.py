"""JSON that fits a schema: drafts, references, numbers, deep values, fences and thoughts, labels."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from common import asked

from sdpo_plugin.environments import structure

DRAFT = {
    3: "http://json-schema.org/draft-03/schema#", 4: "http://json-schema.org/draft-04/schema#",
    7: "http://json-schema.org/draft-07/schema#", 2019: "https://json-schema.org/draft/2019-09/schema",
    2020: "https://json-schema.org/draft/2020-12/schema",
}  # fmt: skip
TUPLE = {"items": [{"type": "integer"}, {"type": "string"}], "additionalItems": False}
STRICT = {"minimum": 0, "exclusiveMinimum": True, "maximum": 9, "exclusiveMaximum": True}
NEEDS = {"dependencies": {"card": ["address"], "a": {"required": ["b"]}}}


@pytest.mark.parametrize(
    "schema, right, wrong",
    [
        *((TUPLE | draft, ["[1]", '[1, "a"]'], ['["a", 1]', '[1, "a", 2]'])
          for draft in ({}, {"$schema": DRAFT[7]}, {"$schema": DRAFT[4]}, {"$schema": DRAFT[2019]})),
        *((STRICT | draft, ["1", "0.1"], ["0", "9", "-1"]) for draft in ({}, {"$schema": DRAFT[4]})),
        *((NEEDS | draft, ['{"card": 1, "address": 1}', '{"a": 1, "b": 1}', "{}"], ['{"card": 1}', '{"a": 1}'])
          for draft in ({}, {"$schema": DRAFT[7]}, {"$schema": DRAFT[4]})),
        (STRICT | {"items": [{"const": 1}]}, ["[1]", "5"], ["[2]", "0"]),  # no draft has both
        ({"prefixItems": [{"const": 1}], "items": False}, ["[1]"], ["[2]", "[1, 1]"]),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 2}, ["1"], ["0", "2"]),
        ({"$schema": DRAFT[2020], "dependentRequired": {"a": ["b"]}, **NEEDS}, ['{"card": 1}'], ['{"a": 1}']),
        ({"$schema": DRAFT[3], "properties": {"a": {"required": True, "divisibleBy": 0.01}}}, ['{"a": 19.99}'], ["{}"]),
        ({"$schema": DRAFT[7], "properties": {"a": {"$ref": "#"}}, "multipleOf": 0.01},
         ['{"a": {"a": 19.99}}'], ['{"a": {"a": 19.999}}']),
    ],
)  # fmt: skip
def test_a_schema_means_what_its_draft_says(schema, right, wrong):
    structure.check_label(json.dumps(schema))
    for response in right:
        assert asked(structure, response, json.dumps(schema)) == (1.0, None), response
    for response in wrong:
        reward, told = asked(structure, response, json.dumps(schema))
        assert reward == 0.0 and told.startswith("The JSON does not fit its schema.\nAt $"), response


@pytest.mark.parametrize(
    "schema, response, reward",
    [
        ({"multipleOf": 0.01}, "19.99", 1.0), ({"multipleOf": 0.01}, "19.999", 0.0), ({"multipleOf": 0.1}, "1e9", 1.0),
        ({"multipleOf": 1e-300}, "1e308", 1.0), ({"multipleOf": 2.5}, "5", 1.0), ({"multipleOf": 2}, "3", 0.0),
        ({"multipleOf": 0.01}, "NaN", 0.0), ({"multipleOf": 0.01}, "1e999", 0.0), ({"multipleOf": 0.01}, "-1e999", 0.0),
        ({"multipleOf": 0.5}, "9" * 4000, 1.0), ({"multipleOf": 0.5}, "9" * 5000, 0.0), ({"multipleOf": 2}, "{}", 1.0),
        ({}, "NaN", 0.0), ({}, "[Infinity]", 0.0), ({}, '{"a": -Infinity}', 0.0), ({"type": "integer"}, "1.0", 1.0),
        ({"uniqueItems": True}, "[1, 1.0]", 0.0), ({"uniqueItems": True}, "[1, true, 0, false, null]", 1.0),
        ({"uniqueItems": True}, '[{"a": 1, "b": [2]}, {"b": [2.0], "a": 1}]', 0.0),
        ({"uniqueItems": True}, '[{"a": 1}, {"a": "1"}, [1], ["1"]]', 1.0), ({"uniqueItems": False}, "[1, 1]", 1.0),
    ],
)  # fmt: skip
def test_numbers_and_unique_items(schema, response, reward):
    assert asked(structure, response, json.dumps(schema))[0] == reward


def test_what_is_reported_of_numbers():
    assert asked(structure, "1e999", "{}")[1] == "The response is not JSON. The number 1e999 is too large."
    assert asked(structure, "NaN", "{}")[1] == "The response is not JSON. NaN is not JSON."
    told = asked(structure, "19.999", '{"multipleOf": 0.01}')[1]
    assert told == "The JSON does not fit its schema.\nAt $: 19.999 is not a multiple of 0.01"


def test_deep_values_get_no_reward():
    lists = json.dumps({"type": "array", "items": {"$ref": "#"}})
    assert asked(structure, "[" * 50 + "]" * 50, lists) == (1.0, None)
    for response in ("[" * 900 + "]" * 900, '{"a":' * 900 + "[]" + "}" * 900):
        reward, told = asked(structure, response, lists)
        assert reward == 0.0 and told.startswith("The JSON ")
    for response in ("[" * 5000 + "]" * 5000, "[" * 100_000, '{"a":' * 5000, '<think>[</think>```\n' + "[" * 9000):
        told = "The response is not JSON. It is nested too deeply."
        assert asked(structure, response, lists) == (0.0, told)
    deep = "[" * 800 + "]" * 800
    assert asked(structure, deep, json.dumps({"schema": {}, "value": []}))[0] == 0.0


@pytest.mark.parametrize(
    "schema", [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#"}}}]
)
def test_a_schema_that_leads_to_itself(schema):
    with pytest.raises(ValueError, match=r"no \$ref may lead to itself"):
        structure.check_label(json.dumps(schema))
    reward, told = asked(structure, "1", json.dumps(schema))
    assert reward == 0.0 and "leads to itself" in told


def test_nothing_is_fetched(tmp_path):
    asked_for = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked_for.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"const": "a secret"}')

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    secret = tmp_path / "secret.json"
    secret.write_text('{"const": "a secret"}')
    address = f"http://127.0.0.1:{server.server_port}/schema.json"
    for ref in (address, f"{address}#/a", secret.as_uri(), str(secret), "secret.json", "#/nowhere", "#none", "http://["):
        leads = {"$ref": ref}
        for schema in (leads, {"properties": {"a": leads}}, {"$id": f"{address}/", "anyOf": [leads]},
                       {"$schema": DRAFT[7], "items": [leads], "properties": {"a": leads}}):  # fmt: skip
            with pytest.raises(ValueError, match=r"\$ref .* leads to nothing in the schema, and nothing is fetched"):
                structure.check_label(json.dumps(schema))
            for response in ('{"a": "a secret"}', '"a secret"', '["a secret"]'):
                reward, told = asked(structure, response, json.dumps(schema))
                assert reward in (0.0, 1.0) and "const" not in (told or "") and "was expected" not in (told or "")
        assert asked(structure, '"a secret"', json.dumps({"$ref": ref}))[0] == 0.0
    server.shutdown()
    assert not asked_for
    metaschema = json.dumps({"$ref": DRAFT[2020]})  # which jsonschema brings
    structure.check_label(metaschema)
    assert asked(structure, '{"type": "object"}', metaschema)[0] == 1.0
    assert asked(structure, '{"type": "objekt"}', metaschema)[0] == 0.0


FITS = json.dumps({"type": "object", "required": ["city"]})


@pytest.mark.parametrize(
    "response",
    [
        '<think>\nThey want JSON: {}.\n</think>\n\n{"city": "Oslo"}', 'They want JSON.\n</think>\n{"city": "Oslo"}',
        '<think>\n```json\n{}\n```\n</think>\n\n```json\n{"city": "Oslo"}\n```', '[THINK]{}[/THINK]{"city": "Oslo"}',
        '<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{"city": "Oslo"}',
        '<think>a <think> b </think> c </think>{"city": "Oslo"}', '{"city": "<think>Oslo"}', '{"city": "</think>"}',
        '```json\n{"city": "run ```x``` now"}\n```', '```json {"city": "a"}```', '```json {"city":\n"Oslo"}\n```',
        '```json\n{"city": "a"}\n```\nas in\n```python\nload()\n```',
        '1. Here:\n   ```json\n   {"city":\n    "Oslo"}\n   ```', '```json\r\n{"city": "Oslo"}\r\n```\r\n',
        '```json title="a.json"\n{"city": "Oslo"}\n```', '```{.json title="a"}\n{"city": "Oslo"}\n```',
        '~~~\n{"city": "Oslo"}\n~~~', '````json\n{"city": "```"}\n````', '```json\n{"city": "Oslo"}',
        '```\n{"city": "Oslo"}```', 'Use ```{}```:\n```\n{"city": "a\u2028b"}\n```', ' \n{"city": "Oslo"}\n ',
    ],
)  # fmt: skip
def test_where_the_json_of_a_response_is(response):
    assert asked(structure, response, FITS) == (1.0, None)


@pytest.mark.parametrize(
    "response",
    [
        '<think>\n{"city": "Oslo"}', '<think>{"city": "Oslo"}</think>', '{"city": "Oslo"}\n</think>\n{}', "", "```",
        "``````", 'Sure: {"city": "Oslo"}', '{"city": "Oslo"} {"city": "Oslo"}',
        '```json\n{"city": "Oslo"}\n```\n```json\n{}\n```',
    ],
)  # fmt: skip
def test_what_is_no_answer(response):
    assert asked(structure, response, FITS)[0] == 0.0


def test_surrogates_can_be_written():
    reward, told = asked(structure, '{"\\ud800": 1}', json.dumps({"additionalProperties": {"type": "string"}}))
    assert (reward, told) == (0.0, "The JSON does not fit its schema.\nAt $.\\ud800: 1 is not of type 'string'")
    label = json.dumps({"schema": {}, "value": {"\ud800": 1}})
    assert asked(structure, '{"\\ud800": 1}', label) == (1.0, None)
    told = asked(structure, "{}", label, detail="expected")[1]
    assert told.encode().endswith(b"At $.\\ud800. Expected 1, got nothing.")


@pytest.mark.parametrize(
    "label, told",
    [
        ({"type": "object"}, "a label must be text, a JSON schema, not a dict: use json.dumps"), (3, "not a int"),
        ("{'type': 'object'}", "a label must be a JSON schema, not"), ("5", "5 is not of type 'object', 'boolean'"),
        ('{"type": "strnig"}', "(at $.type)"), ('{"properties": {"a": {"minimum": "3"}}}', "(at $.properties.a.min"),
        ('{"pattern": "("}', "'(' is not a 'regex'"), ('{"$schema": "http://x"}', "'http://x' is not a known draft"),
        ('{"$schema": ["a"]}', "not a known draft"), ('{"const": 1e999}', "too large"),
        ('{"const": NaN}', "NaN is not JSON"),
        (json.dumps({"$schema": DRAFT[2020], "exclusiveMinimum": True}), "True is not of type 'number'"),
        (json.dumps({"$schema": DRAFT[2020], "items": [{}]}), "is not of type 'object', 'boolean'"),
        ("false", "no JSON fits the schema false"), ("[" * 5000, "a label must be a JSON schema"),
        ('{"schema": {"type": "string"}, "value": 5}', "no JSON can be right: The JSON does not fit its schema.\nAt $"),
        ('{"schema": {"type": "strnig"}, "value": 5}', "(at $.type)"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_met(label, told):
    with pytest.raises(ValueError) as raised:
        structure.check_label(label)
    assert told in str(raised.value)


def test_labels_that_can_be_met():
    for label in (True, {}, {"type": "object"}, {"schema": {"type": "integer"}, "value": 5.0}, {"schema": 1},
                  {"schema": {}, "value": None}, {"definitions": {"a": {}}, "$ref": "#/definitions/a"},
                  {"$defs": {"a": {"$anchor": "here"}}, "$ref": "#here"}, {"const": {"$ref": "#/x"}}):  # fmt: skip
        structure.check_label(json.dumps(label))
