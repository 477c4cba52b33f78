"""Speed and memory of supervised fine-tuning, beside TRL's SFTTrainer and a bare PyTorch loop.

    pip install -e '.[demo,bench]'
    python benchmarks/sft.py                                # all cases against all peers, one table
    python benchmarks/sft.py --case varied --peers bare     # one case; without TRL
    python benchmarks/sft.py --case fixed --profile         # where the time of a step goes, of ours and the bare loop

Every contestant trains the same random Llama (width 256, 4 layers, fp32) on the same batches in the same order with the
same AdamW, rate, clipping and number of steps, on one thread. They take turns, each time in a process of its own. The
figure is real tokens (no padding) a CPU second after a warm-up; "extra MiB" is the most resident memory during the
steps above that with model and optimizer made; "loss differs by" compares the losses of every step.

Contestants:
    ours       Trainer.fit(SFTModule(...), InstructionDataModule(...))
    bare       a PyTorch loop: a padded batch, model(...).loss, backward, step
    trl        SFTTrainer as it comes, but in fp32 as the others (it would take bf16)
    trl-fast   SFTTrainer without gradient checkpointing
    trl-flat   the same and padding-free
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import common
import lightning.pytorch as L
import torch
from common import OURS, BenchmarkParser, Goal, Meter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_rlhf import InstructionDataModule, SFTModule
from lightning_rlhf.data.packed import unpack
from lightning_rlhf.metrics import StageMetrics
from lightning_rlhf.models import load_tokenizer
from lightning_rlhf.models.pretrained import SMOLLM2, obtain

IGNORED = -100


class Case(NamedTuple):
    """What is trained on.

    Attributes:
        batch_size: Sequences of a step.
        length: Most tokens of a sequence.
        shortest: Fewest.
        vocab_size: Of the made-up vocabulary; None takes real data and a real tokenizer.
        goals: What ours should reach.
        steps: Measured in a round; real data takes seconds a step.
    """

    batch_size: int
    length: int
    shortest: int
    vocab_size: int | None
    goals: dict[str, Goal]
    steps: int = 8


CASES = {
    "fixed": Case(8, 128, 128, 1024, {"bare": Goal(1.0)}),
    "varied": Case(8, 256, 64, 1024, {"trl": Goal(1.7)}),
    "real": Case(8, 1024, 2, None, {"trl": Goal(1.8)}, steps=4),
    "vocab": Case(4, 128, 128, 32_000, {"trl": Goal(1.7, 0.5)}),
}

# ---------------------------------------------------------------------------------------------- what they train on


class Task(NamedTuple):
    """The same for every contestant."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    data: InstructionDataModule
    steps: int
    meter: Meter


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word a token: word ``w7`` has id 7."""
    words = {"<unk>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocab_size)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = "{{ messages[0]['content'] }}"  # never used, and SFTModule asks for one
    return fast


def word_rows(case: Case, count: int) -> list[dict[str, str]]:
    """Random texts of the case's lengths, the end token counted; every token but the first is scored."""
    draw = random.Random(0)
    sizes = [draw.randint(case.shortest, case.length) - 1 for _ in range(count)]
    return [{"text": " ".join(f"w{draw.randrange(2, case.vocab_size or 3)}" for _ in range(n))} for n in sizes]


