"""Measures during training how often the model's answers are preferred to a baseline's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_rlhf.callbacks.ema import averaged_weights
from lightning_rlhf.callbacks.samples import PromptCallback
from lightning_rlhf.evaluation import (
    Answer,
    AnswerPair,
    Judge,
    JudgedPair,
    JudgeError,
    RewardJudge,
    generate_answers,
    judge_pairs,
    make_judge,
    names_file,
    rates,
    read_answers,
)
from lightning_rlhf.models import Load
from lightning_rlhf.protocols import HasLoad, stop_tokens_of
from lightning_rlhf.rewards import Reward, WeightedReward
from lightning_rlhf.strategies import whole_weights
from lightning_rlhf.utils.collectives import data_rank, data_size, gather_objects, once_per_copy
from lightning_rlhf.utils.filesystem import check_writable, move_aside

#: Number of answers that are generated together.
_BATCH = 32


class MeasureWinRate(PromptCallback):
    """Compares the model's answers to validation prompts with a baseline's, after each validation or every few steps.

    The judge sees each pair in both orders; see ``docs/evaluation.md``. Logged metrics are ``val/win_rate``, the bounds
    of its 95 % interval ``val/win_rate_low`` and ``val/win_rate_high``, and ``val/ties``, the share of tied pairs.
    Other callbacks can monitor them (``HFExport(monitor="val/win_rate", mode="max")``). All pairs go to
    ``win_rate.jsonl`` under the Trainer's ``default_root_dir``. A resumed run continues this file; a new run moves that
    of an earlier one to ``win_rate.1.jsonl``. ``trainer.validate`` writes ``win_rate_validate.jsonl`` likewise. With
    ``fast_dev_run`` nothing is written.

    Training does not change. With an :class:`~lightning_rlhf.callbacks.EMA` the averaged weights answer. Each rank
    answers and judges a share of the prompts; if the strategy shards the model (FSDP), each rank answers all prompts.
    If the judge fails in the first comparison of a run, the run ends. If it fails later, a warning is shown and NaN is
    logged.

    Args:
        judge: Directory or hub id of a reward model; a function ``f(prompts, completions, **columns) -> scores`` or its
            import path; a list of weighted rewards; or a :class:`~lightning_rlhf.evaluation.Judge`, such as a
            ``ChatJudge``.
        against: The baseline: ``start`` for the model at the start of the run, a file of answers, or the directory or
            hub id of a model, which is loaded once.
        prompts: See :class:`~lightning_rlhf.callbacks.SampleCompletions`. None: the data module's validation prompts.
        num_prompts: Number of prompts to take from the data module. A larger value gives a narrower interval and takes
            more time.
        max_new_tokens: Maximum number of tokens per answer. A larger value allows longer answers and takes more time.
        temperature: The logits are divided by it. A larger value samples more diverse answers; 0 is greedy. The noise
            depends on seed and prompt, and is the same for both models.
        seed: Seed of the sampling.
        every_n_steps: Compare after every this many optimizer steps. A larger value compares less often. None: in each
            validation.
        name: Name that tells several win rates of a run apart: metrics become ``val/NAME/win_rate`` and so on, and the
            file becomes ``win_rate_NAME.jsonl``.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    stages: ClassVar[tuple[TrainerFn, ...]] = (TrainerFn.FITTING, TrainerFn.VALIDATING)

    def __init__(
        self,
        judge: str | list[WeightedReward] | Reward | Judge | Callable[..., Any],
        against: str | os.PathLike[str] = "start",
        prompts: Sequence[str | list[dict[str, str]]] | str | os.PathLike[str] | None = None,
        num_prompts: int = 64,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        every_n_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(prompts, num_prompts, max_new_tokens, temperature, seed, every_n_steps)
        self.judge, self.against, self.name = judge, os.fspath(against), name
        self._judge: Judge | None = None
        self._saved: dict[str, Any] = {}
        self._baseline: list[Answer] = []
        self._judged_before = False
        self._written = -1  # the last step in the file

    # ------------------------------------------------------------------------------------------------- state

    @property
    def state_key(self) -> str:
        """Contains the name, because a run may have several win rates."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Returns the baseline's answers, so that a resumed run has the same ones without the baseline model."""
        answers = [[answer.text, answer.truncated] for answer in self._baseline]
        return {"answers": answers, "of": self._asked()} if answers else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the baseline's answers. They are used only for the same baseline and the same prompts."""
        self._saved = state_dict

    def _asked(self) -> str:
        return json.dumps([self.against, self._prompts.messages])

    # ------------------------------------------------------------------------------------------------- hooks

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Reads the prompts and makes the judge, so that errors in them show before training.

        Raises:
            OSError: The file can't be written.
            ValueError: There are no prompts, a prompt is malformed or lacks a column that the judge needs, or the judge
                does not exist.
        """
        super().setup(trainer, pl_module, stage)
        if stage not in self.stages:
            return
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_writable(self._file(trainer), "MeasureWinRate", "trainer.default_root_dir")
        self._baseline, self._saved, self._judged_before = [], {}, False
        dtype, device = _load_of(pl_module).dtype, trainer.strategy.root_device
        self._judge = make_judge(self.judge, pl_module.tokenizer, dtype, device)
        needs = self._judge.reward.needs if isinstance(self._judge, RewardJudge) else frozenset()
        if missing := sorted(needs - self._prompts.columns.keys()):
            raise ValueError(
                f"MeasureWinRate: the judge needs the column {missing[0]}, but the prompts do not have it. Add it to "
                "the prompts."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Generates the baseline's answers, and prepares the file for a new or a resumed run."""
        self._prepare(trainer, pl_module)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            file = self._file(trainer)
            if trainer.global_step == 0:
                _start_anew(file)
            self._keep(file, trainer.global_step)
        self._written = trainer.global_step
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compares every few steps."""
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self._last_step:
            self._last_step = step
            values = self._compare(trainer, pl_module)
            pl_module.log_dict(values, on_step=True, on_epoch=False, logger=False, batch_size=1)
            for logger in trainer.loggers:  # also if log_every_n_steps skips this step
                logger.log_metrics(values, step=step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Outside ``fit``, does the work of :meth:`on_fit_start` and :meth:`on_train_start`."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_fit_start(trainer, pl_module)
            self._prepare(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compares during a validation, so that other callbacks can monitor the metrics."""
        alone = trainer.state.fn == TrainerFn.VALIDATING
        if alone or not (self.every_n_steps or trainer.sanity_checking):
            pl_module.log_dict(self._compare(trainer, pl_module), batch_size=1, sync_dist=True)

    # ------------------------------------------------------------------------------------------------- answers

    def _prepare(self, trainer: L.Trainer, module: Any) -> None:
        """Gets the baseline's answers from the checkpoint, the current model, a file, or another model."""
        prompts = self._prompts.messages
        if self._saved.get("of") == self._asked():
            self._baseline = [Answer(*answer) for answer in self._saved["answers"]]
            return
        source, tokenizer = self.against, None
        stops: tuple[int, ...] = ()
        if source == "start":
            if trainer.state.fn == TrainerFn.FITTING and trainer.global_step == 0:
                found = self._answers(trainer, module)
                self._baseline = [found[i] for i in range(len(prompts))]
                return
            source, tokenizer = getattr(module, "pretrained", None), module.tokenizer  # type: ignore[assignment]
            stops = stop_tokens_of(module)
            if not isinstance(source, (str, os.PathLike)):
                raise ValueError(
                    "MeasureWinRate: the run was resumed, and the model at its start is not available. Set against to "
                    "a model's directory or to a file of answers."
                )
        if names_file(os.fspath(source)):
            self._baseline = read_answers(source, prompts)
            return
        mine = {i: prompts[i] for i in self._share()}
        options: dict[str, Any] = dict(
            tokenizer=tokenizer,
            stop_ids=stops,
            dtype=_load_of(module).dtype,
            device=trainer.strategy.root_device,
            batch_size=_BATCH,
            trust_remote_code=_load_of(module).trust_remote_code,
        )
        with torch.random.fork_rng(devices=()), trainer.precision_plugin.forward_context():
            answers = once_per_copy(
                lambda: dict(generate_answers(source, mine, self._sampling(module), self.seed, **options))
            )
        found = {i: answer for part in gather_objects(answers) for i, answer in part.items()}
        self._baseline = [found[i] for i in range(len(prompts))]

    def _answers(self, trainer: L.Trainer, module: Any) -> Mapping[int, Answer]:
        """Returns the model's answers by prompt index, on all ranks. All ranks must call it."""
        numbers = range(len(self._prompts.prompts)) if self._needs_all_ranks(trainer) else self._share()
        batches = [numbers[start : start + _BATCH] for start in range(0, len(numbers), _BATCH)]
        with averaged_weights(trainer), whole_weights(trainer.strategy, module.model_to_export):
            found = self._complete(trainer, module, batches)
            trainer.strategy.barrier("MeasureWinRate")
        mine = {i: Answer(c.text, c.truncated) for i, c in zip(numbers, found, strict=True)}
        return {i: answer for part in gather_objects(mine) for i, answer in part.items()}

    def _share(self) -> range:
        """Returns the indices of this rank's prompts."""
        return range(data_rank(), len(self._prompts.prompts), data_size())

    # ------------------------------------------------------------------------------------------------- verdicts

    def _compare(self, trainer: L.Trainer, module: Any) -> dict[str, float]:
        """Generates answers, asks the judge, writes the pairs, and returns the metrics to log."""
        answers, columns = self._answers(trainer, module), self._prompts.columns
        mine = list(self._share())
        pairs = [
            AnswerPair(self._prompts.messages[i], answers[i], self._baseline[i], {k: v[i] for k, v in columns.items()})
            for i in mine
        ]
        judged, failure = once_per_copy(lambda: self._ask(pairs))
        everyone = gather_objects((list(zip(mine, judged, strict=False)), failure))
        if failure := next((text for _, text in everyone if text), ""):
            if not self._judged_before:
                raise JudgeError(failure)
            rank_zero_warn(f"MeasureWinRate: the comparison at step {trainer.global_step} failed. {failure}")
            judged = []
        else:
            judged = [j for _, j in sorted(((i, j) for part, _ in everyone for i, j in part), key=lambda both: both[0])]
            self._judged_before = True
            self._write(trainer, judged)
        found = rates(judged)
        values = {
            "win_rate": float(found.win_rate),
            "win_rate_low": float(found.low),
            "win_rate_high": float(found.high),
            "ties": float(found.ties / (found.wins + found.ties + found.losses)),  # NaN without pairs
        }
        prefix = f"val/{self.name}/" if self.name else "val/"
        return {prefix + key: value for key, value in values.items()}

    def _ask(self, pairs: Sequence[AnswerPair]) -> tuple[list[JudgedPair], str]:
        """Returns the judge's verdicts, and why there are none."""
        assert self._judge is not None
        try:
            return judge_pairs(self._judge, pairs), ""
        except JudgeError as error:
            return [], str(error)

    def _file(self, trainer: L.Trainer) -> Path:
        parts = ["win_rate", self.name, None if trainer.state.fn == TrainerFn.FITTING else "validate"]
        return Path(trainer.default_root_dir) / f"{'_'.join(filter(None, parts))}.jsonl"

    def _write(self, trainer: L.Trainer, judged: Sequence[JudgedPair]) -> None:
        if not trainer.is_global_zero:
            return
        step, file = trainer.global_step, self._file(trainer)
        dry: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not dry:
            self._add(file, judged, step, validating=trainer.state.fn == TrainerFn.VALIDATING)
        found = rates(judged)
        missing = f", {found.no_verdict:.0f} without a verdict" if found.no_verdict else ""
        rank_zero_info(
            f"{self.name or 'Win rate'} at step {step} against {self.against}: {found.win_rate:.3f} ({found.low:.3f} "
            f"to {found.high:.3f}), {found.wins:.0f} won, {found.ties:.0f} tied, {found.losses:.0f} lost{missing}"
            + ("" if dry else f"; all pairs are in {file}")
        )

    def _add(self, file: Path, judged: Sequence[JudgedPair], step: int, validating: bool) -> None:
        if validating:
            _start_anew(file)
        elif step <= self._written:  # the step was judged before the run was resumed
            self._keep(file, step - 1)
        self._written = step
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            for pair in judged:
                out.write(json.dumps({"step": step, **pair.record()}, ensure_ascii=False) + "\n")

    @staticmethod
    def _keep(file: Path, step: int) -> None:
        """Drops pairs of later steps, which the run will repeat."""
        if file.exists():
            lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would split within texts
            kept = [f"{line}\n" for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines) - 1 or lines[-1]:
                temporary = file.with_name(f"{file.name}.writing")
                temporary.write_text("".join(kept), encoding="utf-8")
                os.replace(temporary, file)


def _start_anew(file: Path) -> None:
    if (old := move_aside(file)) is not None:
        rank_zero_info(f"MeasureWinRate: the pairs of an earlier run are now in {old}.")


def _step_of(line: str) -> float:
    """Returns the step of a line, or infinity if a killed process left the line unfinished."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _load_of(module: object) -> Load:
    """Returns how a module holds weights."""
    return module.load if isinstance(module, HasLoad) else Load()
