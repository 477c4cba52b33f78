"""The largest micro-batch of a stage, from its settings: what is planned for."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning_rlhf.data import Branch, PackedBatch, PromptBatch, Tree, pack
from lightning_rlhf.data.packed import Pair
from lightning_rlhf.plan.fakes import real_tensors
from lightning_rlhf.stages.base import Stage
from lightning_rlhf.stages.rl import RLStage


class Shape(NamedTuple):
    """A micro-batch whose rows are all as long as they may be.

    Attributes:
        kind: What the stage works on.
        rows: Prompts with their answers.
        prompt: Tokens of a prompt.
        answer: Tokens of an answer.
        answers: Answers of a prompt.
        passes: Micro-batches of a rank in an optimizer step.
        prompts: Reinforcement learning: prompts of a rank in an iteration.
        updates: Reinforcement learning: optimizer steps in an iteration.
        minibatches: Reinforcement learning: parts of an iteration that take a step each.
        completions: Reinforcement learning: completions of a prompt in an iteration.
    """

    kind: str
    rows: int
    prompt: int
    answer: int
    answers: int
    passes: int
    prompts: int = 0
    updates: int = 1
    minibatches: int = 1
    completions: int = 1

    @property
    def row_tokens(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.answers * self.answer

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.rows * self.row_tokens

    @property
    def step_tokens(self) -> int:
        """Tokens of a rank in an optimizer step, or in an iteration."""
        return self.tokens * self.passes * self.minibatches

    def with_rows(self, rows: int) -> Shape:
        """The same step in micro-batches of another size."""
        return self._replace(rows=rows, passes=-(-self.rows * self.passes // rows))

    def trees(self) -> list[Tree]:
        """The rows."""
        answers = [Branch([1] * self.answer) for _ in range(self.answers)]
        pairs = (Pair(0, 1),) if self.kind == "preferences" else ()
        labels = [[i % 2 == 0] * self.answers if self.kind == "unpaired" else [] for i in range(self.rows)]
        return [Tree([1] * self.prompt, answers, pairs=pairs, labels=each) for each in labels]

    def batch(self) -> PackedBatch | PromptBatch:
        """The rows as a stage reads them; of prompts none, since nothing is sampled."""
        if self.kind == "prompts":
            return PromptBatch([], [], (), {}, 0)
        with real_tensors():
            batch = pack(self.trees())
            if self.kind == "unpaired":
                batch.mismatched = pack(self.trees())
        return batch


def shape_of(module: Stage, data: Any, copies: int, accumulate: int) -> Shape:
    """Returns the largest micro-batch of a run.

    Args:
        module: The stage.
        data: Its data module.
        copies: Number of ranks with different data.
        accumulate: The Trainer's micro-batches per step.

    Raises:
        ValueError: Nothing says how long a row may be.
    """
    length = data.max_length or module.context_length
    if length is None:
        raise ValueError("Nothing says how long a row may be: set data.max_length.")
    if isinstance(module, RLStage):
        return _of_rollout(module, length, -(-data.batch_size // copies))
    kind = module.works_on or "instructions"
    answers = 2 if kind == "preferences" else 1
    shape = Shape(kind, 1, length // 2, length - length // 2, answers, accumulate)
    rows = max(1, -(-data.batch_size // (copies * accumulate)))
    if data.max_tokens is not None:
        rows = max(1, min(rows, data.max_tokens // shape.row_tokens))
    return shape._replace(rows=rows)


def _of_rollout(module: RLStage, length: int, prompts: int) -> Shape:
    answer, answers, updates = module.sampling.max_new_tokens, module.samples_per_prompt, module.updates
    prompt = min(length, module.prompt_limit or length)
    budget = updates.micro_batch_tokens
    rows = max(1, -(-prompts // updates.minibatches))  # of a minibatch
    trees = rows
    if budget is not None and prompt + answers * answer > budget:  # a prompt is repeated for a part of its answers
        fit = max(1, (budget - prompt) // answer)
        trees, answers = rows * -(-answers // fit), fit
    fitting = trees if budget is None else max(1, min(trees, budget // (prompt + answers * answer)))
    steps = updates.epochs * updates.minibatches
    parts = (-(-trees // fitting), prompts, steps, updates.minibatches, module.samples_per_prompt)
    return Shape("prompts", fitting, prompt, answer, answers, *parts)
