"""Shows the model's answers to fixed prompts during training."""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import CometLogger, MLFlowLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_rlhf.callbacks.ema import averaged_weights
from lightning_rlhf.callbacks.progress import print_above_bar
from lightning_rlhf.data import Message, PromptBatch
from lightning_rlhf.data.sources import BadRowError, BadRows, read_rows
from lightning_rlhf.data.templates import stop_token_ids
from lightning_rlhf.data.tokens import TokenizeError, encode_prompt
from lightning_rlhf.evaluation.answers import prompt_text
from lightning_rlhf.models.saving import own_stop_token_ids
from lightning_rlhf.protocols import (
    DrawsSamples,
    GivesSamplePrompts,
    PlaysEpisodes,
    ReadsTexts,
    ScoresCompletions,
    stop_tokens_of,
)
from lightning_rlhf.rollout import (
    CachedEngine,
    Completion,
    HFGenerateEngine,
    RolloutEngine,
    Sampling,
    as_answers,
    complete,
    room,
    sample_key,
)
from lightning_rlhf.strategies import runs_alone, whole_weights
from lightning_rlhf.utils.collectives import data_rank
from lightning_rlhf.utils.filesystem import check_writable, move_aside


class PromptCallback(L.Callback):
    """Base of the callbacks in which the model answers fixed prompts. It has its own random generator.

    Args:
        prompts: User turns or message lists, a file of them, or None for the data module's ``sample_prompts``.
        num_prompts: Number of prompts to take from the data module.
        max_new_tokens: Maximum number of tokens per answer.
        temperature: The logits are divided by it. A larger value samples more diverse answers; 0 is greedy.
        seed: Seed of the sampling.
        every_n_steps: Number of optimizer steps between answers. None: after each validation.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    #: Trainer functions in which the callback is active.
    stages: ClassVar[tuple[TrainerFn, ...]] = (TrainerFn.FITTING,)

    def __init__(
        self,
        prompts: Sequence[str | list[dict[str, str]]] | str | os.PathLike[str] | None,
        num_prompts: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        every_n_steps: int | None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"every_n_steps must be at least 1, or null to run after each validation; got {every_n_steps}."
            )
        self.prompts, self.num_prompts = prompts, num_prompts
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.every_n_steps = every_n_steps
        self._prompts = PromptBatch([], [], (), {}, 0)
        self._last_step = -1

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Reads and tokenizes the prompts, so that errors in them show before training.

        Raises:
            ValueError: There are no prompts, or a prompt is malformed; the message says which one.
        """
        if stage not in self.stages:
            return
        self._last_step = -1
        encoded, messages, further = [], [], []
        for where, prompt, columns in self._find(trainer):
            try:
                encoded.append(encode_prompt(pl_module.tokenizer, prompt))
            except TokenizeError as error:
                raise BadRowError(where, error.kind, f"{error}.") from error
            messages.append(prompt)
            further.append(columns)
        if not encoded:
            raise ValueError(f"{type(self).__name__}: there are no prompts. Set prompts to a list or to a file.")
        names = {name for columns in further for name in columns}
        every = {name: [columns.get(name) for columns in further] for name in sorted(names)}
        self._prompts = PromptBatch(encoded, messages, tuple(range(len(encoded))), every, len(encoded))

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Checks that the model can generate, and that each prompt leaves room for an answer.

        Prompts of the data module that are too long are left out with a warning.

        Raises:
            ValueError: The model cannot generate, a prompt of the ``prompts`` argument is too long, or all prompts are.
        """
        name = type(self).__name__
        model = pl_module.model_to_export.transformer
        if not model.can_generate():
            raise ValueError(f"{name}: {type(model).__name__} cannot generate. Remove the callback.")
        asked = self._prompts
        fits = [room(pl_module.model_to_export, ids, 1) >= 1 for ids in asked.prompts]
        if all(fits):
            return
        first = fits.index(False)
        reason = (
            f"the prompt {prompt_text(asked.messages[first])[:40]!r} has {len(asked.prompts[first])} tokens and fills "
            "the model's context"
        )
        if self.prompts is not None or not any(fits):
            raise ValueError(f"{name}: {reason}. Use shorter prompts.")
        kept = [i for i, fit in enumerate(fits) if fit]
        rank_zero_warn(f"{name}: {len(fits) - len(kept)} of {len(fits)} prompts are left out. The first: {reason}.")
        self._prompts = PromptBatch(
            [asked.prompts[i] for i in kept],
            [asked.messages[i] for i in kept],
            tuple(range(len(kept))),
            {column: [values[i] for i in kept] for column, values in asked.columns.items()},
            len(kept),
        )

    def _find(self, trainer: Any) -> list[tuple[str, list[Message] | str, dict[str, Any]]]:
        """Returns each prompt with the place where it was read, and its other columns."""
        data = trainer.datamodule
        found: list[tuple[str, Any, dict[str, Any]]]
        if isinstance(self.prompts, (str, os.PathLike)):
            keys = ["text"] if ".txt" in Path(self.prompts).suffixes else ["prompt", "messages"]
            found = []
            for row in read_rows(self.prompts, BadRows(skip=None)):
                further = {name: value for name, value in row.value.items() if name not in keys}
                found.append((row.where, next(filter(None, map(row.value.get, keys)), None), further))
        elif self.prompts is not None:
            found = [(f"{type(self).__name__}: prompts[{i}]", prompt, {}) for i, prompt in enumerate(self.prompts)]
        elif isinstance(data, GivesSamplePrompts):
            both = zip(data.sample_prompts(self.num_prompts), data.sample_columns(self.num_prompts), strict=True)
            found = [(f"sample_prompts[{i}]", prompt, dict(columns)) for i, (prompt, columns) in enumerate(both)]
        else:
            raise ValueError(
                f"{type(self).__name__}: set prompts, or use a data module with sample_prompts(n) and "
                "sample_columns(n)."
            )
        as_text = isinstance(data, ReadsTexts) and data.as_text
        return [(where, _parse_prompt(prompt, where, as_text), further) for where, prompt, further in found]

    def _sampling(self, module: object) -> Sampling:
        """Returns how answers are drawn; stop strings end them as in training."""
        strings = module.sampling.stop_strings if isinstance(module, DrawsSamples) else ()
        return Sampling(self.max_new_tokens, temperature=self.temperature, stop_strings=strings)

    def _needs_all_ranks(self, trainer: L.Trainer) -> bool:
        """Whether all ranks must run the model together, because each holds a part of it."""
        return not runs_alone(trainer.strategy)

    def _complete(
        self, trainer: L.Trainer, module: Any, batches: Sequence[Sequence[int]], *key: int
    ) -> list[Completion]:
        """Completes prompts, which are given by their indices, one batch after the other."""
        tokenizer = module.tokenizer
        own = own_stop_token_ids(module.model_to_export.transformer)
        stops = stop_tokens_of(module) or stop_token_ids(tokenizer, own)
        engine: RolloutEngine = HFGenerateEngine(synced_gpus=True) if self._needs_all_ranks(trainer) else CachedEngine()
        gathered: AbstractContextManager[None] = nullcontext()
        root = trainer.strategy.model
        if isinstance(
            root, FullyShardedDataParallel
        ):  # layers gather their weights; the other weights are gathered here
            gathered = FullyShardedDataParallel.summon_full_params(root, recurse=False, writeback=False)
        found = []
        with torch.no_grad(), gathered, trainer.precision_plugin.forward_context():
            for batch in batches:
                keys = [sample_key(self.seed, *key, i) for i in batch]
                if isinstance(module, PlaysEpisodes) and module.environment is not None:
                    asked = self._prompts.select(batch)
                    found += [c for (c,) in module.play_episodes(asked, [[k] for k in keys], self._sampling(module))]
                    continue
                ids = [self._prompts.prompts[i] for i in batch]
                found += complete(engine, module.model_to_export, tokenizer, ids, keys, self._sampling(module), stops)
        messages = [self._prompts.messages[i] for batch in batches for i in batch]
        return [c for (c,) in as_answers(tokenizer, messages, [[c] for c in found])]


def _samples_file(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "samples.jsonl"


class SampleCompletions(PromptCallback):
    """Shows answers to fixed prompts before training, after each validation or every few steps, and at the end.

    Answers go to the terminal, to loggers that accept text (W&B and others with ``log_table`` or ``log_text``,
    TensorBoard, MLflow, Comet), and to ``samples.jsonl`` under the Trainer's ``default_root_dir``. A resumed run
    continues this file; a new run moves that of an earlier one to ``samples.1.jsonl``. With ``fast_dev_run`` they go to
    the terminal and the loggers only. Training does not change, because sampling has its own random generator.

    The module's ``model_to_export`` answers; it must be able to generate. If the module has ``score_completions``, as
    PPO has, scores and KL are shown beside the answers. In an environment an answer has all turns, and
    ``max_new_tokens`` is that of each. With an :class:`~lightning_rlhf.callbacks.EMA` the averaged weights answer. One
    rank generates, or all ranks if the strategy shards the model (FSDP).

    Args:
        prompts: User turns, message lists, or a file: ``.txt`` with one prompt per line, or ``.jsonl`` or another
            format that data modules read. The file has a column ``prompt`` (text or messages) or ``messages`` (a last
            turn of the assistant is removed), and may have more columns for rewards. None: the data module's
            ``sample_prompts``. If the data module has ``as_text``, prompts are plain texts without a chat template.
        num_prompts: Number of prompts to take from the data module.
        max_new_tokens: Maximum number of tokens per answer. A larger value shows longer answers and takes more time.
        temperature: The logits are divided by it. A larger value samples more diverse answers; 0 is greedy. The noise
            depends on seed, step and prompt.
        seed: Seed of the sampling.
        on_start: Show answers before the first step.
        every_n_steps: Show answers after every this many optimizer steps. A larger value shows them less often. None:
            after each validation.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(
        self,
        prompts: Sequence[str | list[dict[str, str]]] | str | os.PathLike[str] | None = None,
        num_prompts: int = 3,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        on_start: bool = True,
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__(prompts, num_prompts, max_new_tokens, temperature, seed, every_n_steps)
        self.on_start = on_start

    # ------------------------------------------------------------------------------------------------- hooks

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Reads the prompts, and checks before training that the file can be written.

        Raises:
            OSError: The file can't be written.
            ValueError: There are no prompts, or a prompt is malformed; the message says which one.
        """
        super().setup(trainer, pl_module, stage)
        if stage in self.stages and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_writable(_samples_file(trainer), "SampleCompletions", "trainer.default_root_dir")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Moves the answers of an earlier run aside, and shows answers before training."""
        new = trainer.global_step == 0 and not trainer.fast_dev_run  # type: ignore[attr-defined]
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        first = next(each for each in callbacks if isinstance(each, SampleCompletions))  # all write to one file
        if new and first is self and trainer.is_global_zero and (old := move_aside(_samples_file(trainer))) is not None:
            rank_zero_info(f"SampleCompletions: the answers of an earlier run are now in {old}.")
        if self.on_start:
            self._show(trainer, pl_module)
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows answers every few steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._show(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows answers after a validation in ``fit``."""
        if not self.every_n_steps and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows answers at the end, unless they were shown at the same step."""
        self._show(trainer, pl_module)

    # ------------------------------------------------------------------------------------------------- answers

    def _show(self, trainer: L.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        strategy = trainer.strategy
        with averaged_weights(trainer), whole_weights(strategy, pl_module.model_to_export):
            if data_rank() == 0 or self._needs_all_ranks(trainer):
                rows = self._generate(trainer, pl_module, step)
                if trainer.is_global_zero:
                    self._write(trainer, rows, step)
            strategy.barrier("SampleCompletions")

    def _generate(self, trainer: L.Trainer, module: Any, step: int) -> list[dict[str, Any]]:
        """Completes one prompt at a time, so that an answer does not depend on the other prompts."""
        found = self._complete(trainer, module, [[i] for i in range(len(self._prompts.prompts))], step)
        scores: Mapping[str, Sequence[float]] = {}
        if isinstance(module, ScoresCompletions):
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                scores = module.score_completions(self._prompts, [[completion] for completion in found])
        answers = zip(self._prompts.messages, found, strict=True)
        rows = [
            {"step": step, "prompt": prompt_text(p), "completion": c.text, "ended": not c.truncated} for p, c in answers
        ]
        return [{**row, **{name: values[i] for name, values in scores.items()}} for i, row in enumerate(rows)]

    # ------------------------------------------------------------------------------------------------- output

    def _write(self, trainer: L.Trainer, rows: list[dict[str, Any]], step: int) -> None:
        file = _samples_file(trainer)
        dry: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not dry:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        names = [name for name in rows[0] if name != "step"]
        beside = [", ".join(f"{name} {row[name]:.3g}" for name in names[3:]) for row in rows]
        ends = [
            ("" if row["ended"] else " …") + (f"\n({text})" if text else "")
            for row, text in zip(rows, beside, strict=True)
        ]
        cells = [(row["prompt"], row["completion"].strip() + end) for row, end in zip(rows, ends, strict=True)]
        place = "" if dry else f"; all answers are in {file}"
        title = f"Answers at step {step} (… = cut at {self.max_new_tokens} tokens{place})"
        size = shutil.get_terminal_size((100, 24))
        lines = table(cells, size.columns).splitlines()
        most = size.lines - 6 if sys.stdout.isatty() else len(lines)  # the metrics stay on the screen
        if len(lines) > most:
            lines[max(1, most) :] = ["… (the file has the rest)"]
        metrics = ", ".join(f"{k} {v:.4g}" for k, v in trainer.progress_bar_metrics.items() if isinstance(v, float))
        text = "\n".join(["", title, *lines, *([f"Latest metrics: {metrics}"] if metrics else [])])
        encoding = sys.stdout.encoding or "utf-8"  # a character that the terminal lacks must not end the run
        print_above_bar(trainer, text.encode(encoding, "replace").decode(encoding))
        log_table(trainer, "samples", names, [[str(row[name]) for name in names] for row in rows], step)


def _parse_prompt(prompt: Any, where: str, as_text: bool) -> list[Message] | str:
    """Returns a prompt's turns without a final answer, or a plain text."""
    if isinstance(prompt, str) and prompt.strip():
        return prompt if as_text else [Message(role="user", content=prompt)]
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        texts = [m.get(key) if isinstance(m, Mapping) else None for m in prompt for key in ("role", "content")]
        turns = prompt[:-1] if prompt and texts[-2] == "assistant" else prompt
        if turns and all(isinstance(text, str) for text in texts):
            return [Message(role=turn["role"], content=turn["content"]) for turn in turns]
    raise BadRowError(
        where, "no prompt", "not a prompt. Write a text or a list of messages {role: ..., content: ...}; in a file, "
        "use the column 'prompt' or 'messages'."
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- text tables


def log_table(trainer: L.Trainer, name: str, columns: Sequence[str], data: Sequence[Sequence[str]], step: int) -> None:
    """Hands a table of texts to all loggers that can take one.

    Args:
        trainer: It has the loggers.
        name: Name of the table.
        columns: Names of the columns.
        data: The cells of each row.
        step: Its step.
    """
    for logger in trainer.loggers:
        log: Any = getattr(logger, "log_table", None) or getattr(logger, "log_text", None)
        experiment: Any = getattr(logger, "experiment", None)
        if log is not None:
            log(key=name, columns=list(columns), data=[list(row) for row in data], step=step)
        elif hasattr(experiment, "add_text"):  # TensorBoard
            experiment.add_text(name, markdown(columns, data), step)
        elif isinstance(logger, MLFlowLogger):
            experiment.log_text(logger.run_id, markdown(columns, data), f"{name}/step_{step}.md")
        elif isinstance(logger, CometLogger):
            experiment.log_text(markdown(columns, data), step=step)


def table(rows: Sequence[tuple[str, str]], width: int) -> str:
    """Formats two columns of wrapped text for a terminal.

    Args:
        rows: Left and right text of each row.
        width: Width of the terminal in columns.

    Returns:
        The table. The left column is at most a third of the width, and its texts at most eight lines.
    """
    longest = max((columns(line) for left, _ in rows for line in left.splitlines()), default=1)
    first = max(2, min(longest, width // 3))
    second = max(2, width - first - 3)
    lines = []
    for left, right in rows:
        names, texts = wrap(left, first), wrap(right, second)
        if len(names) > 8:
            names = [*names[:7], "…"]
        lines.append("-" * first + "-+-" + "-" * second)
        for i in range(max(len(names), len(texts))):
            name = names[i] if i < len(names) else ""
            text = texts[i] if i < len(texts) else ""
            lines.append(f"{name}{' ' * (first - columns(name))} | {text}")
    return "\n".join(lines)


def wrap(text: str, width: int) -> list[str]:
    """Breaks text at spaces and between wide (Chinese) characters, and within a word if it is too long.

    Args:
        text: The text. Control characters are replaced by spaces.
        width: Width of a line in columns, at least 2.

    Returns:
        The lines.
    """
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for character in paragraph:
            line += " " if unicodedata.category(character) == "Cc" else character
            if columns(line) > width:
                ends = (
                    i for i in range(len(line) - 1, 0, -1) if " " in line[i - 1 : i + 1] or _wide(line[i - 1 : i + 1])
                )
                end = next(ends, len(line) - 1)
                lines.append(line[:end].rstrip())
                line = line[end:].lstrip()
        lines.append(line)
    return lines


def columns(text: str) -> int:
    """Returns the width of a text in terminal columns: two per wide character, none per combining character."""
    return sum(0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 1 + _wide(c) for c in text)


def _wide(text: str) -> bool:
    return any(unicodedata.east_asian_width(c) in "WF" for c in text)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a Markdown table, which TensorBoard shows."""
    cells = [[c.strip().replace("|", "\\|").replace("\n", "<br>") for c in row] for row in (header, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])
