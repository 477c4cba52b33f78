"""Speed and memory of reward modelling, beside TRL's RewardTrainer and a bare PyTorch loop.

    pip install -e '.[demo,bench]'
    python benchmarks/reward.py                  # all peers, one table
    python benchmarks/reward.py --peers bare     # without TRL

Every contestant trains the same random Llama classifier (width 256, 4 layers, fp32, head and all) on the same pairs in
the same steps with the same AdamW, rate, clipping and number of steps, on one thread. They take turns, each time in a
process of its own. The figure is pairs a CPU second after a warm-up; "extra MiB" is the most resident memory during the
steps above that with model and optimizer made; "loss differs by" compares the losses of every step. Pairs of which a
prompt with its answer is over the length are left out for all. Progress counts the tokens of the trees: a prompt once,
both answers, no padding.

Contestants:
    ours       Trainer.fit(RewardModule(...), PreferenceDataModule(...))
    bare       a PyTorch loop: chosen and rejected in one padded batch, model(...).logits, logsigmoid, backward, step
    trl        RewardTrainer as it comes, but in fp32 as the others (it would take bf16)
    trl-fast   RewardTrainer without gradient checkpointing
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import common
import torch
from common import OURS, BenchmarkParser, Goal, Meter
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerBase

from lightning_rlhf import PreferenceDataModule, RewardModule
from lightning_rlhf.data.packed import unpack
from lightning_rlhf.data.templates import stop_token_ids
from lightning_rlhf.models import load_tokenizer
from lightning_rlhf.models.pretrained import SMOLLM2, obtain
from lightning_rlhf.models.reward import set_distinct_pad_token

TITLE = "preferences"
GOALS = {"trl": Goal(2.0, 1.0)}
COLUMNS = tuple("pairs / CPU s" if name == "tokens / CPU s" else name for name in common.COLUMNS)

# ---------------------------------------------------------------------------------------------- what they train on


class Task(NamedTuple):
    """The same for every contestant."""

    model: LlamaForSequenceClassification
    tokenizer: PreTrainedTokenizerBase
    data: PreferenceDataModule
    steps: int
    meter: Meter


class Step(NamedTuple):
    """One of our batches, for the others.

    Attributes:
        tokens: Of its trees, a prompt once.
        chosen: Prompt and better answer of each pair.
        rejected: Prompt and worse answer.
    """

    tokens: int
    chosen: list[list[int]]
    rejected: list[list[int]]

    @property
    def rectangle(self) -> int:
        """Tokens of the padded batch, padding counted."""
        rows = self.chosen + self.rejected
        return len(rows) * max(map(len, rows))


def make_data(options: argparse.Namespace) -> PreferenceDataModule:
    """The pairs, with a tokenizer whose pad token ends no answer: classifiers skip it to find the last token."""
    tokenizer = load_tokenizer(obtain(options.tokenizer, report=lambda line: print(line, file=sys.stderr)))
    set_distinct_pad_token(tokenizer, stop_token_ids(tokenizer))
    return PreferenceDataModule(
        options.data,
        batch_size=2 * options.pairs,
        max_length=options.length,
        on_bad_row="skip",  # over the length
        val_fraction=0.0,
        cache_dir=options.cache,
        tokenizer=tokenizer,
    )


def make_task(options: argparse.Namespace) -> Task:
    data = make_data(options)
    config = common.llama_config(len(data.tokenizer), options.width, options.layers)
    config.num_labels, config.pad_token_id = 1, data.tokenizer.pad_token_id
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).train()
    return Task(model, data.tokenizer, data, options.warmup + options.steps, Meter(options.warmup))


def batches(data: PreferenceDataModule, steps: int) -> Iterator[Step]:
    """The pairs that ours sees, step by step, at most an epoch of them."""
    data.setup("fit")
    for batch in itertools.islice(data.train_dataloader(), steps):
        chosen, rejected = [], []
        for tree in unpack(batch):
            answers = [[*tree.prompt, *branch.input_ids] for branch in tree.branches]
            chosen += [answers[pair.better] for pair in tree.pairs]
            rejected += [answers[pair.worse] for pair in tree.pairs]
        yield Step(batch.num_tokens, chosen, rejected)


# ---------------------------------------------------------------------------------------------- contestants


def run_ours(task: Task) -> None:
    module = RewardModule(task.model, task.tokenizer, optimizer=common.adamw, lr_scheduler=common.constant)
    common.fit_ours(module, task.data, task.steps, common.Watch(task.meter))


def run_bare(task: Task) -> None:
    model, optimizer = task.model, common.adamw(task.model.parameters())
    pad: Any = task.tokenizer.pad_token_id
    steps = list(batches(task.data, task.steps))
    task.meter.ready()
    for step in steps:
        rows = step.chosen + step.rejected
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        chosen, rejected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].chunk(2)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), common.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        task.meter.step(step.tokens, loss)


def run_trl(task: Task, **settings: Any) -> None:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    steps = list(batches(task.data, task.steps))

    pairs = [pair for step in steps for pair in zip(step.chosen, step.rejected, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = common.watched(RewardTrainer, task.meter, [step.tokens for step in steps])(
            model=task.model,
            args=RewardConfig(
                folder,
                per_device_train_batch_size=len(steps[0].chosen),
                max_steps=task.steps,
                max_length=None,  # longer rows were left out already
                train_sampling_strategy="sequential",
                max_grad_norm=common.CLIP,
                lr_scheduler_type="constant",
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=Dataset.from_list([dict(chosen_ids=c, rejected_ids=r) for c, r in pairs]),
            processing_class=task.tokenizer,
            optimizers=(common.adamw(task.model.parameters()), None),
        )
        trainer.train()


PEERS: dict[str, Callable[[Task], None]] = {
    "bare": run_bare,
    "trl": run_trl,
    "trl-fast": lambda task: run_trl(task, gradient_checkpointing=False),
}

# ---------------------------------------------------------------------------------------------- command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = BenchmarkParser(__doc__, [OURS, *PEERS], rounds=3, steps=8, warmup=2, length=1024, width=256, layers=4)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--data", default=str(common.ASSETS / "data" / "preference.jsonl"), help="default: %(default)s")
    parser.add_argument("--tokenizer", default=SMOLLM2, help="a directory, or %(default)s (downloaded once)")
    parser.add_argument("--pairs", type=int, default=8, help="pairs per step; default: %(default)s")
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse(arguments)
    return options


def work(options: argparse.Namespace) -> None:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    task = make_task(options)
    (run_ours if options.worker == OURS else PEERS[options.worker])(task)
    task.meter.finish()
    common.report(task.meter)


def rows(found: dict[str, list[Meter]], pairs: int) -> list[list[str]]:
    """Rows of the table, its speeds in pairs: all contestants saw the same number of them."""
    lines = common.rows(TITLE, found, GOALS)
    for line, meters in zip(lines, found.values(), strict=True):
        speeds = [pairs / m.seconds for m in meters]
        line[2:4] = [f"{statistics.median(speeds):.2f}", f"{min(speeds):.2f} to {max(speeds):.2f}"]
    return lines


def describe(steps: Sequence[Step]) -> str:
    """How much there is to save: what padding and repeated prompts add to the trees."""
    tokens, rectangle = sum(s.tokens for s in steps), sum(s.rectangle for s in steps)
    pairs = sum(len(s.chosen) for s in steps)
    return (
        f"{len(steps)} steps, {pairs} pairs, {tokens} tokens; the padded batches hold {rectangle / tokens:.2f} times "
        "as many."
    )


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the table."""
    options = parse(arguments)
    if options.worker:
        work(options)
        return
    common.require_trl(options.peers, "--peers bare")
    passed = ["steps", "warmup", "data", "tokenizer", "pairs", "length", "width", "layers", "cache"]
    with tempfile.TemporaryDirectory() as options.cache:  # tokenized here, once for all workers
        steps = list(batches(make_data(options), options.warmup + options.steps))
        full = sum(len(step.chosen) == options.pairs for step in steps)
        if full < options.warmup + options.steps:
            sys.exit(f"{options.data} fills {full} steps of {options.pairs} pairs; lower --steps.")
        measured = steps[options.warmup :]
        flags = common.flags(options, passed)
        found = common.alternate(__file__, [OURS, *options.peers], options.rounds, flags, TITLE)
    print(common.markdown(rows(found, sum(len(step.chosen) for step in measured)), COLUMNS))
    print(f"\n{describe(measured)}")


if __name__ == "__main__":
    main()
