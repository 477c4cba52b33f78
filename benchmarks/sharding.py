"""What a rank holds of a model in training under DDP, ZeRO and Gemini, and what the Trainer costs over a bare loop.

    pip install -e '.[colossalai]'
    python benchmarks/sharding.py                # bytes a rank, at 1, 2 and 4 processes: two tables
    python benchmarks/sharding.py --overhead     # CPU seconds a step, beside a loop of ColossalAI's alone

All processes are on the CPU and talk by gloo. A random Llama is trained by a LightningModule of a few lines, each
(strategy, precision, ranks) in processes of their own. In the second step, between backward pass and optimizer step,
each rank counts the storages of tensors that it really holds, each once: what is released counts nothing, padding and
what views keep alive count. Then it counts every other tensor that Python knows: buffers, the batch, and whatever was
forgotten. The tables have the largest rank. DDP's buckets, a further copy of the gradients in C++, are not in them.

Strategies hold different number types: DDP and ZeRO run in fp32; Gemini has 16 bits alone, so it runs in bf16-mixed
(weights and gradients in bf16, and fp32 weights that the optimizer steps), and ZeRO-2 in both. So the first table is
in bytes, and the second, which is compared with DDP and with the ideal, in elements.

--overhead trains the same model on the same batches from the same start, by the Trainer under colossalai_zero2 and by
Booster with LowLevelZeroPlugin. They take turns step by step, within the same processes, so that both meet the same
state of the machine: what the Trainer does from the end of a bare step to the end of its own is its share. Memory that
is freed stays with the process, for both alike: asking the system for it anew costs more than the Trainer does. A ratio
is of two neighboring steps; the interval is a bootstrap's of their median.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

sys.path.insert(0, str(Path(__file__).parent))

import common
import lightning.pytorch as L
import torch
from common import OURS, BenchmarkParser
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_rlhf.strategies.colossalai import NAMES, ColossalAIStrategy
from lightning_rlhf.strategies.gemini import GeminiBoosted

DDP = "ddp"
WEIGHTS, MASTERS, GRADIENTS, STATES, OTHERS = "weights", "fp32 weights", "gradients", "optimizer states", "others"
KINDS = (WEIGHTS, MASTERS, GRADIENTS, STATES)
TOLERANCE = 0.1
"""How far a share may be from the ideal."""
BYTE_COLUMNS = ("strategy", "precision", "ranks", *KINDS, "sum", "of DDP's", OTHERS)
SHARE_COLUMNS = ("strategy", "precision", "ranks", *(f"{kind}: of DDP's, ideal" for kind in KINDS), "within 10 %")
OVERHEAD_COLUMNS = ("ranks", "steps", OURS, "bare", "ours takes", "ours is", "95 %", "range", "loss differs by")
SIZE = {"width": 512, "layers": 8, "rows": 1, "length": 16, "steps": 2, "ranks": [1, 2, 4]}
OVERHEAD_SIZE = {"width": 256, "layers": 4, "rows": 8, "length": 64, "steps": 100, "ranks": [1, 2]}
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Has glibc keep what is freed."""


class Case(NamedTuple):
    """A strategy in a precision.

    Attributes:
        splits: What should be split over ranks, of what it holds.
    """

    strategy: str
    precision: str
    splits: frozenset[str] = frozenset()

    def ideal(self, kind: str, ranks: int) -> float:
        """Its share of what DDP holds."""
        return 1 / ranks if kind in self.splits else 1.0


CASES = [
    Case(DDP, "32-true"),
    Case("colossalai_zero1", "32-true", frozenset({MASTERS, STATES})),
    Case("colossalai_zero2", "32-true", frozenset({MASTERS, STATES, GRADIENTS})),
    Case("colossalai_zero2", "bf16-mixed", frozenset({MASTERS, STATES, GRADIENTS})),
    Case("colossalai_gemini", "bf16-mixed", frozenset(KINDS)),
]

# ---------------------------------------------------------------------------------------------- what is trained


def model_config(options: argparse.Namespace) -> LlamaConfig:
    return common.llama_config(options.vocab_size, options.width, options.layers)


def num_parameters(config: LlamaConfig) -> int:
    """Of the model; tied ones count once."""
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(config).parameters())


