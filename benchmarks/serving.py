"""Speed of the server: many requests at once beside one at a time, and what a chat's turns and long prompts cost.

    pip install -e '.[bench,serve]'
    python benchmarks/serving.py                     # all cases
    python benchmarks/serving.py --case load         # one case

Cases:
    load     answers of stories260K, 1, 16 and 64 at once: over HTTP as streamed chats, in process through the rollout
             session, and over HTTP beside `transformers serve --continuous-batching`, which sends the same requests 16
             at once
    join     the longest gap between a stream's tokens while a prompt of 1,000 tokens joins, or has its log-probs
             computed, in ordinary gaps; and how long that takes; the model is a random Llama
    turns    how many tokens the model runs for a chat's second turn, beside the tokens that are new in it

All is fp32 with one thread. Contestants take turns, and servers run in processes of their own. Speeds are generated
tokens a CPU second of the server's process; waiting times are wall time, seen by the client.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import aiohttp
import common
import psutil
import torch
from common import BenchmarkParser, Meter

from lightning_rlhf.models import load_tokenizer
from lightning_rlhf.rollout import Completion, Request, Sampling, sample_key
from lightning_rlhf.serving.load import ModelOptions, load_served

NAMES = ("Tim", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Lucy")
STORIES = common.ROOT / "tests" / "assets" / "stories260K"
AT_ONCE = (1, 16, 64)
HTTP, SESSION, TRANSFORMERS = "over HTTP", "in process", "transformers serve"
#: How many times as fast as one at a time 16 at once should be, and as another server's 16.
GOALS = {HTTP: 4.0, SESSION: 8.0}
GOAL_BESIDE = 1.5
#: Longest gap, in ordinary ones, and tokens of a second turn, in its new ones.
GOAL_GAP, GOAL_TURN = 4.0, 1.1


@dataclass
class Load:
    """What some requests at once took.

    Attributes:
        tokens: Generated tokens.
        seconds: CPU seconds of the process that generated them.
        first: Seconds to the first token of each answer.
        gaps: Seconds between two tokens of an answer.
        whole: Seconds to the end of each answer.
    """

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens a CPU second."""
        return self.tokens / self.seconds


# ---------------------------------------------------------------------------------------------- servers


@dataclass
class Serving:
    """A server in a process of its own.

    Attributes:
        url: Where it listens.
        model: The name of its model.
        process: The process.
    """

    url: str
    model: str
    process: psutil.Process

    def seconds(self) -> float:
        """CPU seconds that it has taken, of all its threads."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def our_server(model: Path) -> Iterator[Serving]:
    """``lightning-rlhf serve``."""
    with _process(["-m", "lightning_rlhf", "serve", str(model), "--port", "0"], "Listening on ") as (process, log):
        url = log.read_text().split("Listening on ")[1].split()[0]
        yield Serving(url, model.name, process)


@contextmanager
def transformers_server(model: Path) -> Iterator[Serving]:
    """``transformers serve`` with continuous batching."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    options = ["--continuous-batching", "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    start = "from transformers.cli.transformers import main; main()"
    command = ["-c", start, "serve", str(model), *options, "--log-level", "info"]
    with _process(command, "Uvicorn running") as (process, _):
        yield Serving(f"http://localhost:{port}", str(model), process)


SERVERS = {HTTP: our_server, TRANSFORMERS: transformers_server}


