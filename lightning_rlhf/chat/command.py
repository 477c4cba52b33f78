"""``lightning-rlhf chat RUN``: a chat in the terminal with what a run has trained."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_rlhf.arguments import Parser

_ABOUT = """\
Chats with the models of a run in the terminal. Several models answer side by side, each answer with the reward model's
score; /good, /bad and /better save what you think of them as training data. RUN is what `lightning-rlhf serve` takes,
or the address of a running server."""
_KEY_VARIABLE = "LIGHTNING_RLHF_API_KEY"


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Arguments after ``chat``.
    """
    parser = Parser("chat", _ABOUT)
    parser.add_argument("run", metavar="RUN", help="what serve takes (a run, a model, a hub id), or http://HOST:PORT")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="models that answer; default: the first one")
    parser.add_argument("--adapters", nargs="+", metavar="NAME=DIR", help="adapters over the model RUN; see serve")
    parser.add_argument("--reward", help="reward model of the scores; see serve")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--temperature", type=float, default=0.7, help="more gives more diverse answers; 0: greedy")
    parser.add_argument("--max-new-tokens", type=int, help="maximum number of tokens per answer; default: no limit")
    parser.add_argument("--history", type=Path, help="file that keeps the conversation, and goes on with it next time")
    parser.add_argument("--votes", type=Path, default=Path("runs/chat"), help="folder for what you think of answers")
    options = parser.parse_args(args)
    from lightning_rlhf.chat.client import ChatError, Client

    try:
        with _server(options) as url:
            _chat(options, Client(url, os.environ.get(_KEY_VARIABLE)))
    except (ChatError, OSError, ValueError) as error:
        sys.exit(f"lightning-rlhf chat: {error}")


def _chat(options: Any, client: Any) -> None:
    from lightning_rlhf.chat.conversation import Conversation
    from lightning_rlhf.chat.terminal import Terminal

    resumed = options.history is not None and options.history.exists()
    conversation = Conversation.load(options.history) if resumed else Conversation(options.system)
    if resumed and options.system:
        conversation.system = options.system
    sampling = {"temperature": options.temperature}
    if options.max_new_tokens is not None:
        sampling["max_completion_tokens"] = options.max_new_tokens
    models = options.models or client.models()[:1]
    terminal = Terminal(client, models, conversation, sampling, options.history, _write)
    for turn in conversation.turns:
        _write(f"{'> ' if turn['role'] == 'user' else ''}{turn['content']}\n")
    _write(f"Asking {', '.join(models)}. /help lists commands.\n")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- arrow keys and earlier lines in input()
    prompt = "> " if sys.stdin.isatty() else ""
    terminal.run(lambda: input(prompt))


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a character that the terminal lacks must not end the chat
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


@contextlib.contextmanager
def _server(options: Any) -> Iterator[str]:
    """Starts a server of RUN in a process of its own, unless RUN is the address of one. Yields its address."""
    if options.run.startswith(("http://", "https://")):
        yield options.run
        return
    command = [sys.executable, "-m", "lightning_rlhf", "serve", options.run, "--port", "0", "--votes", options.votes]
    command += ["--adapters", *options.adapters] if options.adapters else []
    command += ["--reward", options.reward] if options.reward else []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        # its own session: Ctrl-C here stops an answer and not the server
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, start_new_session=True)
        try:
            yield _address(process, log)
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Any) -> str:
    _write("Loading ...\n")
    while True:
        log.seek(0)
        text = log.read()
        if "Listening on " in text:
            return str(text.split("Listening on ")[1].split()[0])
        if process.poll() is not None:
            lines = text.strip().splitlines() or ["the server did not start"]
            raise OSError(lines[-1].removeprefix("lightning-rlhf serve: "))
        time.sleep(0.05)