def batches(options: argparse.Namespace, rank: int) -> list[Tensor]:
    """(rows, length) random tokens for each step, others on each rank."""
    draw = torch.Generator().manual_seed(rank)
    size = (options.warmup + options.steps, options.rows, options.length)
    return list(torch.randint(options.vocab_size, size, generator=draw))


def adamw(parameters: Iterable[Any]) -> torch.optim.AdamW:
    """Makes its states in the first step: ones that were there before would belong to whole weights."""
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)


class Causal(L.LightningModule):
    """A language model as anyone writes it."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.model = common.random_llama(model_config(options))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.model.parameters())

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(batches(self.options, self.global_rank), batch_size=None)


# ---------------------------------------------------------------------------------------------- what a rank holds


class Held(NamedTuple):
    """Of one kind, on one rank."""

    bytes: int = 0
    elements: int = 0


def tensors_of(strategy: Strategy, module: Causal, optimizer: Any) -> dict[str, list[Tensor]]:
    """All tensors of each kind. Views of one another may be among them."""
    weights: list[Any] = list(module.model.parameters())
    gradients: list[Any] = [p.grad for p in weights]
    masters: list[Any] = []
    boosted = strategy.boosted if isinstance(strategy, ColossalAIStrategy) else []
    for child in boosted:
        optimizer = child.wrapped.optim
        gradients += [gradient for *_, gradient in child.gradients()]
        masters += [shard.weight for slot in child.slots if (shard := child.local_shard(slot)) is not None]
        if isinstance(child, GeminiBoosted):
            for chunk in child.chunks.get_chunks(child.model.fp16_params):
                weights += vars(chunk).values()
                gradients += vars(chunk.grad_chunk).values() if chunk.grad_chunk else ()
                masters += vars(chunk.paired_chunk).values() if chunk.paired_chunk else ()
    states = [value for state in optimizer.state.values() for value in state.values()]
    found = {WEIGHTS: weights, MASTERS: masters, GRADIENTS: gradients, STATES: states}
    return {kind: [t for t in values if isinstance(t, Tensor)] for kind, values in found.items()}


def count(found: Mapping[str, Iterable[Tensor]]) -> dict[str, Held]:
    """Storages of each kind, each counted once: where it comes first."""
    seen: set[int] = set()
    held = {}
    for kind, tensors in found.items():
        size = elements = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                size += storage.nbytes()
                elements += storage.nbytes() // tensor.element_size()
        held[kind] = Held(size, elements)
    return held


def living_tensors() -> list[Tensor]:
    """Every tensor on the CPU that Python knows in this process."""
    gc.collect()
    every = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return [t for t in every if t.device.type == "cpu" and t.layout == torch.strided and has_memory(t)]


def has_memory(tensor: Tensor) -> bool:
    """Whether its storage is real: torch's compiler leaves tensors behind that have none."""
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