@contextmanager
def _process(arguments: Sequence[str], ready: str) -> Iterator[tuple[psutil.Process, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as out:
            command = [sys.executable, *arguments]
            env = {**os.environ, **common.ONE_THREAD}
            process = subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=folder)
        try:
            while ready not in log.read_text():
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended:\n{log.read_text()[-4000:]}")
                time.sleep(0.1)
            yield psutil.Process(process.pid), log
        finally:
            process.kill()
            process.wait()


# ---------------------------------------------------------------------------------------------- many at once


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Short chats that all differ."""
    pairs = itertools.cycle(itertools.product(NAMES, NAMES))
    texts = [f"Tell a story about {a} and {b}." for a, b in itertools.islice(pairs, count)]
    return [[{"role": "user", "content": text}] for text in texts]


async def stream(session: aiohttp.ClientSession, server: Serving, body: dict[str, Any]) -> tuple[int, list[float]]:
    """Asks for a streamed answer; returns its number of tokens, and when each piece of text came."""
    times: list[float] = []
    usage: dict[str, Any] = {}
    asked = {"model": server.model, "stream": True, "stream_options": {"include_usage": True}, **body}
    async with session.post(f"{server.url}/v1/chat/completions", json=asked) as response:
        if response.status != 200:
            raise RuntimeError(f"{server.url}: {response.status} {await response.text()}")
        async for line in response.content:
            if b'"content":"' in line and b'"content":""' not in line:
                times.append(time.perf_counter())
            elif b'"error"' in line:
                raise RuntimeError(f"{server.url}: {line.decode()}")
            if b'"completion_tokens"' in line:
                usage = json.loads(line.removeprefix(b"data: "))["usage"]
    if not usage:
        raise RuntimeError(f"{server.url} sent no usage.")
    return usage["completion_tokens"], times


async def ask_all(server: Serving, at_once: int, count: int, new: int) -> Load:
    """Streams ``count`` answers of at most ``new`` tokens from a server."""
    gate, load = asyncio.Semaphore(at_once), Load()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:

        async def ask(i: int, messages: Any) -> None:
            async with gate:
                body = {"messages": messages, "max_tokens": new, "temperature": 1.0, "top_p": 1.0, "seed": i}
                start = time.perf_counter()
                tokens, times = await stream(session, server, body)
                load.tokens += tokens
                load.first.append(times[0] - start)
                load.gaps += [b - a for a, b in itertools.pairwise(times)]
                load.whole.append(time.perf_counter() - start)

        before = server.seconds()
        await asyncio.gather(*(ask(i, messages) for i, messages in enumerate(conversations(count))))
        load.seconds = server.seconds() - before
    return load


def run_session(at_once: int, count: int, new: int, warmup: int = 1) -> Load:
    """The same answers from the engine of the server, in this process."""
    torch.set_num_threads(1)
    served = load_served("stories", str(STORIES), ModelOptions())
    prompts = [served.encode(messages) for messages in conversations(count)]
    load = Load()
    with served.worker._open() as session:
        for run in range(warmup + 1):
            before = time.process_time()
            waiting = iter(enumerate(prompts))
            running: list[Future[Completion]] = []
            done: list[Completion] = []
            while len(done) < count:
                for i, prompt in itertools.islice(waiting, at_once - len(running)):
                    request = Request(prompt, [sample_key(i, 0)])
                    running += session.submit(request, Sampling(new), served.stops, lambda token: None)
                session.step()
                done += [future.result() for future in running if future.done()]
                running = [future for future in running if not future.done()]
            if run == warmup:
                load.seconds = time.process_time() - before
                load.tokens = sum(len(c.input_ids) for c in done)
    return load


def load_case(options: argparse.Namespace) -> None:
    """Prints what 1, 16 and 64 requests at once give."""
    found: dict[tuple[str, int], list[Load]] = defaultdict(list)
    errors = {}
    for i in range(options.rounds):
        for name, server in SERVERS.items():
            try:
                with server(STORIES) as running:
                    for at_once in AT_ONCE if name == HTTP else AT_ONCE[1:2]:
                        asyncio.run(ask_all(running, at_once, at_once, 8))
                        load = asyncio.run(ask_all(running, at_once, max(options.count, at_once), options.new))
                        found[name, at_once].append(load)
                        say(f"load, round {i + 1} of {options.rounds}: {name}, {at_once} at once", load)
            except RuntimeError as error:
                if name == HTTP:
                    raise
                errors[name] = str(error)
        for at_once in AT_ONCE:
            flags = ["--worker", f"{SESSION} {at_once}", *common.flags(options, ["count", "new"])]
            meter = common.measure(__file__, flags)
            load = Load(meter.tokens, meter.seconds)
            found[SESSION, at_once].append(load)
            say(f"load, round {i + 1} of {options.rounds}: {SESSION}, {at_once} at once", load)
    print(common.markdown(load_table(found), LOAD_COLUMNS))
    for name, error in errors.items():
        print(f"\n{name} did not run: {error}")


LOAD_COLUMNS = (
    "contestant",
    "at once",
    "tokens / CPU s",
    "range",
    "ratio",
    "first token, ms: 50, 95 %",
    "between tokens, ms: 50, 95, 99 %",
    "whole answer, ms: 50, 95 %",
    "goal",
)


def load_table(found: dict[tuple[str, int], list[Load]]) -> list[list[str]]:
    """Rows of the table: ratios are to one at a time, or ours to another server's."""
    speeds = {key: statistics.median(load.speed for load in loads) for key, loads in found.items()}
    lines = []
    for (name, at_once), loads in found.items():
        of_others = name == TRANSFORMERS
        ratio = speeds[HTTP, at_once] / speeds[name, at_once] if of_others else speeds[name, at_once] / speeds[name, 1]
        goal = GOAL_BESIDE if of_others else GOALS[name]
        every = [load.speed for load in loads]
        lines.append(
            [
                name,
                str(at_once),
                f"{speeds[name, at_once]:,.0f}",
                f"{min(every):,.0f} to {max(every):,.0f}",
                f"ours is {ratio:.2f}x" if of_others else f"{ratio:.2f}x",
                percentiles([t for load in loads for t in load.first], 50, 95),
                percentiles([t for load in loads for t in load.gaps], 50, 95, 99),
                percentiles([t for load in loads for t in load.whole], 50, 95),
                at_least(goal, ratio) if at_once == AT_ONCE[1] else "",
            ]
        )
    return lines


# ---------------------------------------------------------------------------------------------- a long prompt joins


def save_long(folder: Path, options: argparse.Namespace) -> Path:
    """Saves a random Llama of a long context, with the tokenizer of stories260K."""
    tokenizer = load_tokenizer(STORIES)
    model = common.random_llama(common.llama_config(len(tokenizer), options.width, options.layers))
    model.save_pretrained(folder / "long")
    tokenizer.save_pretrained(folder / "long")
    return folder / "long"


async def gaps_while(server: Serving, options: argparse.Namespace, path: str, joining: dict[str, Any]) -> list[float]:
    """Returns the ordinary gap of a stream's tokens, the longest one while another request runs, and that one's time.

    Args:
        server: The server.
        options: How many streams run.
        path: Where the other request goes.
        joining: Its body.
    """
    times: list[list[float]] = [[] for _ in range(options.streams)]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)) as session:

        async def run(mine: list[float], i: int) -> None:
            body = {"model": server.model, "prompt": "Once", "max_tokens": 700, "min_tokens": 700, "stream": True}
            async with session.post(f"{server.url}/v1/completions", json={**body, "seed": i, "logprobs": 0}) as got:
                async for line in got.content:
                    if line.startswith(b"data: {"):
                        mine.append(time.perf_counter())

        streams = [asyncio.create_task(run(mine, i)) for i, mine in enumerate(times)]
        while min(map(len, times)) < 100:
            await asyncio.sleep(0.01)
        start = time.perf_counter()
        async with session.post(f"{server.url}{path}", json={"model": server.model, **joining}) as response:
            if response.status != 200:
                raise RuntimeError(await response.text())
            await response.read()
        end = time.perf_counter()
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    before = [b - a for mine in times for a, b in itertools.pairwise(mine) if b < start]
    after = [b - a for mine in times for a, b in itertools.pairwise(mine) if b > start and a < end]
    return [statistics.median(before), max(after), end - start]


