"""Rounding, GPTQ and AutoRound on stories260K in 4 bits: held-out perplexity and KL, for several calibration seeds.

    python benchmarks/quantize.py                          # docs/quantize.md says what to install
    python benchmarks/quantize.py --methods rtn gptq --group_size 32 --seeds 1

The model writes its own rows: 64 of 256 tokens to calibrate, by each seed, and 64 others to measure on. Its MLP of 172
is padded with zeros to 192, which is the same function in a shape that packs. Each seed adds a line per result to
``benchmarks/results/quantize.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from widened import save_widened

from lightning_rlhf.quantize.calibration import Rows
from lightning_rlhf.quantize.compare import Result, compare_methods
from lightning_rlhf.quantize.grid import Grid

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / "tests" / "assets" / "stories260K"
RESULTS = ROOT / "benchmarks" / "results" / "quantize.jsonl"
HELD_OUT = 2
"""Seed of the held-out rows."""


@torch.no_grad()
def sample_rows(model: PreTrainedModel, count: int, length: int, seed: int) -> list[Tensor]:
    """Samples rows from the model itself, at temperature 1."""
    start = torch.full((count, 1), model.config.bos_token_id)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        new = length - 1
        rows = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new,
            min_new_tokens=new,
        )
    return list(rows)


def run(options: argparse.Namespace) -> dict[int, list[Result]]:
    """Compares the methods with the calibration rows of each seed."""
    grids = [Grid(4, size, sym) for sym in (True, False) for size in options.group_size]
    with tempfile.TemporaryDirectory() as folder:
        source = save_widened(STORIES, Path(folder) / "stories260K")
        model = AutoModelForCausalLM.from_pretrained(source).eval()
        held_out = sample_rows(model, options.rows, 256, HELD_OUT)
        found = {}
        for seed in options.seeds:
            print(f"calibration seed {seed}", flush=True)
            rows = Rows(sample_rows(model, options.rows, 256, seed), held_out)
            done = compare_methods(
                source, Path(folder) / f"seed{seed}", options.methods, grids, rows, steps=options.steps
            )
            print(done.table(), flush=True)
            found[seed] = done.results
            record(options.results, seed, done.results)
        return found


def record(path: Path, seed: int, results: list[Result]) -> None:
    """Adds a seed's results to a file."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"seed": seed, **asdict(replace(r, directory=""))}) + "\n" for r in results)


def table(found: dict[int, list[Result]]) -> str:
    """A Markdown table with a row per grid and method, and the figures of all seeds."""
    lines = ["| grid | method | perplexity | KL |", "|---|---|---|---|"]
    for same in zip(*found.values(), strict=True):
        first = same[0]
        figures = [(f"{r.perplexity:.3f}", f"{r.kl:.4f}") for r in same]
        columns = (dict.fromkeys(column) for column in zip(*figures, strict=True))  # rounding knows no seed
        lines.append(f"| {first.grid or ''} | {first.method} | {' | '.join(', '.join(c) for c in columns)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "autoround"])
    parser.add_argument("--group_size", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 3, 4], help="of the calibration rows")
    parser.add_argument("--rows", type=int, default=64, help="calibration rows, and held-out rows")
    parser.add_argument("--steps", type=int, default=100, help="autoround's steps for each layer")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    print(table(run(options)))


if __name__ == "__main__":
    main()