def make_task(options: argparse.Namespace, cache: str) -> Task:
    case = CASES[options.case]
    length = options.length or case.length
    case = case._replace(length=length, shortest=case.shortest * length // case.length)
    steps = options.warmup + (options.steps or case.steps)
    source: Any
    if case.vocab_size is None:
        tokenizer = load_tokenizer(obtain(options.tokenizer, report=lambda line: print(line, file=sys.stderr)))
        source = str(common.ASSETS / "data" / "sft.jsonl")
    else:
        case = case._replace(vocab_size=options.vocab_size or case.vocab_size)
        tokenizer = word_tokenizer(case.vocab_size)
        source = word_rows(case, steps * case.batch_size)
    data = InstructionDataModule(
        source,
        batch_size=case.batch_size,
        max_length=length,
        truncate=True,
        on_bad_row="skip",  # nothing scored within the length
        val_fraction=0.0,
        cache_dir=cache,
        tokenizer=tokenizer,
    )
    config = common.llama_config(len(tokenizer), options.width, options.layers)
    return Task(common.random_llama(config), tokenizer, data, steps, Meter(options.warmup))


def batches(task: Task) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Our batches as rows of (ids, labels), for the others."""
    task.data.setup("fit")
    for batch in itertools.islice(itertools.cycle(task.data.train_dataloader()), task.steps):
        rows = []
        for prompt, (branch,), *_ in unpack(batch):
            scored = branch.scored or [True] * len(branch.input_ids)
            labels = [t if s else IGNORED for t, s in zip(branch.input_ids, scored, strict=True)]
            rows.append(([*prompt, *branch.input_ids], [IGNORED] * len(prompt) + labels))
        yield rows


# ---------------------------------------------------------------------------------------------- contestants


def run_ours(task: Task) -> None:
    module = SFTModule(task.model, task.tokenizer, optimizer=common.adamw, lr_scheduler=common.constant)
    common.fit_ours(module, task.data, task.steps, common.Watch(task.meter))


def run_bare(task: Task) -> None:
    model, optimizer = task.model, common.adamw(task.model.parameters())
    steps = list(batches(task))
    task.meter.ready()
    for rows in steps:
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), common.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        task.meter.step(sum(len(ids) for ids, _ in rows), loss)


def run_trl(task: Task, **settings: Any) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    steps = list(batches(task))
    tokens = [sum(len(ids) for ids, _ in rows) for rows in steps]
    with tempfile.TemporaryDirectory() as folder:
        trainer = common.watched(SFTTrainer, task.meter, tokens)(
            model=task.model,
            args=SFTConfig(
                folder,
                per_device_train_batch_size=len(steps[0]),
                max_steps=task.steps,
                max_length=None,  # rows were cut already
                dataset_kwargs={"skip_prepare_dataset": True},  # and tokenized
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
            train_dataset=Dataset.from_list([dict(input_ids=i, labels=j) for rows in steps for i, j in rows]),
            processing_class=task.tokenizer,
            optimizers=(common.adamw(task.model.parameters()), None),
        )
        trainer.train()


PEERS: dict[str, Callable[[Task], None]] = {
    "bare": run_bare,
    "trl": run_trl,
    "trl-fast": lambda task: run_trl(task, gradient_checkpointing=False),
    "trl-flat": lambda task: run_trl(task, gradient_checkpointing=False, padding_free=True),
}

# ---------------------------------------------------------------------------------------------- the profile

REST = "the rest"
#: What is timed apart; time within another part counts for the inner one alone.
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "forward pass": ((SFTModule, "training_step"), (LlamaForCausalLM, "forward")),
    "backward pass": ((Tensor, "backward"),),
    "AdamW": ((torch.optim.AdamW, "step"),),
    "clipping": ((torch.nn.utils, "clip_grad_norm_"),),
    "gradient norm, to skip a step that is not finite": ((SFTModule, "on_before_optimizer_step"),),
    "Lightning's log": ((L.LightningModule, "log"),),
    "metrics": ((StageMetrics, "update"),),
}


class Profile:
    """CPU milliseconds of each part of steps.

    Attributes:
        steps: Of each step of a meter, the warm-up's too.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._spent: dict[str, float] = defaultdict(float)
        self._within, self._last = [REST], 0.0

    @contextmanager
    def of(self, meter: Meter) -> Iterator[None]:
        """Within it, parts are timed."""
        owners = [(part, *place) for part, places in PARTS.items() for place in places]
        before = [(owner, name, getattr(owner, name)) for _, owner, name in owners]
        for part, owner, name in owners:
            setattr(owner, name, self._timed(getattr(owner, name), part))
        step = meter.step

        def counted(tokens: int, loss: Tensor) -> None:
            step(tokens, loss)
            self._stop()
            self.steps.append(self._spent)
            self._spent = defaultdict(float)

        meter.step = counted  # type: ignore[method-assign]
        self._last = time.process_time()
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _stop(self) -> None:
        now = time.process_time()
        self._spent[self._within[-1]] += 1000 * (now - self._last)
        self._last = now

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._stop()
            self._within.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._stop()
                self._within.pop()

        return run


def profile(options: argparse.Namespace) -> list[list[str]]:
    """Rows of a table: medians over the measured steps of all rounds, of ours and the bare loop in turns."""
    found: dict[str, list[dict[str, float]]] = {OURS: [], "bare": []}
    for _ in range(options.rounds):
        for name, run in ((OURS, run_ours), ("bare", run_bare)):
            with tempfile.TemporaryDirectory() as cache:
                task, parts = make_task(options, cache), Profile()
                with parts.of(task.meter):
                    run(task)
            found[name] += parts.steps[options.warmup :]
    return profile_rows(found)


def profile_rows(found: Mapping[str, list[dict[str, float]]]) -> list[list[str]]:
    """Rows of parts, then of whole steps."""

    def median(name: str, part: str) -> str:
        values = [sum(step.values()) if part == "whole step" else step.get(part, 0.0) for step in found[name]]
        return f"{statistics.median(values):.1f}"

    return [[part, *(median(name, part) for name in found)] for part in (*PARTS, REST, "whole step")]


# ---------------------------------------------------------------------------------------------- command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    sizes = dict(length=None, vocab_size=None, width=256, layers=4)
    parser = BenchmarkParser(__doc__, [OURS, *PEERS], rounds=3, steps=None, warmup=2, **sizes)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--tokenizer", default=SMOLLM2, help="for the case real: a directory, or %(default)s (downloaded once)"
    )
    parser.add_argument("--profile", action="store_true", help="time the parts of a step instead")
    options = parser.parse(arguments)
    if options.profile and options.case == "all":
        parser.error("--profile takes one --case.")
    return options


def work(options: argparse.Namespace) -> None:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        task = make_task(options, cache)
        (run_ours if options.worker == OURS else PEERS[options.worker])(task)
    task.meter.finish()
    common.report(task.meter)


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the table."""
    options = parse(arguments)
    if options.worker:
        work(options)
        return
    if options.profile:
        torch.set_num_threads(1)
        print(common.markdown(profile(options), ("CPU ms", OURS, "bare")))
        return
    common.require_trl(options.peers, "--peers bare")
    passed = ["steps", "warmup", "tokenizer", "length", "vocab_size", "width", "layers"]
    flags = common.flags(options, passed)
    lines = []
    for case in CASES if options.case == "all" else [options.case]:
        found = common.alternate(__file__, [OURS, *options.peers], options.rounds, ["--case", case, *flags], case)
        lines += common.rows(case, found, CASES[case].goals)
    print(common.markdown(lines))


if __name__ == "__main__":
    main()
