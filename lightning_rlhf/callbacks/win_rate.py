"""How often the model's answers are preferred to a baseline's, while it learns."""

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
from lightning_rlhf.rewards import Reward, WeightedReward
from lightning_rlhf.rollout import Sampling
from lightning_rlhf.strategies import whole_weights
from lightning_rlhf.utils.collectives import gather_objects

#: Answers in the making at a time.
_BATCH = 32


class MeasureWinRate(PromptCallback):
    """Compares the model's answers to validation prompts with a baseline's, after each validation or every few steps.

    Each pair is judged in both orders; see ``docs/evaluation.md``. Logged: ``val/win_rate``, the ends of its 95 %
    interval ``val/win_rate_low`` and ``val/win_rate_high``, and ``val/ties``, the share of pairs. They can be monitored
    (``HFExport(monitor="val/win_rate", mode="max")``). Every pair goes to ``win_rate.jsonl`` under the Trainer's
    ``default_root_dir``, where a resumed run goes on, and a new run begins a new file beside the old one. Under
    ``trainer.validate`` it is ``win_rate_validate.jsonl``; under ``fast_dev_run`` nothing is written.

    Training is not disturbed. Beside an :class:`~lightning_rlhf.callbacks.EMA` the averaged weights answer. Ranks share
    the prompts; where the strategy shards the model (FSDP) all generate all, and share the judging. A judge that fails
    in the first comparison of a run ends it; later the comparison is left out with a warning, and NaN is logged.

    Args:
        judge: Directory or hub id of a reward model, a function ``f(prompts, completions, **columns) -> scores`` or its
            import path, a list of weighted ones; or a :class:`~lightning_rlhf.evaluation.Judge`, such as a
            ``ChatJudge``.
        against: ``start``, the model as it was when the run began; a file of answers; or directory or hub id of a
            model, which is loaded once.
        prompts: As of :class:`~lightning_rlhf.callbacks.SampleCompletions`. None takes the data module's validation
            prompts.
        num_prompts: How many of the data module's.
        max_new_tokens: Length limit of an answer.
        temperature: 0 is greedy; otherwise sampling is keyed by seed and prompt, alike for both models.
        seed: Of the sampling.
        every_n_steps: Compare after so many optimizer steps; None: in each validation.
        name: Of one of several in a run: then it logs ``val/NAME/win_rate`` and so on, and writes
            ``win_rate_NAME.jsonl``.

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
        """By its name."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """The baseline's answers, so that a resumed run compares with the same ones, and without that model."""
        answers = [[answer.text, answer.truncated] for answer in self._baseline]
        return {"answers": answers, "of": self._asked()} if answers else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back; they hold for the baseline and the prompts that they were made for."""
        self._saved = state_dict

    def _asked(self) -> str:
        return json.dumps([self.against, self._prompts.messages])

    # ------------------------------------------------------------------------------------------------- hooks

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Reads the prompts, and makes the judge, so that a wrong one shows before compute is spent.

        Raises:
            ValueError: There are no prompts, one of them is bad, or lacks a column that the judge needs; or there is
                no such judge.
        """
        super().setup(trainer, pl_module, stage)
        if stage not in self.stages:
            return
        self._baseline, self._saved, self._judged_before = [], {}, False
        dtype: Any = getattr(pl_module, "dtype_of_weights", "float32")
        self._judge = make_judge(self.judge, pl_module.tokenizer, dtype, trainer.strategy.root_device)
        needs = self._judge.reward.needs if isinstance(self._judge, RewardJudge) else frozenset()
        if missing := sorted(needs - self._prompts.columns.keys()):
            raise ValueError(f"MeasureWinRate: the judge needs the column {missing[0]}, which the prompts don't have.")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Has the baseline answer; puts the file where the run stands."""
        self._prepare(trainer, pl_module)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            file = self._file(trainer)
            if trainer.global_step == 0 and file.exists():
                number = 1
                while (old := file.with_name(f"{file.stem}.{number}{file.suffix}")).exists():
                    number += 1
                os.replace(file, old)
                rank_zero_info(f"MeasureWinRate: the pairs of an earlier run are now in {old}.")
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
            for logger in trainer.loggers:  # also where log_every_n_steps leaves out this one
                logger.log_metrics(values, step=step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Outside ``fit``: as :meth:`on_fit_start` and :meth:`on_train_start`."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_fit_start(trainer, pl_module)
            self._prepare(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compares in a validation, so that what it logs can be monitored."""
        alone = trainer.state.fn == TrainerFn.VALIDATING
        if alone or not (self.every_n_steps or trainer.sanity_checking):
            pl_module.log_dict(self._compare(trainer, pl_module), batch_size=1, sync_dist=True)

    # ------------------------------------------------------------------------------------------------- answers

    def _prepare(self, trainer: L.Trainer, module: Any) -> None:
        """The baseline's answers: from the checkpoint, the model as it stands, a file, or another model."""
        prompts = self._prompts.messages
        if self._saved.get("of") == self._asked():
            self._baseline = [Answer(*answer) for answer in self._saved["answers"]]
            return
        source, tokenizer, stops = self.against, None, ()
        if source == "start":
            if trainer.state.fn == TrainerFn.FITTING and trainer.global_step == 0:
                found = self._answers(trainer, module)
                self._baseline = [found[i] for i in range(len(prompts))]
                return
            source, tokenizer = getattr(module, "pretrained", None), module.tokenizer  # type: ignore[assignment]
            stops = getattr(module, "stop_token_ids", ())
            if not isinstance(source, (str, os.PathLike)):
                raise ValueError(
                    "MeasureWinRate: the model that the run began with is gone. Give against: a directory or "
                    "a file of answers."
                )
        if names_file(os.fspath(source)):
            self._baseline = read_answers(source, prompts)
            return
        mine = {i: prompts[i] for i in self._share(trainer)}
        strings = getattr(getattr(module, "sampling", None), "stop_strings", ())
        sampling = Sampling(self.max_new_tokens, temperature=self.temperature, stop_strings=strings)
        options: dict[str, Any] = dict(
            tokenizer=tokenizer,
            stop_ids=stops,
            dtype=getattr(module, "dtype_of_weights", "float32"),
            device=trainer.strategy.root_device,
            batch_size=_BATCH,
            trust_remote_code=getattr(module, "trust_remote_code", False),
        )
        with torch.random.fork_rng(devices=()), trainer.precision_plugin.forward_context():
            answers = dict(generate_answers(source, mine, sampling, self.seed, **options))
        found = {i: answer for part in gather_objects(answers) for i, answer in part.items()}
        self._baseline = [found[i] for i in range(len(prompts))]

    def _answers(self, trainer: L.Trainer, module: Any) -> Mapping[int, Answer]:
        """The model's, by the number of the prompt, on all ranks; all must call."""
        numbers = range(len(self._prompts.prompts)) if self._together(trainer) else self._share(trainer)
        batches = [numbers[start : start + _BATCH] for start in range(0, len(numbers), _BATCH)]
        with averaged_weights(trainer), whole_weights(trainer.strategy, module.model_to_export):
            found = self._complete(trainer, module, batches)
            trainer.strategy.barrier("MeasureWinRate")
        mine = {i: Answer(c.text, c.truncated) for i, c in zip(numbers, found, strict=True)}
        return {i: answer for part in gather_objects(mine) for i, answer in part.items()}

    def _share(self, trainer: L.Trainer) -> range:
        """The prompts of this rank."""
        return range(trainer.global_rank, len(self._prompts.prompts), trainer.world_size)

    # ------------------------------------------------------------------------------------------------- verdicts

    def _compare(self, trainer: L.Trainer, module: Any) -> dict[str, float]:
        """Asks both models and the judge, and writes what came of it; what is to be logged."""
        answers, columns = self._answers(trainer, module), self._prompts.columns
        mine = list(self._share(trainer))
        pairs = [
            AnswerPair(self._prompts.messages[i], answers[i], self._baseline[i], {k: v[i] for k, v in columns.items()})
            for i in mine
        ]
        assert self._judge is not None
        judged: list[JudgedPair] = []
        failure = ""
        try:
            judged = judge_pairs(self._judge, pairs)
        except JudgeError as error:
            failure = str(error)
        everyone = gather_objects((list(zip(mine, judged, strict=False)), failure))
        if failure := next((text for _, text in everyone if text), ""):
            if not self._judged_before:
                raise JudgeError(failure)
            rank_zero_warn(f"MeasureWinRate: no comparison at step {trainer.global_step}. {failure}")
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
            "ties": float(found.ties / (found.wins + found.ties + found.losses)),  # NaN without any
        }
        prefix = f"val/{self.name}/" if self.name else "val/"
        return {prefix + key: value for key, value in values.items()}

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
            + ("" if dry else f"; all in {file}")
        )

    def _add(self, file: Path, judged: Sequence[JudgedPair], step: int, validating: bool) -> None:
        if validating:
            self._keep(file, -1)
        elif step <= self._written:  # it was judged before the checkpoint from which the run goes on
            self._keep(file, step - 1)
        self._written = step
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            for pair in judged:
                out.write(json.dumps({"step": step, **pair.record()}, ensure_ascii=False) + "\n")

    @staticmethod
    def _keep(file: Path, step: int) -> None:
        """Drops pairs of later steps, which the run comes to again."""
        if file.exists():
            lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would split in texts
            kept = [f"{line}\n" for line in lines if _step(line) <= step]
            if len(kept) < len(lines) - 1 or lines[-1]:
                temporary = file.with_name(f"{file.name}.writing")
                temporary.write_text("".join(kept), encoding="utf-8")
                os.replace(temporary, file)


def _step(line: str) -> float:
    """Of a line; infinite of one that a killed process left unfinished."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
