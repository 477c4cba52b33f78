"""``lightning-rlhf plan``: whether a run fits into its devices, before it runs."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jsonargparse.typing import PositiveInt, restricted_number_type
from lightning.pytorch.cli import LightningArgumentParser

from lightning_rlhf.cli import cli, root_cause
from lightning_rlhf.keys import StageCLI
from lightning_rlhf.plan.planner import Answer, Planner, Settings
from lightning_rlhf.plan.speed import Device
from lightning_rlhf.plan.text import as_config, as_text, in_a_line, ranking
from lightning_rlhf.stages.rl import RLStage
from lightning_rlhf.strategies.colossalai import NAMES
from lightning_rlhf.utils.filesystem import check_writable
from lightning_rlhf.utils.logs import errors_only

_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_DEVICE = Device()
_Rate = restricted_number_type("_Rate", float, [(">", 0), ("<", float("inf"))])
_Share = restricted_number_type("_Share", float, [(">", 0), ("<=", 1)])
_Margin = restricted_number_type("_Margin", float, [(">=", 0), ("<", 1)])
#: Arguments of the strategy that memory depends on, and the fields of a layout that take them.
_FIELDS = {
    "bucket_elements": "bucket",
    "min_chunk_elements": "chunk",
    "offload_optim_frac": "offload_states",
    "offload_param_frac": "offload_weights",
    "micro_batches": "micro_batches",
}


class PlanCLI(StageCLI):
    """The options of ``fit`` and a few more. It makes the module and the data module, but no Trainer."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Sets name and description, and adds the command's own options: help lists them in this order, so first."""
        about = (main.__doc__ or "").partition("Args:")[0]
        parser = super().init_parser(**{**kwargs, "prog": "lightning-rlhf plan", "description": about})
        add = parser.add_argument
        add(
            "--devices", type=PositiveInt | None, help="number of devices; default: trainer.devices x trainer.num_nodes"
        )
        add("--memory", type=str, default="80GB", help="memory of each, such as 80GB or 24GiB")
        add("--margin", type=_Margin, default=0.05, help="share of it that nothing may use: the driver's, and holes")
        add("--search", type=bool, default=False, help="true: rank layouts, and choose the fastest that fits")
        add("--out", type=str | None, help="write a config of the layout to this file")
        flops = (
            "operations a device does in a second. The defaults of this and the next two are an A100's, and this one's "
            "is for bf16: speeds in other precisions and on other cards need numbers of their own"
        )
        add("--flops", type=_Rate, default=_DEVICE.flops, help=flops)
        add("--bandwidth", type=_Rate, default=_DEVICE.bandwidth, help="bytes read of its memory in a second")
        add("--link", type=_Rate, default=_DEVICE.link, help="bytes sent to another device in a second")
        share = "share of the operations that training reaches"
        add("--utilization", type=_Share, default=_DEVICE.utilization, help=share)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds those of ``fit`` outside of ``model``, ``data`` and ``trainer``."""
        parser.add_method_arguments(self.trainer_class, "fit", skip=self.subcommands()["fit"])

    def before_instantiate_classes(self) -> None:
        """Keeps what a plan depends on, and drops callbacks, loggers and strategies."""
        trainer = self.config.trainer
        self.asked = SimpleNamespace(**vars(trainer))
        self.asked.strategy = strategy_arguments(trainer.strategy)
        for name in vars(trainer):
            trainer[name] = None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: a real one would look for devices that this machine lacks."""
        return None


