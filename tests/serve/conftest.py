"""Starts the real server for tests. The program is named by MMFREE."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Tokens of a text that is never done.
ENDLESS = 10_000_000
PROGRAM = os.environ.get("MMFREE", str(ROOT / "target/debug/mmfree"))
# A small trained model, and its name in the API.
TRAINED = str(ROOT / "tests/fixtures/trained/model.gguf")
MODEL = "trained"


class Server:
    """A running `mmfree serve`."""

    def __init__(self, *arguments, env=None):
        self.arguments = arguments
        self.env = env
        self.start("0")

    def start(self, port):
        quiet = [] if "--log-level" in self.arguments else ["--log-level", "warn"]
        # So that a text can be asked for that is still being written when something else happens.
        endless = ["--max-tokens", str(ENDLESS)]
        command = [PROGRAM, "serve", TRAINED, "--model-name", MODEL, "--port", port, *quiet, *endless, *self.arguments]
        environment = {**os.environ, **(self.env or {})}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines = []
        self.address = None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"serving \S+ on (https?)://(\S+?)/", line)
            if found:
                self.scheme, self.address = found.groups()
                break
        assert self.address, "".join(self.lines)
        self.port = self.address.rsplit(":", 1)[1]
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self):
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def url(self):
        return f"{self.scheme}://{self.address}"

    def kill(self):
        """As the kernel does it: no goodbye."""
        self.process.kill()
        self.process.wait()

    def restart(self):
        self.start(self.port)

    def stop(self, timeout=60):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def raw(self, data, timeout=30, read=True):
        """Sends bytes and returns what comes back until the other end closes."""
        host, port = self.address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout) as connection:
            connection.sendall(data)
            answer = b""
            while read:
                part = connection.recv(65536)
                if not part:
                    break
                answer += part
            return answer

    def call(self, method, path, body=None, headers=None, content_type="application/json"):
        """(status, headers, bytes) of a request."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = dict(headers or {})
        if body is not None and content_type:
            headers.setdefault("Content-Type", content_type)
        request = urllib.request.Request(self.url + path, data=body, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def json(self, method, path, body=None, **options):
        status, _, answer = self.call(method, path, body, **options)
        return status, json.loads(answer)

    def complete(self, prompt, **fields):
        """The first text of a greedy completion."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 24, **fields}
        status, answer = self.json("POST", "/v1/completions", body)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def wait_until_running(self):
        """Until a text is being written."""
        deadline = time.monotonic() + 20
        while not self.metric("running_texts"):
            assert time.monotonic() < deadline, "nothing is being written"
            time.sleep(0.01)

    def wait_until_idle(self):
        deadline = time.monotonic() + 20
        while self.metric("running_texts") or self.metric("clients"):
            assert time.monotonic() < deadline, "texts are left over"
            time.sleep(0.1)

    def metric(self, name):
        _, _, text = self.call("GET", "/metrics")
        found = re.search(rf"^mmfree_{name} (\S+)$", text.decode(), re.M)
        return float(found.group(1)) if found else None


@contextlib.contextmanager
def running(*arguments, **options):
    server = Server(*arguments, **options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture(scope="session")
def server():
    """A server that all tests share; it must be alive at the end, and idle."""
    with running() as server:
        yield server
        assert server.process.poll() is None, "the server ended"
        server.wait_until_idle()


def generate(*arguments):
    """What `mmfree generate --json` says."""
    command = [PROGRAM, "generate", TRAINED, "--json", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Redis:
    """A Redis or Valkey server of the tests' own."""

    def __init__(self, directory):
        self.program = shutil.which("redis-server") or shutil.which("valkey-server")
        self.directory = directory
        self.port = free_port()
        self.process = None

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/"

    def start(self):
        command = [self.program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory),
                   "--appendonly", "yes", "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, "redis does not start"
                time.sleep(0.05)

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None


@pytest.fixture
def redis(tmp_path):
    redis = Redis(tmp_path)
    if not redis.program:
        pytest.skip("NEITHER redis-server NOR valkey-server IS INSTALLED")
    redis.start()
    yield redis
    redis.stop()
