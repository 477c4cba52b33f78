"""Compares ways to quantize a model: quality on held-out rows, bytes, speed and memory, in a table and as JSON."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_rlhf.models.loading import Dtype, load_config, load_exported
from lightning_rlhf.quantize.autoround import STEPS
from lightning_rlhf.quantize.calibration import Rows, check_text, check_tokens, shapes_of
from lightning_rlhf.quantize.grid import CALIBRATED, GRIDLESS, Grid, check_method, check_shapes
from lightning_rlhf.quantize.measure import (
    Quality,
    Reference,
    perplexity,
    quality,
    remember,
    storage_bytes,
    tokens_per_second,
)
from lightning_rlhf.quantize.methods import quantize
from lightning_rlhf.utils.memory import PeakMemory

FILE = "compare.json"
"""Name of the file with all results."""
NONE = "none"
"""The method of the unquantized model."""
_PROMPT = 8


@dataclass(frozen=True)
class Result:
    """One model of a comparison.

    Attributes:
        method: How it was quantized; ``none`` for the model itself.
        grid: Its grid; None for the model itself, and for the formats of bitsandbytes.
        perplexity: On the held-out rows.
        kl: Mean KL(unquantized || this) per token of the held-out rows, in nats.
        bytes: Bytes of all storages of the loaded model.
        tokens_per_second: Speed of greedy decoding of one sequence.
        peak_bytes: Peak memory of loading and decoding; None where the system doesn't tell.
        seconds: Time that quantizing took.
        directory: Where the model is.
    """

    method: str
    grid: Grid | None
    perplexity: float
    kl: float
    bytes: int
    tokens_per_second: float
    peak_bytes: int | None
    seconds: float
    directory: str

    def __str__(self) -> str:
        name = self.method if self.grid is None else f"{self.method}, {self.grid}"
        return f"{name}: perplexity {self.perplexity:.4f}, KL {self.kl:.5f}"


@dataclass
class Comparison:
    """Results so far.

    Attributes:
        model: The model's directory or hub id.
        device: Where all was measured.
        dtype: Data type of what is not quantized.
        calibration: Number of calibration rows and tokens, and the model's perplexity on them.
        held_out: Number of held-out rows and of the tokens that are predicted in them.
        results: The model itself, then one per method and grid.
    """

    model: str
    device: str
    dtype: str
    calibration: dict[str, float]
    held_out: dict[str, float]
    results: list[Result] = field(default_factory=list)

    def winners(self) -> dict[Grid, Result]:
        """For each grid that several methods were measured on, the result with the lowest KL."""
        grids = dict.fromkeys(result.grid for result in self.results if result.grid is not None)
        return {grid: min(found, key=lambda r: r.kl) for grid in grids if len(found := self._on(grid)) > 1}

    def _on(self, grid: Grid) -> list[Result]:
        return [result for result in self.results if result.grid == grid]

    def table(self) -> str:
        """The results as a table, and a line for each grid that says which method is best."""
        lines = [_HEAD, *map(_cells, self.results)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip() for first, *rest in lines
        ]
        for grid, best in self.winners().items():
            others = ", ".join(f"{r.method} {r.kl:.5f}" for r in self._on(grid) if r is not best)
            shown.append(f"{grid}: {best.method} is best, KL {best.kl:.5f} ({others})")
        return "\n".join(shown)

    def write(self, path: Path) -> None:
        """Writes everything as JSON. The file is replaced at once, so a crash leaves the former one."""
        winners = [{**asdict(grid), "method": best.method, "kl": best.kl} for grid, best in self.winners().items()]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asdict(self) | {"winners": winners}, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)


_HEAD = ("method", "bits", "group", "sym", "perplexity", "KL", "MB", "tokens/s", "peak MB", "seconds")


def _cells(result: Result) -> tuple[str, ...]:
    grid = result.grid
    return (
        result.method,
        *(("", "", "") if grid is None else (str(grid.bits), str(grid.group_size), "yes" if grid.sym else "no")),
        f"{result.perplexity:.4f}",
        f"{result.kl:.5f}",
        f"{result.bytes / 1e6:.2f}",
        f"{result.tokens_per_second:.1f}",
        "" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:.1f}",
        f"{result.seconds:.1f}" if result.seconds else "",
    )


# -------------------------------------------------------------------------------------------------------- measuring


def compare_methods(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    methods: Sequence[str],
    grids: Sequence[Grid],
    rows: Rows,
    *,
    dtype: Dtype = "float32",
    device: torch.device | str = "cpu",
    steps: int = STEPS,
    trust_remote_code: bool = False,
    report: Callable[[str], None] = print,
) -> Comparison:
    """Quantizes a model by each method on each grid, and measures the results.

    One model is in memory at a time: of the unquantized model only the head and its inputs on the held-out rows are
    kept. Each quantized model stays in a directory of ``out``, and ``compare.json`` there is written after each.

    Args:
        source: Directory or hub id of a model or of adapters.
        out: Directory for the quantized models and ``compare.json``.
        methods: Names of methods. ``nf4`` and ``int8`` have no grid of ours, and come once.
        grids: The grids.
        rows: Calibration and held-out rows.
        dtype: Data type of what is not quantized, and of the model itself.
        device: Where the models are measured.
        steps: Steps of ``autoround`` for each layer.
        trust_remote_code: Run code that comes with the model.
        report: Called with a line for each model.

    Raises:
        DataError: There are too few calibration tokens for a method that needs them.
        FileExistsError: ``out`` holds something else.
        ValueError: There is no such method, a layer does not fit a grid, or the model is not a language model.
    """
    folder = Path(out)
    check_folder(folder)
    for method in methods:
        check_method(method)
    architectures = load_config(source, trust_remote_code).architectures or []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        raise ValueError(f"{source} is a reward model, which predicts no tokens. Compare language models.")
    shapes = shapes_of(source, trust_remote_code)
    for _, grid in settings(methods, grids):
        if grid is not None:
            check_shapes(shapes, grid)
    if any(method in CALIBRATED for method in methods):
        check_tokens(rows.calibration, shapes)
    folder.mkdir(parents=True, exist_ok=True)
    bench = _Bench(rows, dtype, device, trust_remote_code)
    results = [bench.measure(source, NONE, None, 0.0)]
    check_text(bench.known, results[0].perplexity)
    found = Comparison(
        model=str(source),
        device=str(device),
        dtype=dtype,
        calibration=_count(rows.calibration) | {"perplexity": bench.known},
        held_out=_count(rows.held_out),
        results=results,
    )
    found.write(folder / FILE)
    report(str(results[0]))
    wanted = settings(methods, grids)
    try:
        for method, grid in wanted:
            start = time.perf_counter()
            made = quantize(
                source, folder / _name(method, grid), method, grid or Grid(), rows.calibration,
                steps=steps, trust_remote_code=trust_remote_code,
            )  # fmt: skip
            results.append(bench.measure(made, method, grid, time.perf_counter() - start))
            found.write(folder / FILE)
            report(str(results[-1]))
    except BaseException:
        report(f"{len(results) - 1} of {len(wanted)} are done: {folder / FILE}")
        raise
    return found


def settings(methods: Sequence[str], grids: Sequence[Grid]) -> list[tuple[str, Grid | None]]:
    """Returns what is compared: each method on each grid, and the methods without a grid of ours once."""
    on_grids = [(method, grid) for grid in grids for method in methods if method not in GRIDLESS]
    return [*on_grids, *((method, None) for method in methods if method in GRIDLESS)]


def _name(method: str, grid: Grid | None) -> str:
    """The name of a quantized model's directory."""
    if grid is None:
        return method
    return f"{method}-{grid.bits}bit-g{grid.group_size}-{'sym' if grid.sym else 'asym'}"


