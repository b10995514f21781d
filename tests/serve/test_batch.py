"""A text is the same to the bit whatever else is in the batch."""

import json
import random
import threading
import urllib.request

from conftest import generate, running

PROMPTS = [
    "Once upon a time", "The sea", "In the year 1850 a ship left the harbour of Lisbon with forty men on board.",
    "A", "It was the best of times, it was the worst of times. " * 12, "The old man said:", "\n\nChapter II",
    "naïve café 日本 \U0001f600",
]


def test_greedy_texts_do_not_depend_on_the_batch():
    expected = {prompt: generate("--greedy", "--max-tokens", "32", "--prompt", prompt)["text"] for prompt in PROMPTS}
    for arguments in [(), ("--max-batch", "3", "--prefill-tokens", "7", "--prefix-cache-mib", "0"), ("--max-concurrent", "2")]:
        with running(*arguments) as server:
            order = random.Random(1)
            work = [(prompt, order.random() * 0.4) for prompt in PROMPTS * 6]
            order.shuffle(work)
            # Others that sample, stream, score and leave.
            noise = [
                {"prompt": "noise", "max_tokens": 40, "seed": 1}, {"prompt": "more noise " * 30, "max_tokens": 3},
                {"prompt": "scored " * 20, "max_tokens": 1, "echo": True, "logprobs": 2},
            ] * 4
            wrong = []

            def ask(prompt, wait):
                threading.Event().wait(wait)
                text = server.complete(prompt, max_tokens=32)
                if text != expected[prompt]:
                    wrong.append((prompt, text))

            def disturb(body, wait):
                threading.Event().wait(wait)
                server.json("POST", "/v1/completions", body)

            threads = [threading.Thread(target=ask, args=job) for job in work]
            threads += [threading.Thread(target=disturb, args=(body, order.random() * 0.4)) for body in noise]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong, wrong[:3]
            assert server.process.poll() is None


def test_prefixes_are_remembered_and_change_nothing():
    with running() as server:
        long = "The captain looked at the sea and thought of his home. " * 40
        first = server.json("POST", "/v1/completions", {"prompt": long, "max_tokens": 8, "temperature": 0})[1]
        again = server.json("POST", "/v1/completions", {"prompt": long, "max_tokens": 8, "temperature": 0})[1]
        cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert cached == again["usage"]["prompt_tokens"] - 1
        assert again["choices"][0]["text"] == first["choices"][0]["text"]
        # Another end: the part that is common in whole strides is known.
        other = server.json("POST", "/v1/completions", {"prompt": long + "Then", "max_tokens": 8, "temperature": 0})[1]
        assert other["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256
        assert other["choices"][0]["text"] == generate("--greedy", "--max-tokens", "8", "--prompt", long + "Then")["text"]


def test_a_slow_reader_holds_nobody_up():
    """It takes nothing of a long stream; others go on, and its place becomes free."""
    import socket

    with running("--write-timeout-seconds", "2") as server:
        body = json.dumps({"prompt": "x", "max_tokens": 4000, "stream": True, "logprobs": 20, "ignore_eos": True, "n": 4}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", int(server.port)))
        slow.sendall(head.encode() + body)
        text = server.complete("Once upon a time")
        for _ in range(20):
            assert server.complete("Once upon a time") == text
        deadline = 200
        while server.metric("running_texts"):
            deadline -= 1
            assert deadline, "the slow reader keeps its place"
            threading.Event().wait(0.1)
        slow.close()


def test_turns_go_round_between_clients(tmp_path):
    """One client asks for a hundred texts at once; another, who comes later, need not wait for them."""
    keys = tmp_path / "keys"
    keys.write_text("many\nfew\n")
    with running("--api-key-file", str(keys), "--max-concurrent", "4") as server:
        done = []
        body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True}

        def ask(key):
            status, answer = server.json("POST", "/v1/completions", body, headers={"Authorization": f"Bearer {key}"})
            assert status == 200, answer
            done.append(key)

        threads = [threading.Thread(target=ask, args=("many",)) for _ in range(100)]
        for thread in threads:
            thread.start()
        while len(done) < 5:
            threading.Event().wait(0.005)
        ask("few")
        before = len(done)
        for thread in threads:
            thread.join()
        assert len(done) == 101
        assert before < 60, f"{before} others came first"
