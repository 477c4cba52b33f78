"""A model's endpoint for tests: a server on this machine that answers, fails and bills by rule.

    with FakeEndpoint(seed=1, faults={"http_500": 0.1}) as server:
        Endpoint(server.url, "fake")

What it says to a request is a function of (body, seed): ``planted.plant``. What goes wrong is one of (body, attempt,
seed), where attempts at the same body are counted from 1. What a real server would charge for is in its bill before the
reply is sent. By hand: ``python -m tests.support.endpoint --help``.
"""

import argparse
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

if (_here := str(Path(__file__).parent)) not in sys.path:  # pytest has it there
    sys.path.insert(0, _here)
import planted

#: Faults before the model works: nothing is billed.
FREE = (
    "http_400", "http_401", "http_402", "http_403", "http_404", "http_429", "http_500", "http_503_html",
    "retry_after", "retry_date", "redirect", "reset",
)  # fmt: skip
#: Faults of a reply that was made, and is billed: the client can't read it, ...
UNREADABLE = ("cut", "doubled", "gbk", "hang", "huge", "no_choices", "silence", "truncated")
#: ... or it is odd.
ODD = ("empty", "length", "no_usage", "null", "other_model", "surrogate", "usage_high", "usage_zero")
FAULTS = (*FREE, *UNREADABLE, *ODD)
#: Those after which another attempt helps.
PASSING = (
    "http_429", "http_500", "http_503_html", "retry_after", "reset", "cut", "doubled", "hang", "silence", "truncated",
)  # fmt: skip


