"""The command ``lightning-rlhf``: tools, and a LightningCLI whose subcommands are the Trainer's methods."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_rlhf.arguments import did_you_mean
from lightning_rlhf.quiet import quiet
from lightning_rlhf.utils.imports import search_current_directory

COMMANDS = ("fit", "validate", "test", "predict")
#: Tools beside the Trainer's methods: name, "module:function" that takes the other arguments, and one line of help.
TOOLS = {
    "inspect": ("lightning_rlhf.inspection.command:main", "show rows as the model sees them; takes the options of fit"),
    "plan": ("lightning_rlhf.plan.command:main", "tell what fits into how many devices; takes the options of fit"),
    "configs": ("lightning_rlhf.config_files:main", "list the config files that come with the package, or copy one"),
    "demo": ("lightning_rlhf.demo:main", "train a small real model with SFT, reward model and PPO on bundled data"),
    "collect": (
        "lightning_rlhf.collection.command:main",
        "grow instruction data from seeds, or rank answers to prompts, with any model",
    ),
    "data": ("lightning_rlhf.cleaning.command:main", "look at data, clean it, write it in another format"),
    "score-reference": (
        "lightning_rlhf.score_reference:main",
        "compute a reference's log-probs ahead of DPO; takes the options of fit",
    ),
    "verify": ("lightning_rlhf.rewards.command:main", "score completions of a file by reward functions"),
    "win-rate": ("lightning_rlhf.evaluation.command:main", "measure how often one model's answers beat another's"),
    "quantize": ("lightning_rlhf.quantize.command:main", "make a model of 4 or 8 bits: GPTQ, AutoRound, rounding"),
    "export": ("lightning_rlhf.export.command:main", "hand a model on: merged weights, adapters alone, or a GGUF file"),
    "serve": ("lightning_rlhf.serving.command:main", "serve a run's models over HTTP, with OpenAI's interface"),
    "chat": ("lightning_rlhf.chat.command:main", "talk to a run's models in the terminal, and save what you think"),
    "report": ("lightning_rlhf.report.compare:main", "compare runs on one page: curves, answers, settings"),
}

USAGE = """\
usage: lightning-rlhf COMMAND ...

