"""Texts follow their format, whatever the model would rather write."""

import json
import re

import pytest

from conftest import MODEL

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,6}$"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


def check(value):
    assert list(value) == ["name", "age", "kind", "tags"]
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert 0 <= value["age"] <= 150 and value["kind"] in ["cat", "dog"]
    assert len(value["tags"]) <= 3 and all(re.fullmatch("[a-z]{1,6}", tag) for tag in value["tags"])


def ask(server, response_format, **fields):
    body = {"prompt": "An animal:", "max_tokens": 200, "response_format": response_format, **fields}
    return server.json("POST", "/v1/completions", body)


@pytest.mark.parametrize("fields", [{"temperature": 0}, *({"seed": seed} for seed in range(6))])
def test_json_follows_its_schema(server, fields):
    status, answer = ask(server, {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}, **fields)
    assert status == 200, answer
    assert answer["choices"][0]["finish_reason"] == "stop"
    check(json.loads(answer["choices"][0]["text"]))


def test_chat_follows_its_schema_in_a_stream_and_beside_others(server):
    import openai

    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "An animal?"}], n=3, seed=5, stream=True, max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}},
    )
    texts = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    for text in texts:
        check(json.loads(text))


def test_json_objects_regexes_and_grammars(server):
    status, answer = ask(server, {"type": "json_object"}, max_tokens=1000, seed=1, temperature=0.5, logit_bias={})
    text = answer["choices"][0]["text"]
    assert status == 200 and text.startswith("{")
    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)
    for seed in range(4):
        _, answer = ask(server, {"type": "regex", "regex": "(yes|no), [0-9]{3}-[a-f]{2}"}, seed=seed)
        assert re.fullmatch("(yes|no), [0-9]{3}-[a-f]{2}", answer["choices"][0]["text"])
    grammar = 'start: term ("+" term)*\nterm: /[0-9]{1,2}/ | "(" start ")"'
    _, answer = ask(server, {"type": "grammar", "grammar": grammar}, seed=2, max_tokens=30)
    assert re.fullmatch(r"[0-9+()]+", answer["choices"][0]["text"])


def test_a_costly_expression_is_obeyed_or_given_up(server):
    """What it costs depends on what the model draws: an `a` and the end cost little."""
    for seed in range(6):
        status, answer = ask(server, {"type": "regex", "regex": "((a{1,1000}){1,1000}){1,1000}"}, seed=seed)
        assert status in (200, 400), answer
        if status == 200:
            assert re.fullmatch("a+", answer["choices"][0]["text"]), answer
    assert server.complete("Once upon a time")


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "https://example.com/x.json"}}},
        {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 100_000]}}},
        {"type": "regex", "regex": "("},
        {"type": "grammar", "grammar": "start: undefined_rule"},
        {"type": "nonsense"},
        {"type": "json_schema"},
    ],
)
def test_formats_that_cannot_be_are_refused(server, response_format):
    status, answer = ask(server, response_format)
    assert status == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_deeply_nested_schemas_end_well(server):
    schema = {"type": "integer"}
    for _ in range(60):
        schema = {"type": "array", "items": schema, "maxItems": 1}
    status, _ = ask(server, {"type": "json_schema", "json_schema": {"schema": schema}}, max_tokens=5)
    assert status in (200, 400)
    recursive = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}}
    status, _ = ask(server, {"type": "json_schema", "json_schema": {"schema": recursive}}, max_tokens=20)
    assert status in (200, 400)