class Count(L.Callback):
    """Counts between the last backward pass and the step that follows."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.held: dict[str, Held] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.steps - 1:
            assert isinstance(pl_module, Causal)
            found = tensors_of(trainer.strategy, pl_module, optimizer)
            self.held = count({**found, OTHERS: living_tensors()})


def hold(options: argparse.Namespace) -> tuple[int, dict[str, Held]]:
    """Trains in this process, which is one of the ranks; its number, and what it held."""
    strategy: str | Strategy = options.worker
    if options.min_chunk_elements and options.worker != DDP:
        strategy = ColossalAIStrategy(**NAMES[options.worker], min_chunk_elements=options.min_chunk_elements)
    counted = Count(options.steps)
    trainer = common.make_trainer(
        options.steps,
        counted,
        accelerator="cpu",
        devices=options.ranks[0],
        strategy=strategy,
        precision=options.precision,
    )
    trainer.fit(Causal(options))
    return trainer.global_rank, counted.held


# ---------------------------------------------------------------------------------------------- overhead


class BareLoop:
    """ColossalAI alone, with the settings that the strategy gives it on a CPU."""

    def __init__(self, options: argparse.Namespace) -> None:
        from colossalai.booster import Booster
        from colossalai.booster.plugin import LowLevelZeroPlugin

        plugin = LowLevelZeroPlugin(
            stage=2,
            precision="fp32",
            master_weights=False,
            max_norm=0.0,
            overlap_communication=False,
            reduce_bucket_size_in_m=12,
            cast_inputs=False,
        )
        whole = common.random_llama(model_config(options))
        self.booster = Booster(plugin=plugin)
        self.model, self.optimizer, *_ = self.booster.boost(whole, adamw(whole.parameters()))

    def step(self, ids: Tensor) -> Tensor:
        """Trains on a batch; the loss."""
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        self.booster.backward(loss, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Loop(Protocol):
    """Anything that trains."""

    def step(self, batch: Any, /) -> Tensor:
        """Trains on a batch; the loss."""


class Pair(NamedTuple):
    """CPU seconds of two neighboring steps, and how far their losses are apart."""

    ours: float
    bare: float
    difference: float


class TakeTurns(L.Callback):
    """Makes a bare step after each of the Trainer's, on the same batch.

    Args:
        make_loop: Makes what does the bare steps, when training starts.
    """

    def __init__(self, make_loop: Callable[[], Loop]) -> None:
        self.make_loop = make_loop
        self.pairs: list[Pair] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.loop = self.make_loop()
        self.since = time.process_time()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ours = time.process_time()
        loss = self.loop.step(batch)
        bare = time.process_time()
        self.pairs.append(Pair(ours - self.since, bare - ours, abs((outputs["loss"] - loss).item())))
        self.since = time.process_time()


def take_turns(options: argparse.Namespace) -> tuple[int, list[Pair]]:
    """All steps in this process, which is one of the ranks; its number, and what it measured after the warm-up."""
    turns = TakeTurns(lambda: BareLoop(options))
    trainer = common.make_trainer(
        options.warmup + options.steps,
        turns,
        accelerator="cpu",
        devices=options.ranks[0],
        strategy="colossalai_zero2",
    )
    trainer.fit(Causal(options))
    return trainer.global_rank, turns.pairs[options.warmup :]


# ---------------------------------------------------------------------------------------------- tables


def byte_rows(case: Case, ranks: int, held: Mapping[str, Held], parameters: int, ddp: float | None) -> list[str]:
    """Bytes a parameter."""
    every = sum(held[kind].bytes for kind in KINDS) / parameters
    each = [f"{held[kind].bytes / parameters:.2f}" for kind in KINDS]
    share = "" if ddp is None else f"{every / ddp:.3f}"
    return [case.strategy, case.precision, str(ranks), *each, f"{every:.2f}", share, f"{held[OTHERS].bytes:,}"]


def share_rows(case: Case, ranks: int, held: Mapping[str, Held], ddp: Mapping[str, Held]) -> list[str]:
    """Elements, beside what DDP holds and what should be left of it; fp32 weights beside DDP's weights."""
    line, wrong = [case.strategy, case.precision, str(ranks)], []
    for kind in KINDS:
        if kind == MASTERS and not held[kind].elements:
            line.append("none")
            continue
        share = held[kind].elements / ddp[WEIGHTS if kind == MASTERS else kind].elements
        ideal = case.ideal(kind, ranks)
        line.append(f"{share:.3f}, {ideal:g}")
        if abs(share / ideal - 1) > TOLERANCE:
            wrong.append(f"{kind} {share / ideal:.2f} times the ideal")
    return [*line, f"no: {', '.join(wrong)}" if wrong else "yes"]


def bootstrap(ratios: list[float], draws: int = 10_000) -> tuple[float, float]:
    """Where the median lies with 95 % confidence."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[round(0.025 * (draws - 1))], medians[round(0.975 * (draws - 1))]


def overhead_row(ranks: int, found: list[list[Pair]]) -> list[str]:
    """CPU seconds a step of all ranks together, and ours over the bare loop's."""
    together = [(sum(pair.ours for pair in step), sum(pair.bare for pair in step)) for step in zip(*found, strict=True)]
    ratios = [ours / bare for ours, bare in together]
    low, high = bootstrap(ratios)
    return [
        str(ranks),
        str(len(ratios)),
        *(f"{statistics.median(seconds):.4f} s" for seconds in zip(*together, strict=True)),
        f"{1000 * statistics.median(ours - bare for ours, bare in together):+.1f} ms",
        f"{statistics.median(ratios):.3f}x",
        f"{low:.3f} to {high:.3f}",
        f"{min(ratios):.3f} to {max(ratios):.3f}",
        f"{max(pair.difference for rank in found for pair in rank):.1e}",
    ]


