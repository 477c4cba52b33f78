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
from lightning_rlhf.strategies.colossalai import NAMES

#: The Trainer's options that a plan depends on; the others are parsed and ignored.
_PLANNED = ("accelerator", "accumulate_grad_batches", "devices", "num_nodes")


class InspectCLI(StageCLI):
    """The options of ``fit`` and a few more. It makes the module and the data module, but no Trainer."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Sets name and description."""
        about = (main.__doc__ or "").partition("Args:")[0]
        return super().init_parser(**{**kwargs, "prog": "lightning-rlhf inspect", "description": about})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the command's own options, and those of ``fit`` outside of ``model``, ``data`` and ``trainer``."""
        parser.add_argument(
            "--rows", type=NonNegativeInt, default=5, help="number of rows to show; 0 shows statistics only"
        )
        parser.add_argument(
            "--row", type=str | None, help="show this row only: its number, or its place such as my.jsonl:17"
        )
        parser.add_argument("--random", type=int | None, help="show rows drawn with this seed, not the first ones")
        parser.add_argument("--split", type=Split, default="train", help=f"rows to show: {', '.join(get_args(Split))}")
        parser.add_argument("--html", type=str | None, help="also write the output to this file, as a web page")
        parser.add_method_arguments(self.trainer_class, "fit", skip=self.subcommands()["fit"])

    def before_instantiate_classes(self) -> None:
        """Drops callbacks, loggers and strategies."""
        self.ranks_per_copy = _ranks_per_copy(self.config.trainer.strategy)
        for name in set(vars(self.config.trainer)) - set(_PLANNED):
            self.config.trainer[name] = None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Only what a plan depends on: a real Trainer might look for devices that this machine lacks."""
        trainer = self.config.trainer
        return SimpleNamespace(
            micro_batches=trainer.accumulate_grad_batches, ranks=max(1, _ranks(trainer) // self.ranks_per_copy)
        )


def main(args: Sequence[str] | None = None) -> None:
    """Shows rows as the model will see them: their tokens, which tokens the loss reads, and statistics of all rows.

    It takes the options of fit and loads no model: a tokenizer and a config are enough.

    Args:
        args: Command line after ``inspect``.
    """
    arguments = list(sys.argv[2:] if args is None else args)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"(?s).* rows (of .* skipped|were cut)")  # the output says so in full
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
        print(f"The same as a web page: {config.html}")


def _ranks_per_copy(strategy: Any) -> int:
    """Number of ranks that read the same data, from a strategy that is not made."""
    named = NAMES.get(strategy, {}) if isinstance(strategy, str) else getattr(strategy, "init_args", None) or {}
    return int(named.get("tp", 1)) * int(named.get("pp", 1)) * int(named.get("sp", 1))


def _ranks(trainer: Any) -> int:
    """Number of processes; ``auto`` means the devices of this machine."""
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
