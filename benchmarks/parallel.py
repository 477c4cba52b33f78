"""What ranks exchange per token under each parallelism, and what the Trainer costs over a bare loop of the same.

    pip install -e '.[colossalai]'
    python benchmarks/parallel.py --bytes        # of tensor, sequence, pipeline and data parallelism: one table
    python benchmarks/parallel.py --overhead     # CPU seconds a step, beside a loop without Trainer

All processes are on the CPU and talk by gloo. A random Llama is trained in fp32 by a LightningModule of a few lines
under ColossalAIStrategy("ddp", tp=..., sp=..., pp=...), on packed trees of a prompt and an answer.

--bytes counts what a rank hands to the collectives of the second step, forward and backward pass and optimizer step:
torch dispatches each of them, those of DDP's C++ too, and a mode notes the tensor that goes in. "leaves" is what of it
crosses a link: a ring sums N bytes over n ranks by sending 2 N (n - 1) / n, and of an all-to-all (n - 1) / n is for
others. The table has the rank with the most.

--overhead trains the same model on the same batches from the same start, by the Trainer and by a loop of cut, forward,
backward, step that has no Lightning in it. They take turns step by step, as benchmarks/sharding.py does it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import timedelta
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import common
import lightning.pytorch as L
import sharding
import torch
import torch.distributed as dist
from common import OURS, BenchmarkParser
from sharding import KEEP_MEMORY, Pair, TakeTurns
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from lightning_rlhf.data.packed import Branch, PackedBatch, Tree, pack
from lightning_rlhf.models import Policy
from lightning_rlhf.strategies import ColossalAIStrategy
from lightning_rlhf.strategies.parallel import (
    Cuts,
    PipelineParallel,
    SequenceParallel,
    TensorParallel,
    draw_alike,
    make_mesh,
)

TENSOR, SEQUENCE, PIPELINE, GRADIENTS = "tensor sums", "sequence all-to-alls", "pipeline sends", "gradients"
OTHERS = "others"
KINDS = (TENSOR, SEQUENCE, PIPELINE, GRADIENTS, OTHERS)
BYTE_COLUMNS = ("mesh", "exchanged", "calls", "bytes a token", "by formula", "leaves")
OVERHEAD_COLUMNS = ("mesh", *sharding.OVERHEAD_COLUMNS)
FLOAT = 4
SIZE = {"width": 64, "layers": 4, "rows": 8, "length": 64, "steps": 2}
OVERHEAD_SIZE = {"width": 256, "layers": 4, "rows": 8, "length": 64, "steps": 100}
AXES = ("dp", "tp", "sp", "pp")


class Grid(NamedTuple):
    """How many ranks go along each axis.

    Example:
        >>> Grid.read("tp2_dp2")
        Grid(dp=2, tp=2, sp=1, pp=1)
    """

    dp: int = 1
    tp: int = 1
    sp: int = 1
    pp: int = 1

    @classmethod
    def read(cls, name: str) -> Grid:
        """Of a name such as ``tp2_dp2``."""
        return cls(**{part[:2]: int(part[2:]) for part in name.split("_")})

    @property
    def ranks(self) -> int:
        return prod(self)


def grid_name(name: str) -> str:
    """Checks what the command line gives."""
    try:
        if Grid.read(name).ranks > 1:
            return name
    except (TypeError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f"{name!r} is no mesh of several ranks such as tp2 or sp2_dp2 (of {AXES})")


# ---------------------------------------------------------------------------------------------- what is trained


def model_config(options: argparse.Namespace) -> LlamaConfig:
    return common.llama_config(options.vocab_size, options.width, options.layers)


def batches(options: argparse.Namespace, copy: int) -> list[PackedBatch]:
    """Of each step as many trees as rows, half prompt and half answer; others for each copy of the model."""
    draw = torch.Generator().manual_seed(copy)
    size = (options.warmup + options.steps, options.rows, options.length)
    half = options.length // 2
    steps = torch.randint(options.vocab_size, size, generator=draw).tolist()
    return [pack([Tree(row[:half], [Branch(row[half:])]) for row in rows]) for rows in steps]


def weights(batch: PackedBatch) -> Tensor:
    """Of the mean over scored tokens."""
    return batch.weight / batch.num_scored


class Causal(L.LightningModule):
    """A language model on packed batches."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.policy = Policy(common.random_llama(model_config(options)))

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor | None:
        return self.policy(batch, weights=weights(batch)).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sharding.adamw(self.policy.parameters())

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        assert isinstance(self.trainer.strategy, ColossalAIStrategy)
        copy = self.trainer.strategy.distributed_sampler_kwargs["rank"]
        return DataLoader(batches(self.options, copy), batch_size=None)


def fit(options: argparse.Namespace, steps: int, callback: L.Callback) -> int:
    """Trains in this process, which is one of the ranks; its number."""
    grid = Grid.read(options.worker)
    strategy = ColossalAIStrategy("ddp", tp=grid.tp, sp=grid.sp, pp=grid.pp, timeout=timedelta(minutes=5))
    trainer = common.make_trainer(steps, callback, accelerator="cpu", devices=grid.ranks, strategy=strategy)
    trainer.fit(Causal(options))
    return trainer.global_rank


