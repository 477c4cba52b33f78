"""``lightning-rlhf quantize MODEL``: writes a model with weights of 4 or 8 bits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rlhf.arguments import Parser

if TYPE_CHECKING:
    from torch import Tensor

_ABOUT = """\
Rounds the linear layers of a model to 4 or 8 bits and writes the result as a directory that transformers and vLLM read.
MODEL is anything that a stage exported, a reward model or adapters included, or a hub id."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Arguments after ``quantize``.
    """
    options = _parser().parse_args(args)
    try:
        _run(options)
    except (OSError, ImportError, TypeError, ValueError) as error:
        sys.exit(f"lightning-rlhf quantize: {' '.join(str(error).split())}")


def _parser() -> Parser:
    parser = Parser("quantize", _ABOUT)
    parser.add_argument("model", metavar="MODEL", help="directory or hub id of the model")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--method", default="gptq",
        help="gptq; autoround, which is more exact and takes longer; rtn, which rounds each weight alone; nf4 or int8, "
        "the formats of QLoRA; default: gptq",
    )  # fmt: skip
    parser.add_argument(
        "--data", default="bundled",
        help="calibration rows: file, glob, hub id or bundled, in any format of conversations, preferences or prompts",
    )  # fmt: skip
    parser.add_argument(
        "--bits", type=int, default=4, help="bits of a weight, 4 or 8; fewer are smaller and less exact"
    )
    parser.add_argument(
        "--group_size",
        type=int,
        default=128,
        help="weights that share a scale: 32, 64, 128 or 256; fewer are more exact",
    )
    parser.add_argument(
        "--sym", type=_truth, nargs="?", const=True, default=True, metavar="true|false",
        help="center the weights' grid on 0, which every kernel reads; false fits each group; default: true",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="data type of what is not quantized, such as embeddings; default: the model's own",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, default=200, help="autoround's steps for each layer; more are more exact, and slower"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _run(options: argparse.Namespace) -> None:
    from lightning_rlhf.models.loading import load_config, load_tokenizer
    from lightning_rlhf.models.pretrained import obtain
    from lightning_rlhf.quantize.calibration import read_rows
    from lightning_rlhf.quantize.grid import CALIBRATED, Grid, check_method
    from lightning_rlhf.quantize.methods import check_not_quantized, quantize

    check_method(options.method)
    grid = Grid(options.bits, options.group_size, options.sym)
    source = obtain(options.model)
    check_not_quantized(source, options.trust_remote_code)
    on_grid = "" if options.method in ("nf4", "int8") else f", {grid}"
    print(f"{source}: {options.method}{on_grid}", flush=True)
    rows: list[Tensor] = []
    if options.method in CALIBRATED:
        tokenizer = load_tokenizer(source, options.trust_remote_code)
        context = load_config(source, options.trust_remote_code).get_text_config().max_position_embeddings
        rows = read_rows(options.data, tokenizer, context).calibration
        print(f"calibration: {len(rows):,} rows, {sum(map(len, rows)):,} tokens of {options.data}", flush=True)
    written = quantize(
        source, options.out, options.method, grid, rows,
        dtype=options.dtype, steps=options.steps, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in written.glob("*.safetensors"))
    print(f"{written}: {size / 1e6:,.1f} MB of weights")
