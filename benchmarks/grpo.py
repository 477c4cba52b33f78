"""Speed and memory of GRPO, beside TRL's GRPOTrainer.

    pip install -e '.[demo,bench]'
    python benchmarks/grpo.py                                # all cases, a table
    python benchmarks/grpo.py --cases eight --rounds 1
    python benchmarks/grpo.py --plot                         # costs against sizes, to docs/images

Both train the same random Llama (width 256, 4 layers, fp32, without gradient checkpointing) by DAPO's loss on the same
prompts in the same steps, with the same AdamW, rate, clipping and number of steps, on one thread. They take turns, each
time in a process of its own. Each samples completions of a fixed length as it does; then both are given the same ones,
drawn at random, so that they learn from the same tokens and their gradients can be compared. The figures are CPU
seconds of a step after a warm-up: "iteration" is all of it, "update" is all but the sampling. "extra MiB" is the most
resident memory during the steps above that with model and optimizer made; "gradients differ by" compares the norms of
all steps.

Cases:
    eight      2 prompts of 384 tokens, 8 completions of 64 tokens each
    sixteen    1 prompt, 16 completions
    many       1 prompt, 64 completions
    short      4 prompts of 96 tokens, 4 completions of 32 tokens each: least to save
    varied     2 prompts of up to 384 tokens, 16 completions of 8 to 64 tokens each; nothing is sampled

Contestants:
    ours       Trainer.fit(GRPOModule(...), PromptDataModule(...))
    trl        GRPOTrainer without gradient checkpointing, in fp32 as ours (it would take bf16)

``--plot`` measures updates of one prompt in our two layouts, a tree, and padded rows, each of which repeats the prompt,
and by TRL if it is installed, which takes no group of one. One size varies at a time: completions of the prompt, its
tokens, the vocabulary, the model's width.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import common
import torch
from common import OURS, BenchmarkParser, Goal, Meter
from sft import word_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from lightning_rlhf import GRPOModule, Load, PromptDataModule, Rollout, Sampling, Updates
from lightning_rlhf.rollout import CachedEngine, Completion, Request

TRL = "trl"
RESULTS = Path(__file__).parent / "results" / "costs.jsonl"
GRADIENT = "train/policy_grad_norm"


class Case(NamedTuple):
    """What a step trains on, and what ours should reach.

    Attributes:
        prompts: Prompts of a step.
        samples: Completions of each.
        length: Tokens of a prompt; where they vary, the most.
        new: Tokens of a completion; where they vary, the most.
        update: How many times as fast our update should be.
        iteration: How many times as fast our iteration should be; None: there is no aim.
        varied: Prompts have a third of the length or more, completions an eighth.
        sampled: Completions are sampled, before others take their place.
    """

    prompts: int
    samples: int
    length: int
    new: int
    update: float
    iteration: float | None
    varied: bool = False
    sampled: bool = True

    def __str__(self) -> str:
        size = f"{self.prompts} x {self.samples} of {self.length} + {self.new}"
        return f"{size}, varied" if self.varied else size


CASES = {
    "eight": Case(2, 8, 384, 64, 3.0, 2.4),
    "sixteen": Case(1, 16, 384, 64, 4.0, 2.8),
    "many": Case(1, 64, 384, 64, 4.5, 3.5),
    "short": Case(4, 4, 96, 32, 1.7, None),
    "varied": Case(2, 16, 384, 64, 5.0, None, varied=True, sampled=False),
}
MEMORY = 1 / 3
#: What the plot varies, one at a time: else 8 completions of 64 tokens, a prompt of 384, and the options' sizes.
SIZES = {
    "completions": (1, 2, 4, 8, 16, 32, 64),
    "prompt": (24, 96, 384, 1536),
    "vocabulary": (1_000, 8_000, 32_000, 152_000),
    "width": (64, 128, 256, 512),
}

# ---------------------------------------------------------------------------------------------- what they train on


class Task(NamedTuple):
    """The same for every contestant.

    Attributes:
        prompts: As many as all steps take, none twice.
        completions: Token ids of each prompt's.
    """

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    prompts: list[str]
    completions: dict[str, list[list[int]]]
    case: Case
    steps: int
    folder: Path
    meter: Meter

    @property
    def tokens(self) -> int:
        """Of a step: prompts once; the mean over all steps where lengths vary."""
        every = [len(prompt.split()) + sum(map(len, self.completions[prompt])) for prompt in self.prompts]
        return sum(every) // self.steps

    def data(self) -> PromptDataModule:
        """The prompts, batch by batch."""
        rows = [{"prompt": prompt} for prompt in self.prompts]
        return PromptDataModule(
            rows,
            as_text=True,
            batch_size=self.case.prompts,
            val_fraction=0.0,
            cache_dir=self.folder / "cache",
            tokenizer=self.tokenizer,
        )

    def batches(self) -> list[list[str]]:
        """What ours sees, step by step: one epoch."""
        data = self.data()
        data.setup("fit")
        return [list(map(str, batch.messages)) for batch in data.train_dataloader()]


def make_task(case: Case, options: argparse.Namespace, folder: Path) -> Task:
    draw, steps = random.Random(0), options.warmup + options.steps

    def words(most: int, part: int) -> list[int]:
        size = draw.randint(most // part, most) if case.varied else most
        return [draw.randrange(2, options.vocab_size) for _ in range(size)]

    prompts = [" ".join(f"w{i}" for i in words(case.length, 3)) for _ in range(case.prompts * steps)]
    completions = {prompt: [words(case.new, 8) for _ in range(case.samples)] for prompt in prompts}
    tokenizer = word_tokenizer(options.vocab_size)
    model = common.random_llama(common.llama_config(len(tokenizer), options.width, options.layers))
    return Task(model, tokenizer, prompts, completions, case, steps, folder, Meter(options.warmup))


def by_words(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Scores that differ within a group, and take no time."""
    return [int(text.split()[0][1:]) % 97 / 97 for text in completions]


