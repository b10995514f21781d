"""Sessions: they go on, move, survive, and keep foreigners out."""

import json
import subprocess
import threading
import time

import pytest

from conftest import ENDLESS, PROGRAM, ROOT, generate, running

STATE = "application/octet-stream"
# Tokens of a text that takes a second or more.
LONG = 12_000
FIRST, SECOND = "Once upon a time there was a king.", " He had a daughter"


def turn(server, name, prompt, **fields):
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 12, "session_id": name, **fields}
    return server.json("POST", "/v1/completions", body)


def texts(server, name):
    """Two turns of a session."""
    answers = []
    for prompt in [FIRST, SECOND]:
        status, answer = turn(server, name, prompt)
        assert status == 200, answer
        answers.append(answer["choices"][0]["text"])
    return answers


def test_a_session_goes_on_as_one_text_would(server, tmp_path):
    first, second = texts(server, "goes-on")
    # The same with the command line: the state is the same one.
    state = str(tmp_path / "state")
    expected = generate("--greedy", "--max-tokens", "12", "--save-state", state, "--prompt", FIRST)
    assert first == expected["text"]
    expected = generate("--greedy", "--max-tokens", "12", "--load-state", state, "--prompt", SECOND)
    assert second == expected["text"]
    # Nothing to add: it goes on where it stopped.
    more = turn(server, "goes-on", "", max_tokens=5)[1]["choices"][0]["text"]
    assert len(more) > 0
    status, info = server.json("GET", "/v1/sessions/goes-on")
    assert status == 200 and info["tokens_seen"] > 30 and info["state_bytes"] == 8 * 384 * 4
    assert server.json("DELETE", "/v1/sessions/goes-on")[0] == 200
    assert server.json("GET", "/v1/sessions/goes-on")[0] == 404
    assert server.json("DELETE", "/v1/sessions/goes-on")[0] == 404


def test_going_on_without_a_prompt_is_one_text(server):
    whole = server.complete(FIRST, max_tokens=20)
    parts = [turn(server, "parts", prompt, max_tokens=n)[1]["choices"][0]["text"] for prompt, n in [(FIRST, 7), ("", 1), ("", 12)]]
    assert "".join(parts) == whole


def test_a_chat_goes_on_with_the_new_message_only(server):
    ask = lambda messages: server.json(
        "POST", "/v1/chat/completions",
        {"messages": messages, "temperature": 0, "max_tokens": 16, "session_id": "chat"},
    )
    say = lambda text: {"role": "user", "content": text}
    status, answer = ask([{"role": "system", "content": "Be kind."}, say("Hello!")])
    assert status == 200 and answer["session"]["id"] == "chat"
    seen = answer["session"]["tokens_seen"]
    status, answer = ask([say("How are you?")])
    assert status == 200
    assert answer["usage"]["prompt_tokens"] < 30
    assert answer["session"]["tokens_seen"] > seen
    status, answer = ask([say("Hello!"), {"role": "assistant", "content": "x"}, say("y")])
    assert status == 400 and "new message only" in answer["error"]["message"]
    status, answer = ask([{"role": "system", "content": "x"}])
    assert status == 400


def test_states_move_to_another_server_and_to_the_command_line(server, tmp_path):
    with running() as other:
        turn(server, "moves", FIRST)
        status, headers, state = server.call("GET", "/v1/sessions/moves/state")
        assert status == 200 and headers["Content-Type"] == STATE
        status, info = other.json("PUT", "/v1/sessions/moved/state", state, content_type=STATE)
        assert status == 200, info
        here = turn(server, "moves", SECOND)[1]["choices"][0]["text"]
        assert turn(other, "moved", SECOND)[1]["choices"][0]["text"] == here
        path = tmp_path / "state"
        path.write_bytes(state)
        expected = generate("--greedy", "--max-tokens", "12", "--load-state", str(path), "--prompt", SECOND)
        assert here == expected["text"]
        # And a state of the command line's.
        generate("--greedy", "--max-tokens", "12", "--save-state", str(path), "--prompt", FIRST)
        other.json("PUT", "/v1/sessions/cli/state", path.read_bytes(), content_type=STATE)
        assert turn(other, "cli", SECOND)[1]["choices"][0]["text"] == here


