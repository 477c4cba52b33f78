"""``lightning-rlhf``: tools first, then one LightningCLI whose subcommands are the Trainer's methods."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from lightning_rlhf.arguments import meant
from lightning_rlhf.quiet import quiet

COMMANDS = ("fit", "validate", "test", "predict")
#: Tools that are no Trainer methods: name, "module:function" taking the arguments after the name, one line of help.
TOOLS = {
    "inspect": ("lightning_rlhf.inspection.command:main", "rows as the model will see them, with the options of fit"),
    "configs": ("lightning_rlhf.config_files:main", "the config files that come with the package: list them, copy one"),
    "demo": ("lightning_rlhf.demo:main", "SFT, reward model and PPO of a small real model on bundled data"),
    "win-rate": ("lightning_rlhf.evaluation.command:main", "how often one model's answers are preferred to another's"),
    "report": ("lightning_rlhf.report.compare:main", "runs compared on one page: curves, answers, settings"),
}

USAGE = """\
usage: lightning-rlhf COMMAND ...

RLHF as PyTorch Lightning modules.

  fit       train:    lightning-rlhf fit --config configs/sft/smollm2_lora.yaml --data.train my.jsonl
  validate  held-out loss, accuracy ... of a model or checkpoint
  test      the same on test data
  predict   a record per row of --data.predict FILE: an SFT model's log-probs and a reward model's scores of the
            answers in it; the completions and their scores of PPO's policy
{tools}
Each command has its own --help; fit --print_config shows every key, and
fit --model.help RewardModule, fit --data.help PreferenceDataModule what they mean.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point.

    Args:
        args: Command line without the program's name; default ``sys.argv``.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        tools = "".join(f"  {name:9s} {text}\n" for name, (_, text) in TOOLS.items())
        print(USAGE.format(tools=tools))
        return
    if arguments[0] == "--version":
        from lightning_rlhf import __version__

        print(__version__)
        return
    quiet()
    known = (*COMMANDS, *TOOLS)
    if arguments[0] not in known and not arguments[0].startswith("-"):
        near = meant(arguments[0], known)
        print(f"lightning-rlhf: there is no command {arguments[0]}{near} All: {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    try:
        if arguments[0] in TOOLS:
            module, function = TOOLS[arguments[0]][0].split(":")
            getattr(importlib.import_module(module), function)(arguments[1:])
        else:
            _stage(arguments[0], args)
    except KeyboardInterrupt:  # where nothing runs that could be saved
        print("SIGINT: stopped.", file=sys.stderr)
        sys.exit(130)


def _stage(command: str, args: Sequence[str] | None) -> None:
    """One of the Trainer's methods."""
    try:
        cli(args)
    except Exception as error:
        if not _told(found := reason(error), found is not error):
            raise
        sys.exit(f"lightning-rlhf {command}: {' '.join(str(found).split())}")


def _told(error: BaseException, of_settings: bool) -> bool:
    """Whether an error's message is all that its reader needs: of settings, of a row, of a file that is not there."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lightning_rlhf.data.errors import DataError
    from lightning_rlhf.utils.checkpoint_io import CheckpointError

    if of_settings and isinstance(error, (OSError, ValueError)):
        return True
    if isinstance(error, FileNotFoundError):
        return error.errno is None  # with a number it is the system's, and was not written for people
    return isinstance(error, (DataError, CheckpointError, MisconfigurationException))


def reason(error: BaseException) -> BaseException:
    """What a class said that could not be made of its settings, which jsonargparse buries in what it was given.

    Args:
        error: Raised while a command line was read; any other comes back as it is.
    """
    while str(error).startswith("Does not validate against any of the Union subtypes") and error.__cause__:
        error = error.__cause__
    return error


def cli(args: Sequence[str] | None, run: bool = True, kind: Any = None) -> Any:
    """The LightningCLI of all stages; ``run=False`` builds and returns it without running a subcommand.

    Args:
        args: Command line, without the program's name; None: the program's own.
        run: Whether it begins with a subcommand, which is run.
        kind: A subclass of :class:`~lightning_rlhf.keys.StageCLI` to make instead.
    """
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import SaveConfigCallback

    class SaveConfig(SaveConfigCallback):
        """Writes ``config.yaml`` of a run that trains; an evaluation would put its own in the place of it."""

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if stage == "fit":
                super().setup(trainer, pl_module, stage)

    # imported so that bare class names work: --model SFTModule
    import lightning_rlhf.callbacks
    import lightning_rlhf.data.instruction
    import lightning_rlhf.data.preference
    import lightning_rlhf.data.prompts
    import lightning_rlhf.stages
    from lightning_rlhf.keys import KeyParser, StageCLI

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
