"""Connections and limits of a real server: raw bytes, half requests, slow readers, a full queue, the end."""

import json
import resource
import signal
import socket
import threading
import time

import httpx
import pytest
from in_loop import streamed
from server_process import serving

LONG = {"prompt": "Once upon a time", "max_tokens": 400, "min_tokens": 400, "seed": 1}


@pytest.fixture(scope="module")
def small(tmp_path_factory, stories_model_dir):
    """A server with small limits, which the last test stops."""
    limits = ("--max-rows", 2, "--max-queue", 2, "--max-connections", 40, "--request-seconds", 1,
              "--write-seconds", 1, "--drain-seconds", 1)  # fmt: skip
    with serving(tmp_path_factory.mktemp("small") / "log", stories_model_dir, *limits) as process:
        yield process


def connect(server, **options):
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    return connection


def read_all(connection):
    found = b""
    with connection:
        while part := connection.recv(65536):
            found += part
    return found


def right(server):
    """The next request is right."""
    found = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Ben", "max_tokens": 3, "temperature": 0})
    assert found.status_code == 200 and found.json()["usage"]["completion_tokens"] == 3


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    "sent",
    [b"\x00\x01\x02\xff" * 100, b"GET / HTTP/9.9\r\n\r\n", b"hello\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n",
     b"\x16\x03\x01\x02\x00", HEAD + b"content-length: -1\r\n\r\n", HEAD + b"x" * 100_000,
     HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", b"POST /%ff%00 HTTP/1.1\r\nhost: localhost\r\n\r\n",
     b"GET /health HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"],
    ids=lambda sent: repr(sent[-12:]),
)  # fmt: skip
def test_raw_bytes_get_an_error_body_or_a_closed_connection(small, sent):
    connection = connect(small)
    connection.sendall(sent)
    found = read_all(connection)
    if found:
        head, _, body = found.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        assert status < 500
        assert status == 200 or sorted(json.loads(body)["error"]) == ["code", "message", "param", "type"]
    right(small)


def test_half_a_request_is_given_up(small):
    half_head, half_body = connect(small), connect(small)
    half_head.sendall(HEAD)
    half_body.sendall(HEAD + b'content-length: 100\r\n\r\n{"prompt": ')
    began = time.monotonic()
    assert read_all(half_head) == b""
    assert b" 408 " in read_all(half_body)
    assert time.monotonic() - began < 10
    right(small)


def test_a_prompt_of_10_megabytes(small):
    found = httpx.post(f"{small.url}/v1/completions", json={"prompt": "word " * 2_000_000}, timeout=60)
    assert found.status_code == 413 and found.json()["error"]["code"] == "request_too_large"
    right(small)


def test_a_slow_reader_is_cut(small):
    connection = connect(small, SO_RCVBUF=2048)
    body = json.dumps({"prompt": "Once", "max_tokens": 400, "min_tokens": 400, "n": 4, "stream": True, "logprobs": 20})
    connection.sendall(HEAD + f"content-length: {len(body)}\r\n\r\n{body}".encode())
    until = time.monotonic() + 60
    while "took nothing of its answer" not in small.text() and time.monotonic() < until:
        time.sleep(0.1)
    assert "took nothing of its answer" in small.text()
    rows = httpx.get(f"{small.url}/metrics").text
    assert "lightning_rlhf_rows_running 0.0" in rows and "lightning_rlhf_rows_waiting 0.0" in rows
    connection.close()
    right(small)


def test_too_many_idle_connections(small):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))  # a thousand files are open here
    many = [connect(small) for _ in range(1000)]
    refused = [c for c in many[60:] if b" 503 " in c.recv(4096)]
    assert len(refused) == 940
    time.sleep(2)  # the idle ones are closed
    right(small)
    for connection in many:
        connection.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_full_queue_is_429(small):
    with httpx.Client(base_url=small.url, timeout=60) as client:
        refused = client.post("/v1/completions", json={**LONG, "n": 5})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        with client.stream("POST", "/v1/completions", json={**LONG, "n": 4, "stream": True}):
            with httpx.Client(base_url=small.url) as other:
                busy = other.post("/v1/completions", json={"prompt": "Ben", "max_tokens": 2})
            assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
            assert busy.json()["error"]["type"] == "rate_limit_error"
    with httpx.Client(base_url=small.url) as client:
        found = client.post("/v1/completions", json={"prompt": "Ben", "max_tokens": 2})
        while found.status_code == 429:
            time.sleep(0.05)
            found = client.post("/v1/completions", json={"prompt": "Ben", "max_tokens": 2})
        assert found.status_code == 200


def test_sigterm_finishes_answers_and_then_cancels(small):
    """The last test of this server: a short answer is finished, long ones are cancelled."""
    short = {"prompt": "Ben", "max_tokens": 40, "min_tokens": 40}
    long = {"prompt": "Ben", "max_tokens": 500, "min_tokens": 500, "n": 3, "logprobs": 20}
    lines = {}

    def read(name, body):
        with httpx.stream("POST", f"{small.url}/v1/completions", json={**body, "stream": True}, timeout=60) as response:
            lines[name] = []
            lines[name] += [line for line in response.iter_lines() if line]

    readers = [threading.Thread(target=read, args=each) for each in (("short", short), ("long", long))]
    for reader in readers:
        reader.start()
        while len(lines) < len(readers[: readers.index(reader) + 1]):
            time.sleep(0.01)
    small.process.send_signal(signal.SIGTERM)
    for reader in readers:
        reader.join()
    assert small.process.wait(timeout=20) == -signal.SIGTERM
    assert "answers may finish within 1 s" in small.text()
    assert streamed(lines["short"])[-1]["choices"][0]["finish_reason"] == "length"
    assert json.loads(lines["long"][-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