# ---------------------------------------------------------------------------------------------- contestants


class Given:
    """Our engine, whose completions are thrown away for the task's."""

    def __init__(self, task: Task) -> None:
        self.task, self.engine = task, CachedEngine()

    def generate(
        self,
        policy: Any,
        tokenizer: Any,
        requests: Sequence[Request],
        sampling: Sampling,
        stop_token_ids: Sequence[int],
    ) -> list[list[Completion]]:
        """As an engine does."""
        if self.task.case.sampled:
            with self.task.meter.rollout():
                self.engine.generate(policy, tokenizer, requests, sampling, stop_token_ids)
        given = [self.task.completions[tokenizer.decode(request.prompt)] for request in requests]
        return [[Completion(c, [0.0] * len(c), tokenizer.decode(c), "length") for c in group] for group in given]


def run_ours(task: Task, layout: Literal["auto", "padded"] = "auto", algorithm: str = "dapo") -> None:
    new = task.case.new
    module = GRPOModule(
        task.model,
        by_words,
        algorithm,
        task.tokenizer,
        engine=Given(task),
        rollout=Rollout(task.case.samples, Sampling(max_new_tokens=new, min_new_tokens=new)),
        updates=Updates(epochs=1, max_grad_norm=common.CLIP),
        load=Load(layout=layout),
        optimizer=common.adamw,
        lr_scheduler=common.constant,
    )
    common.fit_ours(module, task.data(), task.steps, common.Watch(task.meter, task.tokens, GRADIENT), clip=None)