RLHF as PyTorch Lightning modules.

  fit       train: lightning-rlhf fit --config configs/sft/smollm2_lora.yaml --data.train my.jsonl
  validate  measure loss, accuracy ... of a model or checkpoint on validation data
  test      measure the same on test data
  predict   write a record per row of --data.predict FILE: log-probs (SFT), scores (Reward) or implicit rewards (DPO,
            KTO) of its answers; of stages that sample (PPO, GRPO, online DPO) completions with their scores
{tools}
Each command has its own --help. fit --print_config lists all keys;
fit --model.help RewardModule and fit --data.help PreferenceDataModule explain them.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Arguments without the program's name. Default: ``sys.argv``.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        tools = "".join(
            f"  {name:9s} {text}\n" if len(name) < 10 else f"  {name}\n{'':12s}{text}\n"
            for name, (_, text) in TOOLS.items()
        )
        print(USAGE.format(tools=tools))
        return
    if arguments[0] == "--version":
        from lightning_rlhf import __version__

        print(__version__)
        return
    quiet()
    known = (*COMMANDS, *TOOLS)
    if arguments[0] not in known and not arguments[0].startswith("-"):
        near = did_you_mean(arguments[0], known)
        print(f"lightning-rlhf: there is no command {arguments[0]}{near} All: {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    try:
        with search_current_directory():
            if arguments[0] in TOOLS:
                module, function = TOOLS[arguments[0]][0].split(":")
                getattr(importlib.import_module(module), function)(arguments[1:])
            else:
                _stage(arguments[0], args)
    except KeyboardInterrupt:  # nothing is running that could be saved
        print("SIGINT: stopped.", file=sys.stderr)
        sys.exit(130)


def _stage(command: str, args: Sequence[str] | None) -> None:
    """Runs one of the Trainer's methods."""
    try:
        cli(args)
    except Exception as error:
        found = _of_hardware(error) or root_cause(error)
        if not _explains_itself(found, found is not error):
            raise
        sys.exit(f"lightning-rlhf {command}: {' '.join(str(found).split())}")


def _of_hardware(error: BaseException) -> ValueError | None:
    """Makes one line of Lightning's error on a strategy, an accelerator or devices; None if it is none of these."""
    frames = traceback.extract_tb(error.__traceback__)
    name = Path(frames[-1].filename).as_posix() if frames else ""
    if not isinstance(error, (TypeError, ValueError)) or not re.search(
        r"lightning/(pytorch/trainer/connectors|fabric/accelerators)/\w+\.py$", name
    ):
        return None
    if wrong := re.match(r"You selected an invalid strategy name: `strategy='([^']*)'`", str(error)):
        from lightning.pytorch.strategies import StrategyRegistry

        known = sorted(["auto", *StrategyRegistry.available_strategies()])
        ends = [word for word in known if word.endswith(f"_{wrong[1]}")]
        near = f"; did you mean {ends[0]}?" if ends else did_you_mean(wrong[1], known)
        return ValueError(f"trainer.strategy: there is no strategy {wrong[1]}{near} All: {', '.join(known)}")
    return ValueError(str(error))


def _explains_itself(error: BaseException, of_settings: bool) -> bool:
    """Whether an error's message is enough without a traceback: wrong settings, a bad row, or a missing file."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lightning_rlhf.data.errors import DataError
    from lightning_rlhf.rewards.base import RewardError
    from lightning_rlhf.rollout.environment import TurnError
    from lightning_rlhf.utils import CheckpointError

    if of_settings and isinstance(error, (OSError, ValueError)):
        return True
    if isinstance(error, ValueError) and _raised_here(error):
        return True
    if isinstance(error, FileNotFoundError):
        return error.errno is None  # with a number it comes from the system
    if isinstance(error, ImportError):
        return error.name is None  # with a name it comes from Python
    return isinstance(error, (DataError, RewardError, TurnError, CheckpointError, MisconfigurationException))


def _raised_here(error: BaseException) -> bool:
    """Returns True if this package raised an error by a statement of its own. Its message is then for users."""
    frames = traceback.extract_tb(error.__traceback__)
    within = Path(__file__).parent
    return bool(frames) and within in Path(frames[-1].filename).parents and (frames[-1].line or "").startswith("raise ")


#: How jsonargparse begins a message on a value that fits none of the types of its key, and that on one of these types.
_NO_TYPE, _OTHER_TYPE = "Does not validate against any of the Union subtypes", "Expected a "


def root_cause(error: BaseException) -> BaseException:
    """Finds the error of a class with wrong settings, which jsonargparse hides in a long error of its own.

    It tries all types of a key, and names the first one's error as the cause: of ``trainer.strategy``, that an object
    is not a string. What the object's class said is only in the text.

    Args:
        error: An error. Any other error is returned unchanged.
    """
    while str(error).startswith(_NO_TYPE):
        told = str(error).partition("\nErrors:\n")[2].rpartition("\nGiven value type:")[0]
        reasons = re.split(r"^  - ", told, flags=re.MULTILINE)[1:]
        meant = [reason for reason in reasons if not reason.startswith(_OTHER_TYPE)]
        if meant and meant[0] is not reasons[0]:
            error = ValueError(re.sub(r"^    ", "", meant[0].rstrip(), flags=re.MULTILINE))
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            break
    return error


def cli(args: Sequence[str] | None, run: bool = True, kind: Any = None) -> Any:
    """Builds the LightningCLI of all stages, and runs its subcommand.

    Args:
        args: Arguments without the program's name. None: ``sys.argv``.
        run: Read a subcommand and run it. False: only build the objects.
        kind: A subclass of :class:`~lightning_rlhf.keys.StageCLI` to use instead.
    """
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import SaveConfigCallback

    class SaveConfig(SaveConfigCallback):
        """Writes ``config.yaml`` of training runs only, because an evaluation would overwrite it."""

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if stage == "fit":
                super().setup(trainer, pl_module, stage)

    import lightning_rlhf.callbacks
    import lightning_rlhf.data
    import lightning_rlhf.stages
    from lightning_rlhf.keys import KeyParser, StageCLI

    for face in (lightning_rlhf.callbacks, lightning_rlhf.data, lightning_rlhf.stages):
        for name in face.__all__:
            getattr(face, name)  # loads it, so that class names work without their modules: --model SFTModule

    return (kind or StageCLI)(
        LightningModule,
        LightningDataModule,
        trainer_defaults={"callbacks": [lightning_rlhf.callbacks.WritePredictions()]},
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_class=KeyParser,
        parser_kwargs={"prog": "lightning-rlhf"},
        args=None if args is None else list(args),
        run=run,
    )
