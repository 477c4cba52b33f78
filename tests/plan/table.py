"""Runs whose memory is measured and foretold: the tables of docs/plan.md. From the root of a checkout:

    python -m tests.plan.table                    prints them
    python -m tests.plan.table --only "sp=2" ppo  rows whose name has all of these words

It ends with status 1 if a row is further off than its bound.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_rlhf.plan.layout import Layout, moments, peak
from lightning_rlhf.plan.measure import Mode, measure
from lightning_rlhf.plan.stages import stage_of

from .cases import PROMPTS, config, data_of, module_of, save, shape_of
from .measured import fit

HERE = Path(__file__).resolve().parent
BF16 = "bf16-mixed"
STAGES = ("sft", "reward", "ppo", "grpo")
#: Share by which weights, gradients and states may differ.
HELD = 0.02
ENDS = ("the first stage", "the last stage")


class Row(NamedTuple):
    """A run. Ranks of a copy take as much as each other, or are stages of a pipeline.

    Attributes:
        name: What the docs call it.
        stage: sft, reward, dpo, ppo or grpo.
        devices: Processes.
        precision: The Trainer's.
        strategy: Arguments of ColossalAIStrategy. One process has none.
        lora: Adapters are trained.
        checkpointing: Activations are computed again.
        layers: Of the model.
        bound: Share by which the peak may differ.
        peak_alone: What is held is not compared: a chunk that is not full has the storage of a full one.
    """

    name: str
    stage: str
    devices: int = 2
    precision: str = "32-true"
    strategy: dict = {}  # noqa: RUF012 - never written to
    lora: bool = False
    checkpointing: bool = False
    layers: int = 5
    bound: float = 0.03
    peak_alone: bool = False

    @property
    def title(self):
        return f"{self.stage}, {self.name}"


def zero2(**axes):
    return {"precision": BF16, "strategy": {"plugin": "zero2", **axes}}


def ddp(**axes):
    return {"strategy": {"plugin": "ddp", **axes}}


LAYOUTS = {
    "DDP": ddp(),
    "ZeRO-1": {"strategy": {"plugin": "zero1"}},
    "ZeRO-2, bf16-mixed": zero2(),
    "Gemini, bf16-mixed": {"precision": BF16, "strategy": {"plugin": "gemini", "min_chunk_elements": 2**16}},
    "`tp=2`": ddp(tp=2),
    "`tp=4`, four processes": {"devices": 4, **ddp(tp=4)},
    "`pp=2` in 2 parts": ddp(pp=2, micro_batches=2),
    "`sp=2`": ddp(sp=2),
}
TABLE = [Row(name, stage, **settings) for name, settings in LAYOUTS.items() for stage in STAGES]
FURTHER = [
    Row("full, with its reference; one process, 6 layers", "dpo", 1, layers=6),
    Row("full, separate critic; one process, 6 layers", "ppo", 1, layers=6),
    Row("LoRA, groups of 4; one process, 6 layers", "grpo", 1, lora=True, layers=6),
    Row("ZeRO-2 in fp32; two processes", "sft", strategy={"plugin": "zero2"}),
    Row("ZeRO-1, `sp=2`; two processes", "sft", strategy={"plugin": "zero1", "sp": 2}),
    Row("ZeRO-2 in bf16-mixed, `sp=2`; two processes", "sft", **zero2(sp=2)),
    Row("ZeRO-2 in bf16-mixed, `tp=2`; four processes", "sft", 4, **zero2(tp=2)),
    Row("ZeRO-2 in bf16-mixed, `pp=2` in 2 parts", "sft", **zero2(pp=2, micro_batches=2)),
    Row("DDP, `tp=2` and `pp=2` in 2 parts, four processes", "sft", 4, **ddp(tp=2, pp=2, micro_batches=2), bound=0.05),
    Row(
        "Gemini, less than a chunk; two processes",
        "sft",
        precision=BF16,
        strategy={"plugin": "gemini"},
        peak_alone=True,
    ),
]
#: Quick ones, which the docs leave out.
ALONE = [
    Row("one process", "sft", 1),
    Row("LoRA; one process", "sft", 1, lora=True),
    Row("checkpointing; one process", "sft", 1, checkpointing=True),
    Row("one process", "reward", 1),
]
ROWS = [*TABLE, *FURTHER, *ALONE]


class Compared(NamedTuple):
    """A rank's bytes.

    Attributes:
        rank: Which end of a pipeline. Empty for ranks that are alike.
        parts: Measured and foretold bytes of peak, weights, states and, where parameters hold them, gradients.
    """

    rank: str
    parts: dict

    def off(self, part="peak"):
        """Share by which a part differs from what was measured."""
        measured, told = self.parts[part]
        return told / measured - 1


def measured(row, model, out, python=sys.executable):
    """Runs a row; returns what each rank held."""
    if row.devices == 1:
        module = module_of(row.stage, model, row.lora, row.checkpointing)
        return [fit(module, data_of(row.stage, 1, out), precision=row.precision)]
    paths = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}"}
    command = [python, str(HERE / "run_ranks.py"), str(model), str(out), json.dumps(row._asdict())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=paths)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((Path(out) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(row.devices)]


def foretold(row, model, prompt):
    """What is foretold of the ranks of a copy: what each takes, and the moment of its peak."""
    given = row.strategy
    plugin, chunk = given.get("plugin", "ddp"), given.get("min_chunk_elements", 2**20)
    tp, pp, sp = (given.get(axis, 1) for axis in ("tp", "pp", "sp"))
    shape, sharded = shape_of(row.stage, prompt), plugin != "ddp"
    masters = sharded and row.precision == BF16
    cast = torch.bfloat16 if masters else None
    mode = Mode(row.precision, cast, sharded, row.checkpointing, tp=tp, sp=sp)
    copies = row.devices // (tp * pp * sp)
    layout = Layout(
        plugin, tp, copies, row.checkpointing, shape.rows, masters, overlaps=False, chunk=chunk, pp=pp, sp=sp
    )
    found = []
    for first, depth in ((True, 3), (False, 2)) if pp > 1 else ((True, row.layers),):
        module = module_of(row.stage, model, row.lora, row.checkpointing)
        each = measure(module, shape, mode, depth)
        if pp > 1:
            part = measure(module, shape._replace(rows=shape.rows // given["micro_batches"]), mode, depth)
            each = stage_of(each, part, given["micro_batches"], first, summed=row.stage == "sft")
        found.append((each, layout, peak(moments(each, layout, row.stage in PROMPTS))))
    return found


def compare(row, model, out, python=sys.executable):
    """Runs a row and plans it."""
    found = measured(row, model, out, python)
    told = foretold(row, model, found[0].get("prompt"))
    # ranks of a copy are slices or stretches that take as much, or stages; the last stretch takes most
    ends, held = (ENDS, (found[0], found[-1])) if len(told) > 1 else (("",), found[-1:])
    compared = []
    for rank, have, (each, layout, most) in zip(ends, held, told, strict=True):
        masters = 4 * each.elements / layout.replicas if layout.masters else 0  # which no optimizer's state holds
        planned = {
            "peak": most.on_device,
            "weights": most.parts["weights"],
            "states": most.parts["states"] - masters,
            "gradients": each.gradients,
        }
        if layout.plugin != "ddp":  # no parameter holds them
            del planned["gradients"]
        if row.peak_alone:
            planned = {"peak": planned["peak"]}
        compared.append(Compared(rank, {part: (have[part], size) for part, size in planned.items()}))
    return compared


def faults(row, compared):
    """What is further off than it may be."""
    return [
        f"{row.title}: {one.rank or 'a rank'}: {part} {one.off(part):+.2%}, {one.parts[part]}"
        for one in compared
        for part in one.parts
        if not abs(one.off(part)) <= (row.bound if part == "peak" else HELD)
    ]


def models_in(folder, tokenizer):
    """The models of all rows, by :func:`size_of`."""
    sizes = {size_of(row) for row in ROWS}
    return {
        size: save(config(len(tokenizer), size[0], kv=size[1]), tokenizer, Path(folder, "model-{}-{}".format(*size)))
        for size in sizes
    }


def size_of(row):
    """Layers and key-value heads, which the ranks that cut layers must divide."""
    return row.layers, max(2, row.strategy.get("tp", 1))


def mib(count):
    return f"{count / 2**20:.3f} MiB"


def percent(share):
    return f"{100 * share:+.2f} %"


def as_markdown(found):
    """The two tables of the docs, of the rows that were run."""
    lines = ["| two processes, or as said | SFT | reward | PPO | GRPO |", "|---|---|---|---|---|"]
    for name in LAYOUTS:
        rows = {row.stage: found[row.title] for row in TABLE if row.name == name and row.title in found}
        for i in range(max(map(len, rows.values()), default=0)):
            ranks = [rows[stage][i] if stage in rows else None for stage in STAGES]
            rank = next(one.rank for one in ranks if one)
            cells = [f"{mib(one.parts['peak'][0])}, {percent(one.off())}" if one else "" for one in ranks]
            title = f"{name}, {rank}" if rank == ENDS[0] else rank or name
            lines.append(f"| {' | '.join([title, *cells])} |")
    lines += ["", "| further runs | measured | planned | differs by |", "|---|---|---|---|"]
    for row in FURTHER:
        for one in found.get(row.title, ()):
            title = (
                f"{name_of(row)}{f'; {one.rank}' if one.rank == ENDS[0] else ''}" if one.rank != ENDS[1] else ENDS[1]
            )
            measured, told = one.parts["peak"]
            lines.append(f"| {title} | {mib(measured)} | {mib(told)} | {percent(one.off())} |")
    return "\n".join(lines)


def name_of(row):
    """A further row's title in the docs."""
    stage = {"reward": "Reward"}.get(row.stage, row.stage.upper())
    return f"{stage}, {row.name}"


def main():
    """Runs the rows that are asked for."""
    sys.path.insert(0, str(HERE.parent / "support"))
    from forked import python

    from tests.conftest import make_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="run rows whose name has all of these")
    asked = [word.lower() for word in parser.parse_args().only]
    found, wrong = {}, []
    with tempfile.TemporaryDirectory() as folder:
        models = models_in(folder, make_tokenizer())
        for i, row in enumerate(row for row in ROWS if all(word in row.title.lower() for word in asked)):
            out = Path(folder, str(i))
            out.mkdir()
            found[row.title] = compare(row, models[size_of(row)], out, python())
            wrong += faults(row, found[row.title])
            told = "; ".join(f"{one.rank} {percent(one.off())}".strip() for one in found[row.title])
            print(f"{row.title}: {told}", file=sys.stderr, flush=True)
    print(as_markdown(found))
    held = [abs(one.off(part)) for ranks in found.values() for one in ranks for part in one.parts if part != "peak"]
    print(f"\nWeights, gradients and states differ by {max(held, default=0):.3%} at most.")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