def test_foreign_and_damaged_states_are_refused(server, tmp_path):
    turn(server, "good", FIRST)
    state = server.call("GET", "/v1/sessions/good/state")[2]
    put = lambda data, **options: server.json("PUT", "/v1/sessions/bad/state", data, **{"content_type": STATE, **options})
    for at in [0, 8, 12, 20, 28, 36, 1000, len(state) - 1]:
        damaged = bytearray(state)
        damaged[at] ^= 1
        status, answer = put(bytes(damaged))
        assert status == 400 and "state" in answer["error"]["message"], at
    for data in [b"", b"MMFSTATE", state[:-1], state + b"x", b"\0" * len(state)]:
        assert put(data)[0] == 400
    assert put(b"x" * 10**6)[0] == 413
    assert put(state, content_type="application/json")[0] == 415
    assert server.json("GET", "/v1/sessions/bad")[0] == 404
    # Of another model.
    subprocess.run([PROGRAM, "generate", str(ROOT / "tests/fixtures/tiny"), "--token-ids", "1,2", "--print-ids", "--max-tokens", "1",
                    "--save-state", tmp_path / "tiny"], check=True, capture_output=True)
    status, answer = put((tmp_path / "tiny").read_bytes())
    assert status == 400 and "layers" in answer["error"]["message"]


def test_names_are_checked(server):
    for name in ["a" * 129, "..%2f..%2fetc", "a%20b", "%00", "%ff", "a%0d%0aSET", "*"]:
        assert server.json("GET", f"/v1/sessions/{name}")[0] == 400, name


def test_a_session_has_one_turn_at_a_time(server):
    body = {"prompt": "x", "max_tokens": LONG, "session_id": "busy", "ignore_eos": True, "temperature": 0}
    thread = threading.Thread(target=lambda: server.json("POST", "/v1/completions", body))
    thread.start()
    server.wait_until_running()
    status, answer = turn(server, "busy", "y")
    assert status == 409 and answer["error"]["code"] == "session_conflict"
    thread.join()
    assert turn(server, "busy", "y")[0] == 200


