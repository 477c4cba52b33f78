"""``lightning-rlhf inspect``: rows as the model will see them."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, get_args

import torch
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch.cli import LightningArgumentParser

from lightning_rlhf.cli import cli, root_cause
from lightning_rlhf.inspection.page import write_page
from lightning_rlhf.inspection.rows import Split, inspect_data
from lightning_rlhf.inspection.terminal import as_text
from lightning_rlhf.keys import StageCLI

#: What a plan depends on; all else of the Trainer's is parsed and left alone.
_PLANNED = ("accelerator", "accumulate_grad_batches", "devices", "num_nodes")


class InspectCLI(StageCLI):
    """The options of ``fit`` and a few more; makes the module and the data module, and no Trainer."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Adds name and description."""
        about = (main.__doc__ or "").partition("Args:")[0]
        return super().init_parser(**{**kwargs, "prog": "lightning-rlhf inspect", "description": about})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the command's own options, and those of ``fit`` that are neither model's, data's nor Trainer's."""
        parser.add_argument("--rows", type=NonNegativeInt, default=5, help="how many are shown; 0: figures alone")
        parser.add_argument("--row", type=str | None, help="the one to show: number, or place such as my.jsonl:17")
        parser.add_argument("--random", type=int | None, help="show rows drawn by this seed, not the first")
        parser.add_argument("--split", type=Split, default="train", help=f"of {', '.join(get_args(Split))}")
        parser.add_argument("--html", type=str | None, help="write a page with the same content to this file")
        parser.add_method_arguments(self.trainer_class, "fit", skip=self.subcommands()["fit"])

    def before_instantiate_classes(self) -> None:
        """Keeps callbacks, loggers and strategies from being made."""
        for name in set(vars(self.config.trainer)) - set(_PLANNED):
            self.config.trainer[name] = None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Only what a plan depends on: a Trainer might look for devices that are not here."""
        trainer = self.config.trainer
        return SimpleNamespace(micro_batches=trainer.accumulate_grad_batches, ranks=_ranks(trainer))


def main(args: Sequence[str] | None = None) -> None:
    """Shows rows as the model will see them: tokens, what the loss reads of them, and figures over all rows.

    Takes the options of fit and loads no model: a tokenizer and a config are enough.

    Args:
        args: Command line after ``inspect``.
    """
    arguments = list(sys.argv[2:] if args is None else args)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"(?s).* rows (of .* skipped|were cut)")  # said below, in full
            made = cli(arguments, run=False, kind=InspectCLI)
            config = made.config
            found = inspect_data(
                made.model,
                made.datamodule,
                config.split,
                config.rows,
                config.row,
                config.random,
                made.trainer.micro_batches,
                made.trainer.ranks,
            )
        if config.html is not None:
            write_page(config.html, found)
    except (OSError, ValueError) as error:
        sys.exit(f"lightning-rlhf inspect: {root_cause(error)}")
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(as_text(found, shutil.get_terminal_size((100, 24)).columns, color))
    if config.html is not None:
        print(f"The same as a page: {config.html}")


def _ranks(trainer: Any) -> int:
    """Data-parallel size; ``auto`` is what this machine has."""
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part]
    if isinstance(devices, (list, tuple)):
        count = len(devices)
    elif str(devices).isdigit():
        count = int(devices)
    else:
        count = 1 if trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())
    return count * int(trainer.num_nodes)