def run_trl(task: Task) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    case = task.case

    class GivenTrainer(common.watched(GRPOTrainer, task.meter, [task.tokens] * task.steps)):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            if case.sampled:
                with task.meter.rollout():
                    super()._generate_single_turn(prompt_ids, *args, **kwargs)
            groups = [self.processing_class.decode(ids) for ids in prompt_ids[:: case.samples]]
            return [completion for prompt in groups for completion in task.completions[prompt]], None

    rows = [{"prompt": prompt} for batch in task.batches() for prompt in batch]
    trainer = GivenTrainer(
        model=task.model,
        reward_funcs=by_words,
        args=GRPOConfig(
            str(task.folder / "trl"),
            loss_type="dapo",
            epsilon=0.2,
            epsilon_high=0.28,
            beta=0.0,
            num_generations=case.samples,
            per_device_train_batch_size=case.prompts * case.samples,
            max_completion_length=case.new,
            generation_kwargs={"min_new_tokens": case.new},
            max_steps=task.steps,
            shuffle_dataset=False,
            max_grad_norm=common.CLIP,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=task.tokenizer,
        optimizers=(common.adamw(task.model.parameters()), None),
    )
    trainer.train()
    # losses of a first update are the same whatever the model is
    task.meter.losses = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


CONTESTANTS: dict[str, Callable[[Task], None]] = {OURS: run_ours, TRL: run_trl}

# ---------------------------------------------------------------------------------------------- the table

COLUMNS = (
    "case",
    "part",
    "ours, CPU s",
    "TRL, CPU s",
    "TRL / ours",
    "in the rounds",
    "aim",
    "extra MiB: ours, TRL",
    "ours needs",
    "gradients differ by",
)


def rows(case: Case, found: dict[str, list[Meter]], steps: int) -> list[list[str]]:
    """Rows of the table: medians of update and iteration, and where ours falls short."""
    ours, theirs = found[OURS], found[TRL]
    memory = [statistics.median(m.extra_mib for m in meters) for meters in (ours, theirs)]
    parts = {"update": (case.update, lambda m: (m.seconds - m.sampling) / steps)}
    if case.sampled:
        parts["iteration"] = (case.iteration, lambda m: m.seconds / steps)
    lines = []
    for part, (goal, seconds) in parts.items():
        mine, other = ([seconds(m) for m in meters] for meters in (ours, theirs))
        ratio, ratios = (
            statistics.median(other) / statistics.median(mine),
            [b / a for a, b in zip(mine, other, strict=True)],
        )
        verdict = "" if goal is None else common.verdict(Goal(goal), ratio, 0.0)
        line = [str(case), part, f"{statistics.median(mine):.2f}", f"{statistics.median(other):.2f}", f"{ratio:.2f}x"]
        lines.append([*line, f"{min(ratios):.2f} to {max(ratios):.2f}", verdict, "", "", ""])
    share = memory[0] / memory[1]
    lines[0][6] += f", {common.verdict(Goal(None, round(MEMORY, 2)), 0.0, share)}"
    lines[0][7:] = [f"{memory[0]:,.0f}, {memory[1]:,.0f}", f"{share:.2f}x"]
    lines[0].append(f"{max(common.loss_difference(a, b) for a, b in zip(ours, theirs, strict=True)):.0e}")
    return lines


# ---------------------------------------------------------------------------------------------- the plot


def measure_costs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """CPU seconds of an update per completion against each of :data:`SIZES`, in both layouts and TRL; they take turns.

    The point that several of the sizes have in common is measured once.
    """
    points, known = [], dict[tuple[int, ...], dict[str, float]]()
    for varied, sizes in SIZES.items():
        for size in sizes:
            usual = {"completions": 8, "prompt": 384, "vocabulary": options.vocab_size, "width": options.width}
            at = usual | {varied: size}
            place = tuple(at.values())
            if place not in known:
                known[place] = _costs_at(argparse.Namespace(**at), options)
            points.append({"varied": varied, "size": size, **known[place]})
            print(json.dumps(points[-1]), file=sys.stderr, flush=True)
    return points


def _costs_at(at: argparse.Namespace, options: argparse.Namespace) -> dict[str, float]:
    case = Case(1, at.completions, at.prompt, 64, 0.0, None, sampled=False)
    sized = argparse.Namespace(**vars(options) | {"vocab_size": at.vocabulary, "width": at.width})
    ways: dict[str, Callable[[Task], None]] = {
        "tree": lambda task: run_ours(task, "auto", "reinforce++"),  # one that takes a single completion too
        "padded": lambda task: run_ours(task, "padded", "reinforce++"),
    }
    if at.completions > 1 and importlib.util.find_spec("trl") is not None:
        ways[TRL] = run_trl
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, run in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                task = make_task(case, sized, Path(folder))
                run(task)
            times[name].append(task.meter.seconds / options.steps / at.completions)
    return {name: statistics.median(each) for name, each in times.items()}


# ---------------------------------------------------------------------------------------------- command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    sizes = dict(vocab_size=1024, width=256, layers=4)
    parser = BenchmarkParser(__doc__, CONTESTANTS, rounds=3, steps=2, warmup=1, **sizes)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--plot", action="store_true", help="measure and draw costs against sizes instead")
    parser.add_argument("--case", choices=CASES, default="eight", help=argparse.SUPPRESS)
    return parser.parse(arguments)


def work(options: argparse.Namespace) -> None:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(CASES[options.case], options, Path(folder))
        CONTESTANTS[options.worker](task)
    task.meter.finish()
    common.report(task.meter)


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the table or draws the plot."""
    options = parse(arguments)
    if options.worker:
        work(options)
        return
    if options.plot:
        import plots

        torch.set_num_threads(1)
        points = measure_costs(options)
        RESULTS.write_text(json.dumps({"study": "costs", "seed": 0, "costs": points}) + "\n")
        plots.costs(plots.read_runs(RESULTS), plots.IMAGES / "costs.svg")
        return
    common.require_trl([TRL], "--plot")
    passed = ["steps", "warmup", "vocab_size", "width", "layers"]
    lines = []
    for name in options.cases:
        flags = [*common.flags(options, passed), "--case", name]
        found = common.alternate(__file__, [OURS, TRL], options.rounds, flags, name)
        lines += rows(CASES[name], found, options.steps)
    print(common.markdown(lines, COLUMNS))


if __name__ == "__main__":
    main()
