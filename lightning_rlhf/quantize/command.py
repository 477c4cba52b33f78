"""``lightning-rlhf quantize MODEL``: writes a model with weights of 4 or 8 bits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rlhf.arguments import Parser, add_model_options

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_rlhf.quantize.calibration import Rows
    from lightning_rlhf.quantize.grid import Grid

_ABOUT = """\
Rounds the linear layers of a model to 4 or 8 bits and writes the result as a directory that transformers and vLLM read.
MODEL is anything that a stage exported, a reward model or adapters included, or a hub id. Of a run's folder hf/best is
taken, or else hf/last."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Arguments after ``quantize``.
    """
    parser = _parser()
    options = parser.parse_args(args)
    try:
        _check_options(options, parser)
        _run(options)
    except (OSError, ImportError, TypeError, ValueError) as error:
        said = " ".join(str(error).split()).replace("on_bad_row: skip", "--on-bad-row skip")
        sys.exit(f"lightning-rlhf quantize: {said}")


def _parser() -> Parser:
    parser = Parser("quantize", _ABOUT)
    parser.add_argument("model", metavar="MODEL", help="a run, a directory of a model or of adapters, or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--method", default="gptq",
        help="gptq; autoround, which is more exact and takes longer; rtn, which rounds each weight alone; nf4 or int8, "
        "the formats of QLoRA; default: gptq",
    )  # fmt: skip
    parser.add_argument(
        "--compare", nargs="+", metavar="METHOD",
        help="instead of --method: quantize by each of these on every grid, and measure which is best; models and "
        "compare.json go to --out",
    )  # fmt: skip
    parser.add_argument(
        "--bits", type=int, default=4, help="bits of a weight, 4 or 8; fewer are smaller and less exact"
    )
    parser.add_argument(
        "--group_size", "--group-size", type=int, nargs="+", default=[128],
        help="weights that share a scale: 32, 64, 128 or 256; fewer are more exact; several with --compare",
    )  # fmt: skip
    parser.add_argument(
        "--sym", type=_truth, nargs="*", default=[True], metavar="true|false",
        help="center the weights' grid on 0, which every kernel reads; false fits each group; both with --compare; "
        "default: true",
    )  # fmt: skip
    dtype = "data type of what is not quantized, such as embeddings; default: the model's own"
    add_model_options(parser, "--dtype", "--trust-remote-code", dtype=dtype)
    parser.add_argument(
        "--steps", type=int, default=200, help="autoround's steps for each layer; more are more exact, and slower"
    )
    texts = parser.add_argument_group("texts of gptq, autoround and --compare")
    texts.add_argument(
        "--data", default="bundled",
        help="calibration rows: file, glob, hub id or bundled, in any format of conversations, preferences or prompts, "
        "or plain text",
    )  # fmt: skip
    texts.add_argument("--held-out", help="rows to measure on, as --data; default: a tenth of --data")
    texts.add_argument(
        "--max-rows", type=int, default=512, help="calibration rows to use, drawn at random; more are better and slower"
    )
    texts.add_argument(
        "--max-held-out", type=int, default=128, help="rows to measure on; more give exacter figures and are slower"
    )
    texts.add_argument("--seed", type=int, default=0, help="seed of what is held out and drawn")
    add_model_options(texts, "--chat-template")
    texts.add_argument(
        "--on-bad-row", choices=("raise", "skip"), default="raise", help="stop at a bad row, or count it"
    )
    return parser


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _check_options(options: argparse.Namespace, parser: Parser) -> None:
    """Refuses options that the chosen methods would ignore.

    Raises:
        ValueError: One is so, or a value is out of range.
    """
    from lightning_rlhf.quantize.grid import CALIBRATED, GRIDLESS, METHODS, check_method

    methods = options.compare or [options.method]
    for method in methods:
        check_method(method)
    on_grids = [method for method in METHODS if method not in GRIDLESS]
    texts = {} if options.compare else dict.fromkeys(("data", "held_out", "chat_template"), CALIBRATED)
    users = {**dict.fromkeys(("bits", "group_size", "sym"), on_grids), **texts, "steps": ["autoround"]}
    for name, able in users.items():
        if getattr(options, name) != parser.get_default(name) and not {*methods} & {*able}:
            option = "--" + (name if name == "group_size" else name.replace("_", "-"))
            raise ValueError(f"{option} is for {', '.join(able)}: {', '.join(methods)} would ignore it. Leave it out.")
    for name, value in (("--max-rows", options.max_rows), ("--max-held-out", options.max_held_out)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")


def _run(options: argparse.Namespace) -> None:
    from lightning_rlhf.models.runs import find_model
    from lightning_rlhf.quantize.calibration import shapes_of
    from lightning_rlhf.quantize.compare import settings
    from lightning_rlhf.quantize.grid import Grid, check_shapes
    from lightning_rlhf.quantize.methods import check_not_quantized

    grids = [Grid(options.bits, size, sym) for sym in options.sym or [True] for size in options.group_size]
    if len(grids) > 1 and not options.compare:
        raise ValueError("several values of --group_size or --sym are for --compare. Give one.")
    source = find_model(options.model)
    check_not_quantized(source, options.trust_remote_code)
    for _, grid in settings(options.compare or [options.method], grids):
        if grid is not None:
            check_shapes(shapes_of(source, options.trust_remote_code), grid)
    if options.compare:
        _compare(options, source, grids)
    else:
        _quantize(options, source, grids[0])


def _quantize(options: argparse.Namespace, source: Path | str, grid: Grid) -> None:
    from lightning_rlhf.quantize.compare import check_known
    from lightning_rlhf.quantize.grid import CALIBRATED, GRIDLESS
    from lightning_rlhf.quantize.methods import check_out, compute_device, quantize

    check_out(options.out)
    on_grid = "" if options.method in GRIDLESS else f", {grid}"
    print(f"{source}: {options.method}{on_grid}", flush=True)
    rows: list[Tensor] = []
    if options.method in CALIBRATED:
        texts = _texts(options, source, [options.method])
        check_known(source, texts, options.trust_remote_code, device=compute_device())
        rows = texts.calibration
    written = quantize(
        source, options.out, options.method, grid, rows,
        dtype=options.dtype, steps=options.steps, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in written.glob("*.safetensors"))
    print(f"{written}: {size / 1e6:,.1f} MB of weights")


def _compare(options: argparse.Namespace, source: Path | str, grids: list[Grid]) -> None:
    from lightning_rlhf.quantize.compare import FILE, check_folder, compare_methods
    from lightning_rlhf.quantize.methods import compute_device

    check_folder(options.out)
    texts = _texts(options, source, options.compare)
    device = compute_device()
    found = compare_methods(
        source, options.out, options.compare, grids, texts,
        dtype=options.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
        device=device, steps=options.steps, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    print(f"\n{found.table()}\n\nAll figures: {options.out / FILE}")


def _texts(options: argparse.Namespace, source: Path | str, methods: list[str]) -> Rows:
    """Reads calibration rows and held-out rows, and checks that there are enough."""
    from lightning_rlhf.data.templates import set_chat_template
    from lightning_rlhf.models.loading import load_config, load_tokenizer
    from lightning_rlhf.quantize.calibration import check_tokens, read_rows, shapes_of
    from lightning_rlhf.quantize.grid import CALIBRATED

    tokenizer = load_tokenizer(source, options.trust_remote_code)
    if options.chat_template is not None and set_chat_template(tokenizer, options.chat_template):
        raise ValueError(f"the model does not know the tokens of --chat-template {options.chat_template}.")
    config = load_config(source, options.trust_remote_code).get_text_config()
    texts = read_rows(
        options.data,
        tokenizer,
        getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length,
        held_out=options.held_out,
        max_rows=options.max_rows,
        max_held_out=options.max_held_out,
        seed=options.seed,
        on_bad_row=options.on_bad_row,
    )
    if any(method in CALIBRATED for method in methods):
        check_tokens(texts.calibration, shapes_of(source, options.trust_remote_code))
    for name, part in (("calibration", texts.calibration), ("held out", texts.held_out)):
        print(f"{name}: {len(part):,} rows, {sum(map(len, part)):,} tokens", flush=True)
    return texts