# ---------------------------------------------------------------------------------------------- command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    sizes = dict.fromkeys(("steps", "rows", "length", "width", "layers"))
    parser = BenchmarkParser(__doc__, warmup=2, vocab_size=1024, **sizes)
    names = [name for name in dict.fromkeys(case.strategy for case in CASES) if name != DDP]
    parser.add_argument("--strategies", nargs="+", choices=names, default=names, help="strategies besides ddp")
    parser.add_argument(
        "--ranks", nargs="+", type=int, help="numbers of processes; default: 1 2 4, with --overhead 1 2"
    )
    parser.add_argument(
        "--overhead", action="store_true", help="measure the Trainer's overhead over a bare loop, instead of memory"
    )
    parser.add_argument("--min-chunk-elements", type=int, help="Gemini's smallest chunk; default: the strategy's")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse(arguments)
    for name, value in (OVERHEAD_SIZE if options.overhead else SIZE).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.steps < 2 and not options.overhead:
        parser.error("--steps must be at least 2, because the first step makes the optimizer states.")
    return options


def launch(options: argparse.Namespace, ranks: int, arguments: list[str]) -> list[Any]:
    """Runs this script on so many ranks; what each of them returned."""
    passed = ["warmup", "steps", "rows", "length", "vocab_size", "width", "layers", "min_chunk_elements"]
    command = ["--ranks", str(ranks), *arguments, *common.flags(options, passed), *["--overhead"] * options.overhead]
    settings = {**common.ONE_THREAD, **(KEEP_MEMORY if options.overhead else {})}
    found = common.launch_ranks(__file__, command, ranks, settings)
    print(f"{' '.join(arguments)}, {ranks} ranks: done", file=sys.stderr, flush=True)
    return found


def measure(options: argparse.Namespace, case: Case, ranks: int) -> dict[str, Held]:
    """The most that any rank holds of each kind."""
    found = launch(options, ranks, ["--worker", case.strategy, "--precision", case.precision])
    return {kind: max(Held(*rank[kind]) for rank in found) for kind in (*KINDS, OTHERS)}


def work(options: argparse.Namespace) -> None:
    """One rank, in this process."""
    torch.set_num_threads(1)
    rank, found = take_turns(options) if options.overhead else hold(options)
    (options.out / f"{rank}.json").write_text(json.dumps(found))


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the tables."""
    options = parse(arguments)
    if options.worker:
        work(options)
        return
    parameters = num_parameters(model_config(options))
    print(f"A Llama of {parameters:,} parameters (width {options.width}, {options.layers} layers).\n")
    if options.overhead:
        print("CPU seconds a step, of all ranks together:\n")
        lines = []
        for ranks in options.ranks:
            found = [[Pair(*pair) for pair in rank] for rank in launch(options, ranks, ["--worker", OURS])]
            lines.append(overhead_row(ranks, found))
        print(common.markdown(lines, OVERHEAD_COLUMNS))
        return
    cases = [case for case in CASES if case.strategy in (DDP, *options.strategies)]
    found = {(case, ranks): measure(options, case, ranks) for case in cases for ranks in options.ranks}
    sizes, shares = [], []
    for (case, ranks), held in found.items():
        ddp = found[CASES[0], ranks]
        whole = sum(ddp[kind].bytes for kind in KINDS) / parameters
        sizes.append(byte_rows(case, ranks, held, parameters, None if case == CASES[0] else whole))
        if case != CASES[0]:
            shares.append(share_rows(case, ranks, held, ddp))
    print(f"Bytes a parameter on the largest rank; {OTHERS}: all bytes.\n\n{common.markdown(sizes, BYTE_COLUMNS)}\n")
    print(f"Elements, as shares of DDP's at as many ranks:\n\n{common.markdown(shares, SHARE_COLUMNS)}")


if __name__ == "__main__":
    main()
