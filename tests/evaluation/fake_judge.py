"""A judge for tests: an OpenAI-compatible server in a thread, which says what it is told to.

with FakeJudge(longer) as judge:
    ChatJudge(judge.url, "fake")
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def first(prompt, a, b):
    """Biased: what stands first is better."""
    return "I like the beginning.\nVerdict: A"


def longer(prompt, a, b):
    """The longer answer is better."""
    return "Verdict: tie" if len(a) == len(b) else f"Length decides.\nVerdict: {'A' if len(a) > len(b) else 'B'}"


def parts(text):
    """Request and answers in what our template makes of them."""
    return [
        re.search(rf"\[{name}\]\n(.*?)\n\[end of {name}\]", text, re.DOTALL)[1]
        for name in ("request", "answer A", "answer B")
    ]


class FakeJudge:
    """Replies by ``say(prompt, a, b)``, unless ``fail(n)`` of the n-th request (from 0) gives (status, body, headers).

    Attributes:
        url: Its base URL.
        requests: (headers, body) of what it was sent.
        alive: Requests at the moment, and the most there were.
    """

    def __init__(self, say=first, fail=lambda n: None):
        self.requests, self.alive, self.most = [], 0, 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(({name.title(): value for name, value in self.headers.items()}, body))
                    outer.alive += 1
                    outer.most = max(outer.most, outer.alive)
                try:
                    planned = fail(number)
                    if planned is None:
                        content = say(*parts(body["messages"][0]["content"]))
                        planned = 200, json.dumps({"choices": [{"message": {"content": content}}]}), {}
                finally:  # before the reply: who reads it may ask again at once
                    with lock:
                        outer.alive -= 1
                status, text, headers = planned
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except (BrokenPipeError, ConnectionResetError):
                    pass  # who asked has given up

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