class FakeEndpoint:
    """The server. It stops at the end of a ``with``.

    Args:
        seed: Of what it says and of its faults.
        faults: Share of attempts that each of :data:`FAULTS` befalls, within the first ``most_faults`` attempts.
        always: Share of bodies that a fault befalls at every attempt.
        script: Faults of the first requests, in the order of arrival, whatever they ask. None: none.
        say: ``say(body) -> planted.Planted`` instead of ``planted.plant``.
        shares: See ``planted.Shares``.
        delay: Least and most seconds before a reply, drawn at random.
        hang: Seconds for which a fault keeps silent.
        bill: A file to which each line of the bill is also appended.
        complaint: Text in the body of its errors, in which ``{fault}`` stands for the fault.
        elsewhere: Where the fault ``redirect`` leads.
        port: Its port. 0: a free one.

    Attributes:
        url: Its base URL.
        bill: Lines of what it charges for: ``id`` (the client's own name of the attempt), ``body`` (a digest),
            ``attempt``, ``prompt``, ``cached`` and ``completion`` tokens, ``fault``, ``planted`` (kinds of items).
        requests: (headers, body) of all that it was sent.
        alive: Requests at the moment.
        most: The most at a time.
        faulty: How often each fault occurred.
    """

    def __init__(
        self, seed=0, faults=None, always=None, script=(), say=None, shares=None, delay=(0, 0), hang=1.0, bill=None,
        complaint="this is {fault}", elsewhere="http://127.0.0.1:9/v1", port=0, most_faults=4,
    ):  # fmt: skip
        if unknown := {*(faults or ()), *(always or ()), *filter(None, script)} - set(FAULTS):
            raise ValueError(f"{sorted(unknown)[0]!r} is none of {', '.join(FAULTS)}")
        self.seed, self.faults, self.always, self.most_faults = seed, faults or {}, always or {}, most_faults
        self.complaint, self.elsewhere = complaint, elsewhere
        self.script, self.delay, self.hang = list(script), delay, hang
        self.say = say or (lambda body: planted.plant(body, seed, shares))
        self.bill, self.requests, self.alive, self.most, self.faulty = [], [], 0, 0, Counter()
        self._file = Path(bill).open("a", encoding="utf-8") if bill else None  # noqa: SIM115
        self._attempts, self._lock, self._closing = Counter(), threading.Lock(), threading.Event()
        self._server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"fake": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        if self._file:
            self._file.close()

    def spent(self):
        """Sums of the bill: prompt, cached and completion tokens."""
        with self._lock:
            return tuple(sum(line[name] for line in self.bill) for name in ("prompt", "cached", "completion"))

    def fault(self, digest, attempt, number):
        """The fault of an attempt, or None."""
        if number < len(self.script):
            return self.script[number]
        draws = [(self.always, planted.digest("always", digest, self.seed))]
        if attempt <= self.most_faults:
            draws.append((self.faults, planted.digest("fault", digest, attempt, self.seed)))
        for shares, drawn in draws:
            at = drawn / 2**64
            for kind, share in shares.items():
                at -= share
                if at < 0:
                    return kind
        return None

    def arrive(self, headers, body):
        """Notes a request; returns its digest, attempt and fault."""
        digest = f"{planted.digest(body):016x}"
        with self._lock:
            number = len(self.requests)
            self.requests.append((headers, body))
            self._attempts[digest] += 1
            attempt = self._attempts[digest]
            self.alive += 1
            self.most = max(self.most, self.alive)
            fault = self.fault(digest, attempt, number)
            self.faulty.update([fault] if fault else [])
        if self.delay[1]:
            time.sleep(random.uniform(*self.delay))
        return digest, attempt, fault

    def leave(self):
        with self._lock:
            self.alive -= 1

    def charge(self, line):
        with self._lock:
            self.bill.append(line)
            if self._file:
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()

    def wait(self):
        """Keeps silent."""
        self._closing.wait(self.hang)

    def reply(self, headers, body, digest, attempt, fault):
        """Makes a reply and charges for it; returns the document."""
        said = self.say(body)
        text, finish = said.text, "stop"
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        ends = [match.end() for match in planted.TOKEN.finditer(text)]
        if limit is not None and len(ends) > limit:
            text, finish, ends = text[: ends[limit - 1]], "length", ends[:limit]
        prompt = sum(planted.count_tokens(message["content"]) + 2 for message in body["messages"])
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": max(1, len(ends)),
            "prompt_tokens_details": {"cached_tokens": prompt // 4 if planted.digest(digest) % 2 else 0},
        }
        self.charge({
            "id": headers.get("x-client-request-id"),
            "body": digest,
            "attempt": attempt,
            "prompt": prompt,
            "cached": usage["prompt_tokens_details"]["cached_tokens"],
            "completion": usage["completion_tokens"],
            "fault": fault,
            "planted": said.counts(),
        })  # fmt: skip
        if fault in ("usage_zero", "usage_high"):
            usage |= {"completion_tokens": 0 if fault == "usage_zero" else 10 * (limit or 1000)}
        text = {"empty": "", "null": None, "surrogate": f"\ud800{text}", "gbk": f"你好 {text}"}.get(fault, text)
        document = {
            "id": f"chatcmpl-{digest}-{attempt}",
            "object": "chat.completion",
            "created": 0,
            "model": "another-model" if fault == "other_model" else body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "length" if fault == "length" else finish,
                    "message": {"role": "assistant", "content": text},
                }
            ],
            "usage": usage,
        }
        for name in {"no_usage": ["usage"], "no_choices": ["choices"]}.get(fault, []):
            del document[name]
        return document


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that was killed is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeEndpoint

    def log_message(self, *args):
        pass

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        headers, body = {name.lower(): value for name, value in self.headers.items()}, json.loads(raw)
        digest, attempt, fault = self.fake.arrive(headers, body)
        try:
            if fault in FREE:
                planned = self.refusal(fault)
            else:
                planned = self.answer(self.fake.reply(headers, body, digest, attempt, fault), fault)
        finally:  # before the reply: who reads it may ask again at once
            self.fake.leave()
        if planned is not None:
            self.send(*planned)

    def refusal(self, fault):
        error = json.dumps({"error": {"message": self.fake.complaint.format(fault=fault), "type": "fake"}}).encode()
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        if fault == "http_503_html":
            return 503, b"<html><body><h1>503 Service Unavailable</h1></body></html>", {"Content-Type": "text/html"}
        if fault == "redirect":
            return 307, b"", {"Location": f"{self.fake.elsewhere}/chat/completions"}
        if fault == "retry_after":
            return 429, error, {"Retry-After": "0"}
        if fault == "retry_date":
            when = datetime.now(timezone.utc) + timedelta(seconds=1)
            return 429, error, {"Retry-After": format_datetime(when, usegmt=True)}
        return int(fault.removeprefix("http_")), error, {}

    def answer(self, document, fault):
        content = json.dumps(document, ensure_ascii=fault == "surrogate").encode(
            "gbk" if fault == "gbk" else "utf-8", "replace"
        )
        if fault == "truncated":
            content = content[: len(content) // 2]
        if fault == "doubled":
            content *= 2
        if fault == "huge":
            content += b" " * (10 * 2**20)
        if fault == "hang":
            self.fake.wait()
        if fault in ("cut", "silence"):
            self.send(200, content, {}, len(content) // 2)
            if fault == "silence":
                self.fake.wait()
            self.close_connection = True
            return None
        return 200, content, {}

    def send(self, status, content, headers, part=None):
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:part])
            self.wfile.flush()
        except OSError:
            self.close_connection = True  # who asked is gone


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000, help="0: a free one, which is printed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.0, help="share of attempts that fail in passing")
    parser.add_argument("--delay", type=float, default=0.0, help="most seconds before a reply")
    parser.add_argument("--bill", help="file that the bill is appended to")
    options = parser.parse_args(args)
    faults = dict.fromkeys(PASSING, options.faults / len(PASSING))
    server = FakeEndpoint(
        options.seed, faults, delay=(0, options.delay), bill=options.bill, port=options.port, hang=90.0
    )
    with server:
        print(f"A fake endpoint at {server.url}, until Ctrl-C", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(f"{len(server.requests)} requests, {len(server.bill)} billed: {server.spent()} tokens")


if __name__ == "__main__":
    main()
