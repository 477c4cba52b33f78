"""What stages share that compare a policy with a reference on given answers: DPO and its family, KTO."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_rlhf.data import PackedBatch, PlannedLoader
from lightning_rlhf.data.base import TreeDataModule
from lightning_rlhf.data.reference import ReferenceLogprobs
from lightning_rlhf.models import Policy
from lightning_rlhf.models.reference import Pretrained, cast_like
from lightning_rlhf.protocols import NamesOrigins
from lightning_rlhf.stages.base import SettingsError, Stage
from lightning_rlhf.stages.inputs import MAKERS
from lightning_rlhf.stages.references import (
    ReferenceUpdate,
    choose_reference,
    load_policy_and_reference,
    precompute_reference,
    reference_logprobs,
)


class AlignmentStage(Stage):
    """A stage with a policy and a reference, neither of which has dropout.

    A subclass calls :meth:`set_reference` in its constructor, and says how a batch is evaluated.

    Attributes:
        policy: The model, from ``configure_model`` on. Where the reference is another one, it is ``.reference``.
    """

    policy: Policy
    reference: Policy
    _reference: Pretrained
    _precomputed: Mapping[str, ReferenceLogprobs]

    def set_reference(self, given: Pretrained, needed: bool, update: ReferenceUpdate | None = None) -> None:
        """Decides what the policy is compared with.

        Args:
            given: See :func:`~lightning_rlhf.stages.references.choose_reference`.
            needed: Whether the loss reads a reference.
            update: How the reference follows the policy, if it does.

        Raises:
            ValueError: It does not fit the loss, the adapters or the tokenizer.
        """
        found = choose_reference(self, given, needed, update)
        object.__setattr__(self, "_reference", found)  # not a child, as pretrained

    @property
    def reference_source(self) -> Pretrained:
        """What the policy is compared with: a word such as ``adapter_off``, but not ``auto``; a name, or a model."""
        return self._reference

    def configure_model(self) -> None:
        """Loads policy and reference once."""
        if hasattr(self, "policy"):
            return
        self.policy, reference = load_policy_and_reference(self, self._reference)
        if reference is not None:
            self.reference = reference

    @property
    def model_to_export(self) -> Policy:
        """The policy."""
        return self.policy

    def setup(self, stage: str) -> None:
        """As the base; computes the reference's log-probs before anything else is loaded.

        Raises:
            SettingsError: The data are none of a data module of this package.
        """
        super().setup(stage)
        if self._reference != "precomputed":
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TreeDataModule):
            maker = MAKERS[self.works_on or "preferences"][0].__name__
            raise SettingsError(f"reference: precomputed needs a {maker}, which keeps log-probs by row.")
        folder = data.cache.folder.parent / "reference"
        self._precomputed = precompute_reference(self, folder, self.rows_to_score(data, stage))

    def rows_to_score(self, data: TreeDataModule[Any], run: str) -> Iterator[tuple[str, PlannedLoader]]:
        """What ``reference: precomputed`` computes before a run.

        Args:
            data: The data module, set up.
            run: ``fit``, ``validate``, ``test`` or ``predict``.

        Yields:
            A name, under which :meth:`reference_logprobs` finds it, and a loader that gives each row once.
        """
        parts = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
        for part in parts[run]:
            yield part, data.every_row(part)

    def on_fit_start(self) -> None:
        """Gives policy and reference one dtype."""
        super().on_fit_start()
        if hasattr(self, "reference"):
            cast_like(self.reference, self.policy)

    def reference_logprobs(self, part: str, batch: PackedBatch) -> Tensor | None:
        """(N,) log-probs of a part's scored tokens under the reference; None without one."""
        if self._reference == "precomputed":
            return self._precomputed[part](batch)
        return reference_logprobs(self.policy, getattr(self, "reference", None), batch)

    # ------------------------------------------------------------------------------------------------- evaluation

    @abstractmethod
    def evaluate(self, part: str, batch: PackedBatch) -> None:
        """Measures a batch of ``val`` or ``test``."""

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Held-out loss and accuracies."""
        self.evaluate("val", batch)

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """As :meth:`validation_step`, under ``test/``."""
        self.evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Logs what was found."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Logs what was found."""
        self._report("test")

    def _report(self, part: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        names = data.origins.get(part, ()) if isinstance(data, NamesOrigins) else ()
        self.metrics.get(part, "preference").names = names
        self.metrics.report(part, self.log)

    def records(self, batch: PackedBatch, reward: Tensor, logprob: Tensor, tokens: Tensor) -> list[dict[str, Any]]:
        """What ``predict_step`` returns: a record per answer, with its ``row`` and its number in it, from 0.

        Args:
            batch: The batch.
            reward: (S,) implicit rewards.
            logprob: (S,) summed log-probs.
            tokens: (S,) scored tokens.
        """
        columns = (reward.tolist(), logprob.tolist(), tokens.long().tolist())
        return [
            {"row": row, "answer": answer, "reward": reward, "logprob": logprob, "tokens": tokens}
            for (row, answer), reward, logprob, tokens in zip(self.places(batch), *columns, strict=False)
            # a filler has no place
        ]
