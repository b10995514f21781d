"""Hostile and unlucky clients: nothing crashes, nobody else is disturbed, nothing is let in."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time

import pytest

from conftest import ENDLESS, running

REQUESTS = int(os.environ.get("MMFREE_FUZZ_REQUESTS", "10000"))
POST = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_bodies_that_are_no_json(server):
    bodies = [
        b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "x", "max_tokens": 1e999}',
        b'{"prompt": "x", "max_tokens": -1}', b'{"prompt": "x", "max_tokens": 1.5}', b'{"prompt": {"a": 1}}', b'{"prompt": "x", "n": "1"}',
        b'{"prompt": "x", "temperature": null, "top_p": NaN}', b'{"prompt": [1, "x"]}', b'{"prompt": [-1]}', b'{"prompt": "x", "prompt": "y"}',
        b"[" * 100_000, b'{"prompt": ' + b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"prompt": "x", "metadata": ' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}",
        b'{"prompt": "\\ud800"}', b'{"prompt": "x", "stop": [[]]}', b'{"prompt": "x", "logit_bias": {"1": "x"}}',
    ]
    for body in bodies:
        for path in ["/v1/completions", "/v1/chat/completions"]:
            status, _, answer = server.call("POST", path, body)
            assert status == 400, (status, body[:50])
            assert json.loads(answer)["error"]["message"]
    assert server.complete("Once upon a time", max_tokens=3)


def test_sizes_and_types(server):
    status, answer = server.json("POST", "/v1/completions", b'{"prompt": "' + b"x" * (5 << 20) + b'"}')
    assert status == 413 and "bytes" in answer["error"]["message"]
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]:
        body = b'{"prompt": "x"}'
        assert server.call("POST", "/v1/completions", body, content_type=content_type)[0] == 415
    huge = server.raw(POST.encode() + b"Content-Length: 99999999999999\r\nConnection: close\r\n\r\n{}")
    assert b" 413 " in huge.split(b"\r\n")[0]
    many = server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 1000 + b"\r\n")
    assert b" 431 " in many.split(b"\r\n")[0] or many == b""
    long = server.raw(b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b" 4" in long.split(b"\r\n")[0] or long == b""
    for garbage in [b"\0" * 100, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01", b"POST / HTTP/9.9\r\n\r\n", POST.encode() + b"Content-Length: x\r\n\r\n",
                    POST.encode() + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", POST.encode() + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\nZZ\r\n"]:
        answer = server.raw(garbage)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:80]


def test_paths_and_methods(server):
    for path in ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%5c..%5cwindows", "/app.js/../../x", "/v1/../metrics", "//etc/passwd",
                 "/v1/completions/", "/V1/models", "/v1/models/%00", "/index.html", "/.git/config", "/v1/sessions/", "/v1/sessions/a/b/state"]:
        answer = server.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert answer.split(b" ")[1] in (b"404", b"400", b"405"), (path, answer[:60])
        assert b'{"error":' in answer
    for method, path in [("DELETE", "/v1/models"), ("GET", "/v1/completions"), ("POST", "/health"), ("PATCH", "/v1/sessions/x/state"), ("TRACE", "/")]:
        status, _, body = server.call(method, path)
        assert status == 405 and json.loads(body)["error"]["message"], (method, path)


def test_pages_from_elsewhere_are_kept_out(server):
    """A name that somebody makes point to this machine, and requests of other origins."""
    answer = server.raw(b"GET /v1/models HTTP/1.1\r\nHost: evil.example:80\r\nConnection: close\r\n\r\n")
    assert b" 403 " in answer.split(b"\r\n")[0]
    status, headers, _ = server.call("GET", "/v1/models", headers={"Origin": "https://evil.example"})
    assert status == 200 and headers["Access-Control-Allow-Origin"] is None
    status, headers, _ = server.call("OPTIONS", "/v1/completions", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"})
    assert headers["Access-Control-Allow-Origin"] is None
    with running("--allowed-origin", "https://good.example", "--allowed-host", "my.example") as other:
        status, headers, _ = other.call("OPTIONS", "/v1/completions", headers={"Origin": "https://good.example", "Access-Control-Request-Method": "POST"})
        assert (status, headers["Access-Control-Allow-Origin"]) == (204, "https://good.example")
        assert b" 200 " in other.raw(b"GET /v1/models HTTP/1.1\r\nHost: my.example\r\nConnection: close\r\n\r\n").split(b"\r\n")[0]


def test_clients_of_one_byte_a_second():
    with running("--read-timeout-seconds", "2", "--max-connections", "64") as server:
        results = []

        def drip(head, rest):
            begin = time.monotonic()
            with socket.create_connection(("127.0.0.1", int(server.port)), 30) as connection:
                connection.sendall(head)
                connection.settimeout(1)
                answer = b""
                for byte in rest:
                    try:
                        connection.sendall(bytes([byte]))
                        part = connection.recv(4096)
                        if not part:
                            break
                        answer += part
                    except TimeoutError:
                        continue
                    except OSError:
                        break
                results.append((time.monotonic() - begin, answer))

        text = b"x" * 60
        threads = [threading.Thread(target=drip, args=(b"GET /health HTTP/1.1\r\nX: ", text)) for _ in range(10)]
        threads += [threading.Thread(target=drip, args=(POST.encode() + b"Content-Length: 60\r\n\r\n", text)) for _ in range(10)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            begin = time.monotonic()
            assert server.complete("Once upon a time", max_tokens=4)
            assert time.monotonic() - begin < 5
        for thread in threads:
            thread.join()
        assert all(seconds < 15 for seconds, _ in results), results
        assert sum(answer.startswith(b"HTTP/1.1 408") for _, answer in results) >= 10
        assert server.metric("connections") <= 1


def test_a_request_that_takes_too_long():
    """It gets 504, a stream an error in place of its end; the place is free again."""
    endless = {"prompt": "x", "max_tokens": ENDLESS, "ignore_eos": True}
    with running("--request-timeout-seconds", "1") as server:
        text = server.complete("Once upon a time")
        status, answer = server.json("POST", "/v1/completions", endless)
        assert (status, answer["error"]["code"]) == (504, "timeout"), answer
        status, _, stream = server.call("POST", "/v1/completions", {**endless, "stream": True})
        events = [line for line in stream.decode().splitlines() if line.startswith("data: ")]
        assert status == 200 and "[DONE]" not in events[-1]
        assert json.loads(events[-1][6:])["error"]["code"] == "timeout"
        assert all("choices" in json.loads(line[6:]) for line in events[:-1]) and len(events) > 2
        assert server.complete("Once upon a time") == text
        server.wait_until_idle()


def test_a_request_that_waits_too_long():
    """While the only place is taken it is told to come again; afterwards it gets its text."""
    body = json.dumps({"prompt": "x", "max_tokens": ENDLESS, "ignore_eos": True, "stream": True}).encode()
    with running("--queue-timeout-seconds", "1", "--max-concurrent", "1") as server:
        with socket.create_connection(("127.0.0.1", int(server.port))) as holder:
            holder.sendall(POST.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            holder.recv(1024)
            # It must be read on, or it would lose its place as a slow reader.
            threading.Thread(target=lambda: drain(holder), daemon=True).start()
            status, headers, answer = server.call("POST", "/v1/completions", {"prompt": "y", "max_tokens": 1})
            assert status == 429 and int(headers["Retry-After"]) >= 1, answer
            assert json.loads(answer)["error"]["message"]
            holder.shutdown(socket.SHUT_RDWR)
        assert server.complete("Once upon a time")


def drain(connection):
    with contextlib.suppress(OSError):
        while connection.recv(65536):
            pass


def test_too_many_connections_leave_the_server_standing():
    with running("--max-connections", "20") as server:
        open_ones = [socket.create_connection(("127.0.0.1", int(server.port))) for _ in range(60)]
        time.sleep(0.5)
        for connection in open_ones:
            connection.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                assert server.complete("x", max_tokens=1) is not None
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert server.metric("refused_connections_total") >= 40


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="NO /dev/full: A FULL DISK WAS NOT TRIED")
def test_a_full_disk_for_the_log():
    with running("--log-file", "/dev/full", "--log-level", "info") as server:
        for _ in range(20):
            assert server.complete("Once upon a time", max_tokens=2)
        assert server.metric("log_lines_dropped_total") >= 20


def test_the_log_has_no_prompts_unless_asked(tmp_path):
    for arguments, expected in [((), False), (("--log-prompts",), True)]:
        log = tmp_path / f"log-{expected}"
        with running("--log-file", str(log), "--log-level", "info", *arguments) as server:
            server.complete("My secret is swordfish", max_tokens=4)
            server.json("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "swordfish"}], "max_tokens": 2})
            server.json("POST", "/v1/completions", {"prompt": "x", "swordfish": 1})
            assert server.stop() == 0
        text = log.read_text()
        assert ("swordfish" in text) == expected
        lines = [json.loads(line) for line in text.splitlines()]
        requests = [line for line in lines if line.get("message") == "request"]
        assert [line["status"] for line in requests] == [200, 200, 400]
        assert all(line["route"].startswith("/v1/") and line["milliseconds"] >= 0 for line in requests)


def test_tls(tmp_path):
    import ssl
    import urllib.request

    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                    "-keyout", key, "-out", certificate, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
                   check=True, capture_output=True)
    with running("--tls-cert", str(certificate), "--tls-key", str(key)) as server:
        assert server.scheme == "https"
        context = ssl.create_default_context(cafile=str(certificate))
        body = json.dumps({"prompt": "Once upon a time", "max_tokens": 3}).encode()
        request = urllib.request.Request(server.url + "/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30, context=context) as response:
            assert json.loads(response.read())["choices"][0]["text"]
        plain = server.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert not plain.startswith(b"HTTP/1.1 200")


def test_requests_of_random_shape(server):
    """Half of them nearly right: no crash, no 5xx, and somebody else's text does not change."""
    random_ = random.Random(3)
    expected = server.complete("Once upon a time", max_tokens=8)
    values = [None, True, 0, 1, -1, 2**63, 1e308, "", "x", "\0", "\U0001f600", [], [[]], {}, {"type": "x"}, [1, 2], ["a"], 10**30]
    fields = ["prompt", "max_tokens", "temperature", "top_p", "n", "stop", "stream", "logprobs", "echo", "seed", "session_id", "response_format",
              "logit_bias", "stream_options", "suffix", "best_of", "messages", "top_logprobs", "user", "min_p", "top_k", "repetition_penalty", "x"]

    def one():
        body = {"prompt": "x", "max_tokens": 2} if random_.random() < 0.5 else {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        for _ in range(random_.randrange(4)):
            body[random_.choice(fields)] = random_.choice(values)
        data = bytearray(json.dumps(body).encode())
        if random_.random() < 0.3:
            data[random_.randrange(len(data))] = random_.randrange(256)
        return bytes(data)

    import http.client

    counts = {}
    for number in range(REQUESTS):
        if number % 100 == 0:
            connection = http.client.HTTPConnection("127.0.0.1", int(server.port), timeout=60)
            assert server.complete("Once upon a time", max_tokens=8) == expected
        path = random_.choice(["/v1/completions", "/v1/chat/completions"])
        connection.request("POST", path, one(), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        counts[response.status] = counts.get(response.status, 0) + 1
        assert response.status < 500, answer
        if response.status >= 400:
            assert json.loads(answer)["error"]["message"]
    assert counts.keys() <= {200, 400, 404, 409}, counts
    assert counts[200] > REQUESTS / 20 and counts[400] > REQUESTS / 20, counts


def test_schemathesis(server, tmp_path):
    """Requests made from /openapi.json, right and wrong ones."""
    program = os.path.join(os.path.dirname(sys.executable), "schemathesis")
    examples = max(10, REQUESTS // 200)
    command = [program, "run", server.url + "/openapi.json", "--max-examples", str(examples), "--seed", "1", "--phases", "fuzzing",
               "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
               "--request-timeout", "60", "--no-color", "--mode", "all"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert server.process.poll() is None
