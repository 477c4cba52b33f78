"""Memory of GRPO, and of PPO on a shared backbone, beside fine-tuning of the same model with the same adapters.

    pip install -e .
    python benchmarks/memory.py                                  # a random Llama
    python benchmarks/memory.py --model smollm2-135m-instruct    # SmolLM2, fetched once

All have the same backbone in fp32 (but for QLoRA's) under LoRA of rank 16 on all linear layers, rows of the same length
and micro-batches of the same size; an iteration of PPO holds more than one. Each is measured in a process of its own,
on one thread: "extra MiB" is the most resident memory during the steps above that with models and optimizers made, "all
MiB" the same above that of the process with its libraries loaded, models and optimizers counted. glibc is told to give
large blocks back when they are freed, for all alike: left to itself it keeps holes between them, and what is resident
after several passes is twice what is alive (set MALLOC_MMAP_THRESHOLD_ to see so).

Contestants:
    sft         a step of SFTModule
    grpo        an iteration of GRPOModule with LoRA, without KL and so without a reference: the prompts' completions in
                groups of four
    ppo         an iteration of PPOModule with the shared backbone: sampling, scoring by a function, updates
    ppo-reward  the same with scores by a reward model that was trained as an adapter of the same backbone
    sft-nf4, sft-int8, ppo-nf4, ppo-int8    the same as sft and ppo by QLoRA, with the linear layers in 4 and 8 bits
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import common
import torch
from common import BenchmarkParser, Meter
from sft import word_tokenizer
from transformers import PreTrainedTokenizerBase

from lightning_rlhf import (
    GRPOModule,
    InstructionDataModule,
    Load,
    LoRA,
    PPOModule,
    PromptDataModule,
    RewardModule,
    Rollout,
    Sampling,
    SFTModule,
    Updates,
)
from lightning_rlhf.data.templates import set_chat_template
from lightning_rlhf.models import load_tokenizer
from lightning_rlhf.models.pretrained import obtain
from lightning_rlhf.models.quantization import Quantization
from lightning_rlhf.models.saving import save_pretrained

SFT = "sft"
GOALS = {"grpo": 1.1, "ppo": 1.4, "ppo-reward": 1.4}
"""Each should need at most so many times the extra memory of supervised fine-tuning."""
COLUMNS = ("contestant", "extra MiB", "of SFT's", "all MiB", "of SFT's", "goal")

# ---------------------------------------------------------------------------------------------- what they train on


class Task(NamedTuple):
    """The same for every contestant.

    Attributes:
        model: Directory of the backbone, with its tokenizer.
        rows: Prompts and answers, as many as an iteration has.
        settings: Of every module.
    """

    model: Path
    tokenizer: PreTrainedTokenizerBase
    rows: list[dict[str, str]]
    settings: dict[str, Any]
    folder: Path
    options: argparse.Namespace
    meter: Meter

    def texts(self) -> InstructionDataModule:
        """The rows, a micro-batch a step."""
        return InstructionDataModule(
            self.rows,
            batch_size=self.options.rows,
            val_fraction=0.0,
            cache_dir=self.folder / "cache",
            tokenizer=self.tokenizer,
        )

    def micro_batch_tokens(self) -> int:
        """Of the largest step of fine-tuning."""
        data = self.texts()
        data.setup("fit")
        return max(batch.num_tokens for batch in data.train_dataloader())


def make_task(options: argparse.Namespace, folder: Path, meter: Meter) -> Task:
    if options.model is None:
        model = folder / "model"
        tokenizer: PreTrainedTokenizerBase = word_tokenizer(options.vocab_size)
        set_chat_template(tokenizer, "plain")
        config = common.llama_config(len(tokenizer), options.width, options.layers, heads=8)
        common.random_llama(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
        words = [f"w{i}" for i in range(2, options.vocab_size)]
    else:
        model = Path(obtain(options.model, report=lambda line: print(line, file=sys.stderr)))
        tokenizer = load_tokenizer(model)
        words = sorted(w[1:] for w in tokenizer.get_vocab() if w[0] == "Ġ" and w[1:].isascii() and w[1:].isalpha())
    draw = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(f" {word}" for word in draw.choices(words, k=tokens))

    count = options.rows * options.micro_batches
    rows = [{"prompt": text(options.length), "completion": text(options.new - 1)} for _ in range(count)]
    settings = dict(lora=LoRA(r=16, alpha=32), optimizer=common.adamw, lr_scheduler=common.constant)
    return Task(model, tokenizer, rows, settings, folder, options, meter)


# ---------------------------------------------------------------------------------------------- contestants


def run_sft(task: Task, quantization: Quantization | None = None) -> None:
    module = SFTModule(task.model, task.tokenizer, load=Load(quantization=quantization), **task.settings)
    common.fit_ours(module, task.texts(), task.options.steps, common.Watch(task.meter))


def run_grpo(task: Task) -> None:
    options, group = task.options, min(4, len(task.rows))
    module = GRPOModule(
        task.model,
        first_letters,
        tokenizer=task.tokenizer,
        rollout=Rollout(group, Sampling(max_new_tokens=options.new, min_new_tokens=options.new)),
        updates=Updates(epochs=1, micro_batch_tokens=task.micro_batch_tokens()),
        **task.settings,
    )
    prompts = [{"prompt": row["prompt"]} for row in task.rows[::group]]
    data = PromptDataModule(prompts, batch_size=len(prompts), val_fraction=0.0, cache_dir=task.folder / "cache")
    tokens = len(prompts) * (options.length + group * options.new)
    common.fit_ours(module, data, options.steps, common.Watch(task.meter, tokens, "train/score"), clip=None)


def run_ppo(task: Task, reward: Any, quantization: Quantization | None = None) -> None:
    options = task.options
    module = PPOModule(
        task.model,
        reward,
        tokenizer=task.tokenizer,
        rollout=Rollout(sampling=Sampling(max_new_tokens=options.new, min_new_tokens=options.new)),
        updates=Updates(epochs=1, micro_batch_tokens=task.micro_batch_tokens()),
        load=Load(quantization=quantization),
        **task.settings,
    )
    data = PromptDataModule(
        [{"prompt": row["prompt"]} for row in task.rows],
        batch_size=len(task.rows),
        val_fraction=0.0,
        cache_dir=task.folder / "cache",
    )
    tokens = len(task.rows) * (options.length + options.new)
    common.fit_ours(module, data, options.steps, common.Watch(task.meter, tokens, "train/score"), clip=None)


def first_letters(prompts: list[Any], completions: list[str]) -> list[float]:
    """Scores that take no memory."""
    return [float(sum(map(ord, text[:2]))) for text in completions]


def make_reward_adapter(task: Task) -> None:
    """Leaves an untrained reward model's adapter."""
    module = RewardModule(task.model, task.tokenizer, **task.settings)
    module.configure_model()
    save_pretrained(module.model_to_export.model, task.tokenizer, task.folder / "reward", adapter_only=True)