def steps_while(model: Path, options: argparse.Namespace, tokens: list[int]) -> list[float]:
    """Returns the same in CPU seconds of the engine's steps, in this process: without what else the machine does."""
    torch.set_num_threads(1)
    served = load_served("long", str(model), ModelOptions())
    sampling = Sampling(700, min_new_tokens=700)
    with served.worker._open() as session:

        def step() -> float:
            before = time.process_time()
            session.step()
            return time.process_time() - before

        for i in range(options.streams):
            session.submit(Request(served.encode("Once"), [i]), sampling, served.stops)
        ordinary = [step() for _ in range(100)][50:]
        [joined] = session.submit(Request(tokens, [0]), Sampling(1), served.stops)
        during = []
        while not joined.done():
            during.append(step())
    return [statistics.median(ordinary), max(during), sum(during)]


def join_case(options: argparse.Namespace) -> None:
    """Prints how long a long prompt holds up running streams, and how long its log-probs do."""
    tokens = [3 + 7 * i % 500 for i in range(options.length)]
    cases = {
        "joins": {"prompt": tokens, "max_tokens": 1},
        "has its log-probs computed": {"prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 1},
    }
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        model = save_long(Path(folder), options)

        def over_http(body: dict[str, Any]) -> list[float]:
            with our_server(model) as server:
                return asyncio.run(gaps_while(server, options, "/v1/completions", body))

        what = f"a prompt of {options.length} tokens"
        runs = {f"{what} {name}, over HTTP": partial(over_http, body) for name, body in cases.items()}
        runs[f"{what} joins, in process, CPU time"] = lambda: steps_while(model, options, tokens)
        for name, run in runs.items():
            found = [run() for _ in range(options.rounds)]
            ordinary, longest, whole = (statistics.median(column) for column in zip(*found, strict=True))
            ratios = [b / a for a, b, _ in found]
            ratio = statistics.median(ratios)
            lines.append(
                [
                    name,
                    str(options.streams),
                    f"{1000 * ordinary:.1f}",
                    f"{1000 * longest:.1f}",
                    f"{ratio:.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
                    f"{1000 * whole:.0f}",
                    at_most(GOAL_GAP, ratio),
                ]
            )
    header = ("while", "streams", "ordinary gap, ms", "longest, ms", "in ordinary gaps", "answered in, ms", "goal")
    print(common.markdown(lines, header))


# ---------------------------------------------------------------------------------------------- a second turn


def turns_case(options: argparse.Namespace) -> None:
    """Prints how many tokens the model runs for the second turn of chats."""
    torch.set_num_threads(1)
    served = load_served("stories", str(STORIES), ModelOptions())
    new = ran = whole = 0
    counted: list[int] = []
    hook = served.policy.transformer.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: counted.append(args[0].numel())
    )
    with hook, served.worker._open() as session:

        def answer(messages: Any, seed: int) -> tuple[list[int], Completion]:
            ids = served.encode(messages)
            [future] = session.submit(Request(ids, [seed]), Sampling(40), served.stops)
            while session.busy:
                session.step()
            return ids, future.result()

        for seed, (first, after) in enumerate(zip(conversations(16), conversations(32)[16:], strict=True)):
            ids, one = answer(first, seed)
            turn = [*first, {"role": "assistant", "content": one.text.removeprefix(served.lead)}, *after]
            counted.clear()
            longer, two = answer(turn, seed)
            ran += sum(counted)
            whole += len(longer) + len(two.input_ids) - 1
            new += len(longer) - len(ids) - len(one.input_ids) + len(two.input_ids)
    ratio = ran / new
    print(
        common.markdown(
            [[str(whole), str(new), str(ran), f"{ratio:.2f}", at_most(GOAL_TURN, ratio)]],
            ("tokens of 16 second turns", "new ones", "run by the model", "ratio", "goal"),
        )
    )