def check_folder(out: Path) -> None:
    """Checks that a comparison can be written to a directory.

    Raises:
        FileExistsError: It is a file, or holds something other than a comparison.
    """
    if out.is_dir() and ((out / FILE).exists() or not any(out.iterdir())):
        return
    if out.exists():
        raise FileExistsError(f"{out} exists and holds no {FILE}. Choose another directory, or move it away.")


def _count(rows: Sequence[Tensor]) -> dict[str, float]:
    return {"rows": len(rows), "tokens": sum(map(len, rows))}


class _Bench:
    """Measures one model after another. The first is the unquantized one, to which it compares the others."""

    def __init__(self, rows: Rows, dtype: Dtype, device: torch.device | str, trust_remote_code: bool) -> None:
        self.rows, self.dtype, self.device, self.trust_remote_code = rows, dtype, device, trust_remote_code
        self.reference: Reference | None = None
        self.known = math.nan
        self.loaded = {NONE}

    def measure(self, directory: str | os.PathLike[str], method: str, grid: Grid | None, seconds: float) -> Result:
        """Loads a model and measures it; nothing of it but the reference stays in memory."""
        kind = method if grid is None else "gptq"
        if kind not in self.loaded:  # the libraries of a format do not count as memory of its first model
            _load(directory, self.dtype, self.device, self.trust_remote_code)
            self.loaded.add(kind)
        peak = PeakMemory(self.device)
        model = _load(directory, self.dtype, self.device, self.trust_remote_code)
        speed = tokens_per_second(model, self.rows.held_out[0][:_PROMPT])
        most = peak.bytes()
        if self.reference is None:
            self.reference, own = remember(model, self.rows.held_out)
            self.known = perplexity(model, self.rows.calibration)
            found = Quality(own, 0.0)
        else:
            found = quality(model, self.rows.held_out, self.reference)
        return Result(method, grid, *found, storage_bytes(model), speed, most, seconds, os.fspath(directory))


def check_known(
    source: str | os.PathLike[str],
    rows: Rows,
    trust_remote_code: bool = False,
    *,
    device: torch.device | str = "cpu",
    max_rows: int = 32,
) -> None:
    """Warns if the model knows the calibration text much less well than the held-out rows.

    Args:
        source: Directory or hub id of the model.
        rows: Calibration and held-out rows.
        trust_remote_code: Run code that comes with the model.
        device: Where the model runs.
        max_rows: Maximum number of rows to read of each.
    """
    model = _load(source, None, device, trust_remote_code)
    if model.get_output_embeddings() is not None:  # a reward model predicts no tokens
        check_text(*(perplexity(model, part[:max_rows]) for part in rows))


def _load(
    source: str | os.PathLike[str], dtype: Dtype | None, device: torch.device | str, trust_remote_code: bool
) -> PreTrainedModel:
    with torch.device(device):
        model = load_exported(source, dtype, trust_remote_code)
    return model if model.device.type == torch.device(device).type else model.to(device)  # type: ignore[arg-type]