# ---------------------------------------------------------------------------------------------- what is exchanged


class Sent(NamedTuple):
    """Of one kind, by one rank, in one step."""

    calls: int = 0
    bytes: int = 0
    leaves: float = 0.0


class Exchanges(TorchDispatchMode):
    """Notes tensors that go into collectives, by kind, while it is entered.

    Args:
        tensor: Ranks that hold slices of layers together; None: layers are whole.

    Attributes:
        sent: What was noted.
        backward: Whether a backward pass runs: sums over ranks with whole layers are then those of gradients.
    """

    def __init__(self, tensor: Any = None) -> None:
        super().__init__()
        self.tensor = tensor
        self.sent: dict[str, Sent] = defaultdict(Sent)
        self.backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            names = [argument.name for argument in func._schema.arguments]
            at = names.index("process_group")
            group = dist.ProcessGroup.unbox(args[at])  # type: ignore[attr-defined]
            if group.size() > 1:
                self._note(func._opname, args[at - 1], group)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, given: Any, group: Any) -> None:
        if name.startswith("recv") or name == "barrier":
            return
        size, n = sum(t.nbytes for t in ([given] if isinstance(given, Tensor) else given)), group.size()
        kind, share = OTHERS, 1.0
        if name.startswith("alltoall"):
            kind, share = SEQUENCE, (n - 1) / n
        elif name == "send":
            kind = PIPELINE
        elif name.startswith("allreduce"):
            share = 2 * (n - 1) / n
            if self.tensor is not None and group.group_name == self.tensor.group_name:
                kind = TENSOR
            elif self.backward:
                kind = GRADIENTS
        calls, before, leaves = self.sent[kind]
        self.sent[kind] = Sent(calls + 1, before + size, leaves + share * size)


class Note(L.Callback):
    """Notes the exchanges of the last step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.exchanges = Exchanges()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.steps - 1:
            assert isinstance(trainer.strategy, ColossalAIStrategy)
            slices = trainer.strategy.cuts and trainer.strategy.cuts.tensor
            self.exchanges = Exchanges(slices.ranks.group if slices else None)
            self.exchanges.__enter__()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.exchanges.backward = True

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.exchanges.backward = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.steps - 1:
            self.exchanges.__exit__(None, None, None)


def count(options: argparse.Namespace) -> tuple[int, dict[str, Sent]]:
    """Counts in this process, which is one of the ranks; its number, and what it exchanged."""
    noted = Note(options.steps)
    rank = fit(options, options.steps, noted)
    return rank, dict(noted.exchanges.sent)


def by_formula(options: argparse.Namespace, grid: Grid) -> dict[str, float]:
    """Bytes a step that the rank with the most of a kind exchanges, for a Llama with as many key-value heads.

    ``tokens`` are those of a copy's row, of which the answers are scored. D is the width, L the number of layers:

    * tensor: one sum of D at the embeddings; per layer two forward and two backward, of attention and of the MLP; per
      scored token one of D at the head, and three numbers of the softmax.
    * sequence: per layer and own token queries, keys, values (3 D) and outputs (D), forward and backward.
    * pipeline: D to the next stage, and D to the one before.
    * gradients: every parameter that a rank holds, once.
    """
    width, layers = options.width, options.layers
    tokens, scored = options.rows * options.length, options.rows * (options.length - options.length // 2)
    own = tokens // grid.sp  # of this rank's stretch
    of_head = scored // grid.sp
    found: dict[str, float] = {}
    if grid.tp > 1:
        # each stage has its layers, and embeddings or head
        sums = 4 * -(-layers // grid.pp) * own * width
        front, head = own * width, of_head * (width + 3)
        found[TENSOR] = FLOAT * (sums + (front + head if grid.pp == 1 else max(front, head)))
    if grid.sp > 1:
        found[SEQUENCE] = FLOAT * 2 * layers * own * 4 * width // grid.tp
    if grid.pp > 1:
        found[PIPELINE] = FLOAT * tokens * width * min(2, grid.pp - 1)
    if grid.dp * grid.sp > 1:
        found[GRADIENTS] = FLOAT * largest_part(options, grid)
    return found


def largest_part(options: argparse.Namespace, grid: Grid) -> int:
    """Parameters of the rank that holds the most."""
    config, width = model_config(options), options.width
    inner = config.intermediate_size
    layer = (4 * width * width + 3 * width * inner) // grid.tp + 2 * width
    table = options.vocab_size * width // grid.tp
    stages = [-(-options.layers * stage // grid.pp) for stage in range(grid.pp + 1)]
    held = [layer * (end - start) for start, end in pairwise(stages)]
    held[0] += table
    held[-1] += table + width
    return max(held)


def byte_rows(options: argparse.Namespace, name: str, found: Sequence[dict[str, Sequence[float]]]) -> list[list[str]]:
    """Lines of a mesh: of each kind the rank with the most, and bytes a token of a copy's row."""
    expected, tokens = by_formula(options, Grid.read(name)), options.rows * options.length
    lines = []
    for kind in KINDS:
        most = max((Sent(*rank[kind]) for rank in found if kind in rank), key=lambda sent: sent.bytes, default=None)
        if most is None:
            continue
        formula = f"{expected[kind] / tokens:,.1f}" if kind in expected else ""
        each, leaves = most.bytes / tokens, most.leaves / tokens
        lines.append([name, kind, str(most.calls), f"{each:,.1f}", formula, f"{leaves:,.1f}"])
    return lines