def test_keys_do_not_share_sessions(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# two\nfirst-key\nsecond-key\n")
    with running("--api-key-file", str(keys)) as server:
        first, second = ({"Authorization": f"Bearer {key}"} for key in ["first-key", "second-key"])
        assert server.json("POST", "/v1/completions", {"prompt": "x", "session_id": "s"}, headers=first)[0] == 200
        assert server.json("GET", "/v1/sessions/s", headers=first)[0] == 200
        assert server.json("GET", "/v1/sessions/s", headers=second)[0] == 404
        assert server.call("GET", "/v1/sessions/s/state", headers=second)[0] == 404
        assert server.json("DELETE", "/v1/sessions/s", headers=second)[0] == 404


def test_any_replica_goes_on_from_the_shared_store(redis):
    with running("--store", redis.url) as one, running("--store", redis.url) as two, running() as alone:
        expected = texts(alone, "s")
        first = turn(one, "s", FIRST)[1]["choices"][0]["text"]
        second = turn(two, "s", SECOND)[1]["choices"][0]["text"]
        assert [first, second] == expected
        # Both again, in turns, as a load balancer would have it.
        for server in [one, two, one]:
            assert turn(server, "s", " and")[0] == 200
        assert json.loads(one.call("GET", "/health")[2])["store"] == "up"


def test_after_a_kill_in_mid_stream_the_session_goes_on_with_the_same_token(redis):
    with running("--store", redis.url) as server, running() as alone:
        expected = texts(alone, "s")[1]
        assert turn(server, "s", FIRST)[0] == 200
        body = json.dumps({"prompt": SECOND, "temperature": 0, "max_tokens": ENDLESS, "stream": True, "session_id": "s", "ignore_eos": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        import socket

        with socket.create_connection(("127.0.0.1", int(server.port))) as stream:
            stream.sendall((head + body).encode())
            received = b""
            while received.count(b"data: ") < 5:
                received += stream.recv(4096)
            server.kill()
        server.restart()
        status, answer = turn(server, "s", SECOND)
        assert status == 200
        assert answer["choices"][0]["text"] == expected
        first = json.loads(received.split(b"data: ")[1].split(b"\n\n")[0])["choices"][0]["text"]
        assert expected.startswith(first)


def test_a_store_that_goes_and_comes_back(redis):
    with running("--store", redis.url) as server:
        assert turn(server, "s", FIRST)[0] == 200
        redis.stop()
        status, answer = turn(server, "s", SECOND)
        assert status == 503 and answer["error"]["code"] == "store_unavailable", answer
        # Others are not concerned, and the server says what is wrong.
        assert server.complete(FIRST)
        status, health = server.json("GET", "/health")
        assert (status, health["store"]) == (200, "down")
        redis.start()
        deadline = time.monotonic() + 20
        while turn(server, "s", SECOND)[0] != 200:
            assert time.monotonic() < deadline, "the store is up and not used"
            time.sleep(0.2)
        with running() as alone:
            assert turn(server, "s", "")[1]["choices"][0]["text"]
            texts(alone, "s")
            assert turn(alone, "s", "")[0] == 200


def test_a_store_that_fails_at_the_end_of_a_turn_saves_nothing_and_says_so(redis):
    with running("--store", redis.url) as server, running() as alone:
        expected = texts(alone, "s")[1]
        assert turn(server, "s", FIRST)[0] == 200
        body = {"prompt": SECOND, "temperature": 0, "max_tokens": LONG, "session_id": "s", "ignore_eos": True}
        answers = []
        thread = threading.Thread(target=lambda: answers.append(server.json("POST", "/v1/completions", body)))
        thread.start()
        server.wait_until_running()
        redis.stop()
        thread.join()
        assert answers[0][0] == 503, answers
        redis.start()
        deadline = time.monotonic() + 20
        while (answer := turn(server, "s", SECOND))[0] != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert answer[1]["choices"][0]["text"] == expected


def test_two_replicas_at_once_do_not_overwrite_each_other(redis):
    with running("--store", redis.url) as one, running("--store", redis.url) as two:
        assert turn(one, "s", FIRST)[0] == 200
        answers = []
        body = {"prompt": " x", "temperature": 0, "max_tokens": LONG, "session_id": "s", "ignore_eos": True}
        thread = threading.Thread(target=lambda: answers.append(one.json("POST", "/v1/completions", body)))
        thread.start()
        one.wait_until_running()
        assert turn(two, "s", SECOND)[0] == 200
        thread.join()
        assert answers[0][0] == 409, answers


def test_a_damaged_session_in_the_store_is_refused(redis):
    import redis as client

    with running("--store", redis.url) as server:
        assert turn(server, "s", FIRST)[0] == 200
        store = client.Redis(port=redis.port)
        (key,) = store.keys("mmfree:session:*")
        session = bytearray(store.hget(key, "session"))
        session[100] ^= 1
        store.hset(key, "session", bytes(session))
        status, answer = turn(server, "s", SECOND)
        assert status == 409 and "damaged" in answer["error"]["message"]
        assert server.json("DELETE", "/v1/sessions/s")[0] == 200
        assert turn(server, "s", FIRST)[0] == 200


def test_a_signal_lets_texts_finish_and_saves_those_that_cannot(redis):
    with running("--store", redis.url, "--shutdown-timeout-seconds", "2") as server:
        short, long = [], []
        body = lambda name, n: {"prompt": FIRST, "temperature": 0, "max_tokens": n, "session_id": name, "ignore_eos": True}
        jobs = [("short", 300, short), ("long", ENDLESS, long)]
        threads = [
            threading.Thread(target=lambda name=name, n=n, to=to: to.append(server.json("POST", "/v1/completions", {**body(name, n), "n": 1})))
            for name, n, to in jobs
        ]
        # So many others that the long one cannot be done in time.
        noise = [threading.Thread(target=lambda: server.call("POST", "/v1/completions", {"prompt": "x", "max_tokens": ENDLESS, "n": 100, "ignore_eos": True}))]
        for thread in threads + noise:
            thread.start()
        time.sleep(0.4)
        assert server.stop() == 0
        for thread in threads + noise:
            thread.join()
        assert long[0][0] == 200 and long[0][1]["choices"][0]["finish_reason"] == "length"
        tokens = long[0][1]["usage"]["completion_tokens"]
        assert tokens < ENDLESS
        server.restart()
        info = server.json("GET", "/v1/sessions/long")[1]
        assert info["tokens_seen"] == long[0][1]["session"]["tokens_seen"]
