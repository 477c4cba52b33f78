"""``lightning-rlhf serve RUN``: an HTTP server with OpenAI's interface for what a run has trained."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from lightning_rlhf.arguments import Parser, add_model_options

log = logging.getLogger(__name__)
_ABOUT = """\
Serves the models of a run over HTTP, with OpenAI's interface: chats and completions, streamed or whole; also scores of
the run's reward model. docs/serve.md lists all routes and fields."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEY_VARIABLE = "LIGHTNING_RLHF_API_KEY"


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Arguments after ``serve``.
    """
    options = _parser().parse_args(args)
    try:
        from lightning_rlhf.serving.listen import run
    except ModuleNotFoundError as error:
        sys.exit(f"lightning-rlhf serve needs {error.name}. Install it: pip install 'lightning_rlhf[serve]'")
    try:
        _check(options)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
        run(_server(options), _access(options), options.host, options.port)
    except (OSError, ImportError, ValueError) as error:
        sys.exit(f"lightning-rlhf serve: {' '.join(str(error).split())}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("serve", _ABOUT)
    parser.add_argument(
        "run",
        metavar="RUN",
        help="directory of a model, of a run (with hf/best or hf/last) or of several runs, or a hub id",
    )
    parser.add_argument(
        "--adapters", nargs="+", metavar="NAME=DIR", help="adapters over the model RUN, which is then called base"
    )
    parser.add_argument(
        "--reward", help="a reward model's directory or hub id, or module.function; default: the one in RUN, if any"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; any but this machine's needs a key")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: a free one")
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key", "--api_key", help=f"key that requests must carry; default: the variable {_KEY_VARIABLE}"
    )
    access.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="a further name of this server"
    )
    access.add_argument(
        "--allowed-origin", action="append", default=[], metavar="URL", help="origin of another page that may ask"
    )
    models = parser.add_argument_group("models")
    add_model_options(models, "--chat-template", "--dtype", "--trust-remote-code")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-rows", type=int, default=64, help="answers that are generated together; more is faster, uses memory"
    )
    limits.add_argument(
        "--max-live-tokens",
        type=int,
        help="size of the cache in tokens; more is faster, uses memory; default: no limit",
    )
    limits.add_argument("--max-queue", type=int, default=256, help="answers that wait; beyond it requests get 429")
    limits.add_argument("--max-body", type=int, default=4 * 2**20, help="bytes of a request's body")
    limits.add_argument("--max-connections", type=int, default=1024, help="open connections")
    limits.add_argument("--request-seconds", type=float, default=30.0, help="time for a client to send a whole request")
    limits.add_argument(
        "--write-seconds", type=float, default=30.0, help="time after which a client that takes nothing is cut off"
    )
    limits.add_argument(
        "--drain-seconds", type=float, default=20.0, help="time for answers to finish after SIGTERM or Ctrl-C"
    )
    parser.add_argument(
        "--votes", default="runs/chat", metavar="DIR", help="folder for votes on answers; default: %(default)s"
    )
    parser.add_argument("--log-prompts", action="store_true", help="also log prompts and answers")
    return parser


def _check(options: argparse.Namespace) -> None:
    options.api_key = options.api_key or os.environ.get(_KEY_VARIABLE) or None
    if options.host not in _LOOPBACK and options.api_key is None:
        raise ValueError(
            f"--host {options.host} can be reached by others. Give --api-key or set {_KEY_VARIABLE}, or leave the host "
            "out."
        )
    for name in ("max_rows", "max_live_tokens", "max_body", "max_connections", "request_seconds", "write_seconds"):
        if (value := getattr(options, name)) is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0; got {value}.")
    for name in ("max_queue", "drain_seconds"):
        if not getattr(options, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0; got {getattr(options, name)}.")


def _access(options: argparse.Namespace) -> Any:
    from lightning_rlhf.serving.guard import Access

    return Access(options.api_key, [host.lower() for host in options.allowed_host], options.allowed_origin)


def _server(options: argparse.Namespace) -> Any:
    """Loads what is served."""
    import torch

    from lightning_rlhf.models.pretrained import obtain
    from lightning_rlhf.rewards import make_reward
    from lightning_rlhf.serving.limits import Limits
    from lightning_rlhf.serving.load import ModelOptions, load_all
    from lightning_rlhf.serving.runs import find_models
    from lightning_rlhf.serving.scoring import Scorer
    from lightning_rlhf.serving.server import Server
    from lightning_rlhf.serving.votes import Votes
    from lightning_rlhf.serving.weights import WeightHashes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    limits = Limits(**{entry.name: getattr(options, entry.name) for entry in fields(Limits)})
    names = ("chat_template", "max_rows", "max_live_tokens", "trust_remote_code")
    how = ModelOptions(dtype, device, **{name: getattr(options, name) for name in names})
    found = find_models(str(obtain(options.run)), _adapters(options.adapters or ()))
    models = load_all(found.backbones, how)
    scorer = None
    if reward := options.reward or found.reward:
        log.info("Loading the reward %s", reward)
        tokenizer = next(iter(models.values())).tokenizer
        made = make_reward(reward, tokenizer, dtype, options.trust_remote_code)
        scorer = Scorer("reward", made, tokenizer, device, limits.max_queue)
    votes = Votes(options.votes)
    votes.mend()
    return Server(models, limits, scorer, options.log_prompts, votes, WeightHashes(found.sources))


def _adapters(given: Sequence[str]) -> dict[str, str]:
    """Reads NAME=DIR."""
    found = {}
    for entry in given:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--adapters: {entry!r} is not NAME=DIR, such as after=runs/ppo.")
        found[name] = folder
    return found