CONTESTANTS: dict[str, Callable[[Task], None]] = {
    SFT: run_sft,
    "grpo": run_grpo,
    "ppo": lambda task: run_ppo(task, first_letters),
    "ppo-reward": lambda task: run_ppo(task, str(task.folder / "reward")),
    "sft-nf4": lambda task: run_sft(task, "nf4"),
    "sft-int8": lambda task: run_sft(task, "int8"),
    "ppo-nf4": lambda task: run_ppo(task, first_letters, "nf4"),
    "ppo-int8": lambda task: run_ppo(task, first_letters, "int8"),
}

# ---------------------------------------------------------------------------------------------- command


class FromStart(Meter):
    """Counts models and optimizers too: its base is what the process holds when it is made."""

    def __init__(self, warmup: int) -> None:
        super().__init__(warmup)
        super().ready()
        self.start_mib = self.base_mib

    def ready(self) -> None:
        """Forgets the peak of loading."""
        super().ready()
        self.base_mib = self.start_mib


def rows(extra: Mapping[str, list[Meter]], whole: Mapping[str, list[Meter]]) -> list[list[str]]:
    """Rows of the table: medians, and where one needs too much."""

    def medians(found: Mapping[str, list[Meter]]) -> dict[str, float]:
        return {name: statistics.median(m.extra_mib for m in meters) for name, meters in found.items()}

    steps, everything = medians(extra), medians(whole)
    lines = []
    for name in steps:
        line = [name, f"{steps[name]:,.0f}", "", f"{everything[name]:,.0f}", "", ""]
        if name != SFT:
            ratio = steps[name] / steps[SFT]
            line[2], line[4] = f"{ratio:.2f}x", f"{everything[name] / everything[SFT]:.2f}x"
        if name in GOALS:
            goal = GOALS[name]
            line[5] = f"{goal}x " + ("met" if ratio <= goal else f"over by {ratio - goal:.2f}x")
        lines.append(line)
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    sizes = dict(rows=8, length=96, new=32, vocab_size=32_000, width=512, layers=8)
    parser = BenchmarkParser(__doc__, CONTESTANTS, rounds=1, steps=2, **sizes)
    parser.add_argument("--model", help="a directory, or smollm2-135m-instruct (downloaded once); default: a Llama")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--micro-batches", type=int, default=2, help="micro-batches per step; default: %(default)s")
    parser.add_argument("--from-start", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse(arguments)
    if SFT not in options.contestants:
        parser.error(f"--contestants must include {SFT}, with which the others are compared.")
    if options.steps < 2:
        parser.error("--steps must be at least 2, because the first step is the warm-up.")
    return options


def work(options: argparse.Namespace) -> None:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    if options.worker.endswith(("nf4", "int8")):
        importlib.import_module("bitsandbytes")  # a library, as the others that are loaded by now
    meter = FromStart(1) if options.from_start else Meter(1)
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(options, Path(folder), meter)
        if options.worker == "ppo-reward":
            make_reward_adapter(task)
        CONTESTANTS[options.worker](task)
    task.meter.finish()
    common.report(task.meter)


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the table."""
    options = parse(arguments)
    if options.worker:
        work(options)
        return
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**16))  # of the workers
    passed = ["model", "steps", "rows", "micro_batches", "length", "new", "vocab_size", "width", "layers"]
    flags = common.flags(options, passed)
    extra, whole = (
        common.alternate(__file__, options.contestants, options.rounds, [*flags, *more], "memory")
        for more in ([], ["--from-start"])
    )
    print(common.markdown(rows(extra, whole), COLUMNS))


if __name__ == "__main__":
    main()
