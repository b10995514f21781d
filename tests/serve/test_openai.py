"""The `openai` package against the real server."""

import array
import json
import math
import subprocess
import time

import openai
import pytest

from conftest import ENDLESS, MODEL, PROGRAM, TRAINED, generate, running

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_completion_is_what_generate_writes(client):
    expected = generate("--greedy", "--max-tokens", "40", PROMPT)
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=40)
    assert answer.choices[0].text == expected["text"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == expected["prompt_tokens"]
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 40


def test_sampling_with_a_seed_is_what_generate_draws(client):
    options = ["--temperature", "0.9", "--top-p", "0.9", "--seed", "7", "--max-tokens", "30"]
    expected = generate(*options, PROMPT)
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0.9, top_p=0.9, seed=7, max_tokens=30
    )
    assert answer.choices[0].text == expected["text"]


def test_streaming(client):
    whole = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=40)
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=40, stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == whole.choices[0].text
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 40
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat(client):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]
    options = dict(model=MODEL, messages=messages, temperature=0, max_tokens=24)
    answer = client.chat.completions.create(**options)
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content
    assert "\nUser:" not in message.content
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == message.content
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]
    client.chat.completions.create(model=MODEL, messages=parts, max_completion_tokens=3)


def test_prompts_of_every_kind_and_n(client):
    ids = [1, 50, 60, 70]
    answer = client.completions.create(
        model=MODEL, prompt=[ids, ids[:2]], n=2, temperature=0, max_tokens=5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] and texts[2] == texts[3]
    one = client.completions.create(model=MODEL, prompt=ids, temperature=0, max_tokens=5)
    assert one.choices[0].text == texts[0]
    drawn = client.completions.create(model=MODEL, prompt=PROMPT, n=3, seed=1, max_tokens=12)
    assert len({choice.text for choice in drawn.choices}) == 3
    several = client.completions.create(model=MODEL, prompt=["A", PROMPT], temperature=0, max_tokens=4)
    alone = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4)
    assert several.choices[1].text == alone.choices[0].text
    # An empty prompt is the begin-of-text token.
    empty = client.completions.create(model=MODEL, prompt="", temperature=0, max_tokens=4)
    assert empty.choices[0].text == generate("--greedy", "--max-tokens", "4", "--prompt", "")["text"]


def test_stop_and_echo(client):
    whole = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=40).choices[0].text
    stop = whole[20:26]
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=40, stop=[stop, "never"], echo=True
    ).choices[0]
    assert answer.text == PROMPT + whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_logprobs_of_a_prompt(client):
    """What lm_eval reads: the prompt's log-probabilities, nothing for its first token."""
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=1, logprobs=1, echo=True
    )
    logprobs = answer.choices[0].logprobs
    count = answer.usage.prompt_tokens + 1
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == count
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    # What was drawn greedily is the likeliest.
    assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())
    assert "".join(logprobs.tokens[1:]) == answer.choices[0].text
    text = answer.choices[0].text
    for token, offset in list(zip(logprobs.tokens, logprobs.text_offset))[1:]:
        assert text[offset:].startswith(token)
    # Without a token of its own, and token by token: the same numbers.
    scored = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].logprobs.token_logprobs == logprobs.token_logprobs[:-1]
    assert scored.choices[0].text == PROMPT
    longer = client.completions.create(model=MODEL, prompt=text, max_tokens=0, logprobs=1, echo=True)
    assert math.isclose(longer.choices[0].logprobs.token_logprobs[-1], logprobs.token_logprobs[-1])


def test_logprobs_are_those_of_the_logits(client, tmp_path):
    """Log-likelihoods as lm_eval takes them: ids in, sums over the last ones, greedy or not."""
    ids = [1, 400, 23, 777, 1200, 5, 6000]
    path = tmp_path / "logits.safetensors"
    command = [PROGRAM, "logits", TRAINED, "--token-ids", ",".join(map(str, ids)), "-o", path]
    subprocess.run(command, check=True, capture_output=True)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])["logits"]["data_offsets"]
    logits = array.array("f", data[8 + length + begin : 8 + length + end])
    size = len(logits) // len(ids)
    rows = [logits[at * size : (at + 1) * size] for at in range(len(ids))]
    answer = client.completions.create(model=MODEL, prompt=ids, temperature=0, max_tokens=1, logprobs=1, echo=True)
    logprobs = answer.choices[0].logprobs
    for at in range(1, len(ids)):
        row = rows[at - 1]
        highest = max(row)
        norm = highest + math.log(sum(math.exp(logit - highest) for logit in row))
        assert math.isclose(logprobs.token_logprobs[at], row[ids[at]] - norm, abs_tol=1e-5)
        is_greedy = logprobs.token_logprobs[at] == max(logprobs.top_logprobs[at].values())
        assert is_greedy == (row[ids[at]] == highest)