def main(args: Sequence[str] | None = None) -> None:
    """Tells what a rank holds and how fast a run is, from configs alone: no weights, no GPU, no data are read.

    It takes the options of fit, and runs the stage's own step on tensors without numbers.

    Args:
        args: Command line after ``plan``.
    """
    arguments = [a if a != "--search" else "--search=true" for a in (sys.argv[2:] if args is None else args)]
    try:
        # what libraries warn of and log concerns runs, and nothing runs
        with warnings.catch_warnings(), errors_only("lightning.pytorch", "lightning_rlhf", "transformers"):
            warnings.simplefilter("ignore")
            made = cli(arguments, run=False, kind=PlanCLI)
            if made.config.out is not None:
                check_writable(made.config.out, "the config", "--out")  # a search may take minutes
            text, answer, settings = plan(made)
    except (OSError, ValueError) as error:
        sys.exit(f"lightning-rlhf plan: {' '.join(str(root_cause(error)).split())}")
    print(text)
    if made.config.out is not None:
        by_stage = isinstance(made.model, RLStage)
        config = as_config(answer, type(made.model).__name__, not by_stage, settings.on_gpu, settings.precision)
        out = Path(made.config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(config, encoding="utf-8")
        print(f"\nA config of it: {made.config.out}")


def plan(made: PlanCLI) -> tuple[str, Answer, Settings]:
    """Plans what a command line says.

    Args:
        made: The command line.

    Returns:
        What is printed, the layout that is chosen, and what it was chosen for.

    Raises:
        OSError: A model's config is not here.
        ValueError: An option is wrong, or a layout can't be.
    """
    config, asked = made.config, made.asked
    settings = Settings(
        devices=config.devices or count_devices(asked),
        memory=parse_memory(config.memory),
        device=Device(config.flops, config.bandwidth, config.link, config.utilization),
        precision=str(asked.precision or "32-true"),
        accumulate=asked.accumulate_grad_batches,
        clip=asked.gradient_clip_val,
        on_gpu=asked.accelerator != "cpu",
        margin=config.margin,
    )
    planner = Planner(made.model, made.datamodule, settings)
    if config.search:
        answers = planner.search(lambda answer: print(in_a_line(answer), file=sys.stderr))
        return f"{ranking(answers)}\n\n{as_text(answers[0], settings)}", answers[0], settings
    answer = planner.answer(planner.layout(**_arguments(asked.strategy, settings)))
    return as_text(answer, settings), answer, settings


def parse_memory(text: str) -> int:
    """Bytes of a size for people.

    Args:
        text: A number and a unit.

    Raises:
        ValueError: It is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", text.upper())
    if found is None or not float(found[1]):
        raise ValueError(f"--memory {text}: give a number and a unit, such as 80GB or 24GiB.")
    return int(float(found[1]) * _UNITS[found[2]])


def strategy_arguments(given: Any) -> dict[str, Any]:
    """Arguments of ColossalAIStrategy, from a strategy that is not made.

    Raises:
        ValueError: It is another strategy than DDP and ours.
    """
    if isinstance(given, str):
        if given.startswith("ddp") or given == "auto":
            return {"plugin": "ddp"}
        if given in NAMES:
            return dict(NAMES[given])
    elif str(getattr(given, "class_path", "")).endswith(".ColossalAIStrategy"):
        return dict(vars(given.init_args))
    raise ValueError(
        f"trainer.strategy={getattr(given, 'class_path', given)} can't be planned: give auto, ddp, one of "
        f"{', '.join(NAMES)}, or use --search."
    )


def _arguments(strategy: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Arguments of a layout."""
    fields = {to: strategy[name] for name, to in _FIELDS.items() if name in strategy}
    plugin = strategy.get("plugin", "zero2")
    if strategy.get("cpu_offload"):
        fields["offload_states"] = 1.0
    if plugin != "gemini":
        fields["overlaps"] = strategy.get("overlap_communication", True) and settings.on_gpu
    return {"plugin": plugin, **{axis: strategy.get(axis, 1) for axis in ("tp", "pp", "sp")}, **fields}


def count_devices(trainer: Any) -> int:
    """Number of devices of a Trainer.

    Raises:
        ValueError: It leaves that to the machine.
    """
    devices = trainer.devices
    if isinstance(devices, (list, tuple)):
        return len(devices) * int(trainer.num_nodes)
    if str(devices).isdigit():
        return int(devices) * int(trainer.num_nodes)
    raise ValueError(f"trainer.devices={devices} asks the machine that it runs on: give --devices.")