# ---------------------------------------------------------------------------------------------- overhead


class BareLoop:
    """The same parallelism by hand."""

    def __init__(self, options: argparse.Namespace) -> None:
        grid, device = Grid.read(options.worker), torch.device("cpu")
        mesh = make_mesh(timedelta(minutes=5), pipe=grid.pp, sequence=grid.sp, tensor=grid.tp)
        policy: Any = Policy(common.random_llama(model_config(options)))
        cuts = Cuts(
            TensorParallel(mesh.tensor, device) if grid.tp > 1 else None,
            PipelineParallel(mesh.pipe, device) if grid.pp > 1 else None,
        )
        cuts.cut_models(nn.ModuleList([policy]))
        if grid.sp > 1:
            SequenceParallel(mesh.sequence, grid.tp).spread_models(nn.ModuleList([policy]))
        draw_alike(mesh.copy)
        self.optimizer = sharding.adamw([p for p in policy.parameters() if not cuts.is_absent(p)])
        with cuts.hiding():
            several = mesh.replicas.size > 1
            self.model = DistributedDataParallel(policy, process_group=mesh.replicas.group) if several else policy

    def step(self, batch: PackedBatch) -> Tensor:
        """Trains on a batch; the loss."""
        loss: Tensor = self.model(batch, weights=weights(batch)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def take_turns(options: argparse.Namespace) -> tuple[int, list[Pair]]:
    """All steps in this process, which is one of the ranks; its number, and what it measured after the warm-up."""
    turns = TakeTurns(lambda: BareLoop(options))
    rank = fit(options, options.warmup + options.steps, turns)
    return rank, turns.pairs[options.warmup :]


# ---------------------------------------------------------------------------------------------- command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    sizes = dict.fromkeys(("steps", "rows", "length", "width", "layers"))
    parser = BenchmarkParser(__doc__, warmup=2, vocab_size=1024, **sizes)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bytes", action="store_true", help="count what ranks exchange")
    what.add_argument("--overhead", action="store_true", help="measure the Trainer's overhead over a bare loop")
    parser.add_argument(
        "--meshes", nargs="+", type=grid_name, default=["dp2", "tp2", "sp2", "pp2"], help="ranks along each axis"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse(arguments)
    for name, value in (OVERHEAD_SIZE if options.overhead else SIZE).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.length < 2 or options.steps < 1:
        parser.error("--length must be at least 2, for a prompt and an answer, and --steps at least 1.")
    return options


def launch(options: argparse.Namespace, name: str) -> list[Any]:
    """Runs this script on a mesh; what each rank found."""
    passed = ["warmup", "steps", "rows", "length", "vocab_size", "width", "layers"]
    command = ["--worker", name, "--overhead" if options.overhead else "--bytes", *common.flags(options, passed)]
    settings = {**common.ONE_THREAD, **(KEEP_MEMORY if options.overhead else {})}
    found = common.launch_ranks(__file__, command, Grid.read(name).ranks, settings)
    print(f"{name}: done", file=sys.stderr, flush=True)
    return found


def work(options: argparse.Namespace) -> None:
    """One rank, in this process."""
    torch.set_num_threads(1)
    rank, found = take_turns(options) if options.overhead else count(options)
    (options.out / f"{rank}.json").write_text(json.dumps(found))


def overhead_rows(name: str, found: Iterable[Iterable[Sequence[float]]]) -> list[str]:
    """The line of a mesh."""
    pairs = [[Pair(*pair) for pair in rank] for rank in found]
    return [name, *sharding.overhead_row(len(pairs), pairs)]


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints a table."""
    options = parse(arguments)
    if options.worker:
        work(options)
        return
    parameters = sharding.num_parameters(model_config(options))
    print(f"A Llama of {parameters:,} parameters (width {options.width}, {options.layers} layers), ", end="")
    print(f"{options.rows} trees of {options.length} tokens a step and copy.\n")
    if options.overhead:
        print(f"CPU seconds a step, of all ranks together, {OURS} and a bare loop's:\n")
        lines = [overhead_rows(name, launch(options, name)) for name in options.meshes]
        print(common.markdown(lines, OVERHEAD_COLUMNS))
        return
    print("Bytes of the rank with the most, by tokens of a copy's row:\n")
    print(common.markdown([line for n in options.meshes for line in byte_rows(options, n, launch(options, n))],
                          BYTE_COLUMNS))  # fmt: skip


if __name__ == "__main__":
    main()