def test_logprobs_of_a_chat(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello!"}], temperature=0, max_tokens=6,
        logprobs=True, top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == token.logprob
    assert b"".join(bytes(token.bytes) for token in content).decode().strip() == answer.choices[0].message.content.strip()


def test_biases_and_penalties(client):
    text = lambda **options: client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=30, **options
    ).choices[0].text
    plain = text()
    first = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=1, logprobs=1)
    assert text(frequency_penalty=2.0, presence_penalty=2.0) != plain
    banned = {str(id): -100 for id in range(0, 8192) if id % 8 == 0}
    assert text(logit_bias=banned) is not None
    forced = text(logit_bias={"50": 100}, presence_penalty=0)
    assert len(set(forced.split())) <= 2, forced
    assert first.choices[0].text


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 5}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [999999]}, "prompt"),
        ({"prompt": "x " * 40000}, "prompt"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"session_id": "a/b"}}, "session_id"),
    ],
)
def test_bad_fields_are_named(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"model": MODEL, "prompt": "x", **fields})
    assert error.value.param == param
    assert error.value.type == "invalid_request_error"
    assert error.value.body["message"]


def test_other_errors(client, server):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-4", prompt="x")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}])
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


def test_a_client_that_goes_away_frees_its_place(client, server):
    before = server.metric("cancelled_texts_total")
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=ENDLESS, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    server.wait_until_running()
    stream.close()
    deadline = time.monotonic() + 10
    while server.metric("running_texts") or server.metric("cancelled_texts_total") == before:
        assert time.monotonic() < deadline, "the text goes on without a reader"
        time.sleep(0.05)
    # And one that does not stream: it gives up before the answer.
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=ENDLESS, n=8, extra_body={"ignore_eos": True}
        )
    while server.metric("running_texts"):
        assert time.monotonic() < deadline + 10, "the text goes on without a reader"
        time.sleep(0.05)


def test_keys():
    with running(env={"MMFREE_API_KEY": "secret-key"}) as server:
        good = openai.OpenAI(base_url=server.url + "/v1", api_key="secret-key", max_retries=0)
        assert good.completions.create(model=MODEL, prompt="x", max_tokens=1).choices
        for key in ["secret-kez", "secret-ke", "secret-key1", "x"]:
            bad = openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)
            with pytest.raises(openai.AuthenticationError) as error:
                bad.models.list()
            assert error.value.code == "invalid_api_key"
        for headers in [{}, {"Authorization": "secret-key"}, {"Authorization": "Basic secret-key"}, {"Authorization": "Bearer "}]:
            for method, path in [("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/v1/sessions/x/state"),
                                 ("PUT", "/v1/sessions/x/state"), ("DELETE", "/v1/sessions/x")]:
                status, answer_headers, body = server.call(method, path, b"{}" if method != "GET" else None, headers=headers)
                assert status == 401, (method, path)
                assert answer_headers["WWW-Authenticate"] == "Bearer"
                assert json.loads(body)["error"]["code"] == "invalid_api_key"
        assert server.call("GET", "/health")[0] == 200


def test_too_many_at_once_are_refused_with_a_time_to_retry():
    with running("--max-concurrent-per-client", "2") as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        streams = [
            client.completions.create(model=MODEL, prompt="x", max_tokens=ENDLESS, stream=True, extra_body={"ignore_eos": True})
            for _ in range(2)
        ]
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(model=MODEL, prompt="x", max_tokens=1)
        assert int(error.value.response.headers["Retry-After"]) >= 1
        for stream in streams:
            stream.close()
