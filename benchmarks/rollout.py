"""Speed and memory of the rollout engine, beside transformers' generate at the same number of rows.

    pip install -e '.[demo]'
    python benchmarks/rollout.py                    # all cases, one table
    python benchmarks/rollout.py --case llama       # one case

Each contestant samples the same number of completions of the same prompts at temperature 1, in fp32 on one thread. They
take turns, each time in a process of its own. The figure is sampled tokens a CPU second after a warm-up; "extra MiB"
is the most resident memory meanwhile, above that with the model made.

Contestants:
    ours        CachedEngine(max_rows=...), which also keeps log-probs and text
    generate    model.generate(...) on batches of as many prompts as fill the rows, padded on the left
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import common
import torch
from common import OURS, BenchmarkParser, Goal, Meter
from transformers import GenerationConfig, PreTrainedTokenizerFast

from lightning_rlhf.models import Policy, load_causal_lm
from lightning_rlhf.models.pretrained import SMOLLM2, obtain
from lightning_rlhf.rollout import CachedEngine, Request, Sampling, sample_key

GENERATE = "generate"
STORY = (
    "Once upon a time there was a little girl named Lily who loved to play outside with her dog Tom. One day they went "
    "to the park and saw a big red ball under a tall tree. The ball was not theirs, so they looked for the boy who had "
    "lost it. Can you tell what happened then, and what they learned from that day? "
)


class Case(NamedTuple):
    """What is sampled.

    Attributes:
        model: stories260K, a model of :func:`obtain`, or None for a random Llama.
        prompts: How many.
        shortest: Fewest tokens of one; lengths are spread evenly.
        longest: Most.
        samples: Completions a prompt.
        new: Most tokens of one.
        rows: Of a batch at most.
        ends: Whether the tokenizer's end of text stops a completion.
        goal: What ours should reach against ``generate``.
    """

    model: str | None
    prompts: int
    shortest: int
    longest: int
    samples: int
    new: int
    rows: int
    ends: bool
    goal: float


CASES = {
    "smollm2": Case(SMOLLM2, 8, 16, 130, 4, 48, 16, False, 1.75),
    "llama": Case(None, 8, 4, 60, 8, 64, 32, False, 2.2),
    "stories": Case("stories260K", 16, 4, 60, 8, 400, 128, True, 2.5),
    "group": Case(None, 4, 384, 384, 16, 64, 64, False, 2.2),
    "many": Case(None, 1, 384, 384, 64, 64, 64, False, 4.0),
}


class Task(NamedTuple):
    """The same for every contestant."""

    policy: Policy
    tokenizer: PreTrainedTokenizerFast
    prompts: list[list[int]]
    stops: list[int]
    case: Case
    meter: Meter


def make_task(options: argparse.Namespace) -> Task:
    case = CASES[options.case]
    changes = {name: getattr(options, name) for name in ("model", "new", "rows") if getattr(options, name) is not None}
    case = case._replace(**changes)
    stories = common.ROOT / "tests" / "assets" / "stories260K"
    if case.model is None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(stories)  # for its text alone
        config = common.llama_config(4096, options.width, options.layers, heads=8)
        config.num_key_value_heads = 4
        model = common.random_llama(config)
        draw = random.Random(0)
        ids = [draw.randrange(3, len(tokenizer)) for _ in range(case.longest + case.prompts)]
    else:
        name = obtain(case.model, report=lambda line: print(line, file=sys.stderr))
        folder = stories if case.model == "stories260K" else name
        tokenizer, model = PreTrainedTokenizerFast.from_pretrained(folder), load_causal_lm(folder)
        ids = tokenizer(STORY * 4).input_ids
    step = (case.longest - case.shortest) / max(1, case.prompts - 1)
    lengths = [case.shortest + round(step * (7 * i % case.prompts)) for i in range(case.prompts)]
    prompts = [ids[i : i + length] for i, length in enumerate(lengths)]
    stops = [tokenizer.eos_token_id, tokenizer.bos_token_id] if case.ends else []
    return Task(Policy(model.eval()), tokenizer, prompts, stops, case, Meter(options.warmup))


def rollout_ours(task: Task, iteration: int) -> list[list[int]]:
    requests = [
        Request(prompt, [sample_key(iteration, i, j) for j in range(task.case.samples)])
        for i, prompt in enumerate(task.prompts)
    ]
    engine, sampling = CachedEngine(max_rows=task.case.rows), Sampling(max_new_tokens=task.case.new)
    groups = engine.generate(task.policy, task.tokenizer, requests, sampling, task.stops)
    return [completion.input_ids for group in groups for completion in group]


def rollout_generate(task: Task, iteration: int) -> list[list[int]]:
    case, found = task.case, []
    torch.manual_seed(iteration)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=case.samples,
        max_new_tokens=case.new,
        eos_token_id=task.stops or None,
        pad_token_id=0,
    )
    at_once = max(1, case.rows // case.samples)
    with task.policy.native_attention(), torch.no_grad():
        model = task.policy.transformer
        model.generation_config.eos_token_id = settings.eos_token_id  # it would be fallen back on
        for start in range(0, len(task.prompts), at_once):
            part = task.prompts[start : start + at_once]
            longest = max(map(len, part))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part])
            out = model.generate(ids, attention_mask=mask, generation_config=settings)
            for row in out[:, longest:].tolist():
                end = next((i + 1 for i, token in enumerate(row) if token in task.stops), len(row))
                found.append(row[:end])
    return found


CONTESTANTS = {OURS: rollout_ours, GENERATE: rollout_generate}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = BenchmarkParser(__doc__, CONTESTANTS, rounds=3, warmup=1, new=None, rows=None, width=256, layers=4)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=2, help="measured rollouts per round; default: %(default)s")
    parser.add_argument("--model", help="another model's directory, or smollm2-135m-instruct (downloaded once)")
    options = parser.parse(arguments)
    return options


def work(options: argparse.Namespace) -> None:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    task = make_task(options)
    task.meter.ready()
    for iteration in range(options.warmup + options.repeats):
        completions = CONTESTANTS[options.worker](task, iteration)
        task.meter.step(sum(map(len, completions)), torch.zeros(()))  # nothing is learned
    task.meter.finish()
    common.report(task.meter)


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the table."""
    options = parse(arguments)
    if options.worker:
        work(options)
        return
    passed = ["repeats", "warmup", "model", "new", "rows", "width", "layers"]
    flags = common.flags(options, passed)
    lines = []
    for case in CASES if options.case == "all" else [options.case]:
        found = common.alternate(__file__, list(CONTESTANTS), options.rounds, ["--case", case, *flags], case)
        lines += common.rows(case, found, {GENERATE: Goal(CASES[case].goal)})
    no_loss = common.COLUMNS.index("loss differs by")
    table = [[*line[:no_loss], *line[no_loss + 1 :]] for line in (common.COLUMNS, *lines)]
    print(common.markdown(table[1:], table[0]))


if __name__ == "__main__":
    main()
