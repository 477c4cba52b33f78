"""``lightning-rlhf score-reference``: a reference's log-probs ahead of training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lightning_rlhf.cli import cli, root_cause
from lightning_rlhf.data.errors import DataError
from lightning_rlhf.keys import StageCLI


class ScoreCLI(StageCLI):
    """The options of ``fit``, for a run that ends before the policy is loaded."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Sets name and description."""
        about = (main.__doc__ or "").partition("Args:")[0]
        return super().init_parser(**{**kwargs, "prog": "lightning-rlhf score-reference", "description": about})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of ``fit`` outside of ``model``, ``data`` and ``trainer``."""
        parser.add_method_arguments(self.trainer_class, "fit", skip=self.subcommands()["fit"])

    def before_instantiate_classes(self) -> None:
        """Sets the reference, and drops what a run leaves behind."""
        settings = self.config.model.init_args
        if "reference" not in settings:
            raise ValueError(f"{self.config.model.class_path} has no reference. Give --model DPOModule or KTOModule.")
        settings.reference = "precomputed"
        trainer = self.config.trainer
        trainer.callbacks, trainer.logger, trainer.enable_checkpointing = None, False, False


class _Scored(Exception):
    """Ends the run."""


def main(args: Sequence[str] | None = None) -> None:
    """Computes the log-probs of all training and validation rows under the reference, and keeps them.

    It takes the options of fit. A later run with model.reference=precomputed reads what was kept, as long as data,
    tokenizer and weights are the same. A run that was killed goes on where it was.

    Args:
        args: Command line after ``score-reference``.
    """
    arguments = list(sys.argv[2:] if args is None else args)

    def end() -> None:
        raise _Scored

    try:
        made = cli(arguments, run=False, kind=ScoreCLI)
        made.model.configure_model = end
        made.trainer.fit(made.model, made.datamodule)
    except _Scored:
        if made.trainer.is_global_zero:
            print(f"The reference's log-probs are in {made.datamodule.cache.folder.parent / 'reference'}.")
    except (OSError, ValueError, DataError) as error:
        sys.exit(f"lightning-rlhf score-reference: {root_cause(error)}")