# ---------------------------------------------------------------------------------------------- the command


def percentiles(seconds: Sequence[float], *at: int) -> str:
    """Percentiles in milliseconds."""
    if len(seconds) < 2:
        return ""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return ", ".join(f"{1000 * cuts[p - 1]:.1f}" for p in at)


def at_least(goal: float, value: float) -> str:
    """Whether a goal is met."""
    return f"{goal:g}x " + ("met" if value >= goal else f"short by {goal - value:.2f}x")


def at_most(goal: float, value: float) -> str:
    """Whether a goal is met that is an upper bound."""
    return f"at most {goal:g}x " + ("met" if value <= goal else f"over by {value - goal:.2f}x")


def say(what: str, load: Load) -> None:
    """Tells how far a run is."""
    print(f"{what}: {load.speed:,.0f} tokens a CPU second", file=sys.stderr, flush=True)


CASES = {"load": load_case, "join": join_case, "turns": turns_case}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = BenchmarkParser(
        __doc__, [f"{SESSION} {n}" for n in AT_ONCE], rounds=3, new=100, length=1000, width=256, layers=4
    )
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--count", type=int, default=64, help="answers per measurement; default: %(default)s")
    parser.add_argument("--streams", type=int, default=8, help="streams that a prompt joins; default: %(default)s")
    return parser.parse(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints a table per case."""
    options = parse(arguments)
    if options.worker:
        load = run_session(int(options.worker.split()[-1]), options.count, options.new)
        common.report(Meter(0, load.tokens, load.seconds))
        return
    for name, case in CASES.items():
        if options.case in (name, "all"):
            print(f"\n{name}\n")
            case(options)


if __name__ == "__main__":
    main()
