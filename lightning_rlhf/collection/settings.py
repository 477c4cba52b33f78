"""The settings of ``lightning-rlhf collect``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_rlhf.collection.answers import Writing
from lightning_rlhf.collection.generators import Generator
from lightning_rlhf.endpoint import Budget
from lightning_rlhf.rewards.judges import Judge

#: What ``filters`` is unless it is set.
FILTERS: tuple[str | Mapping[str, Any], ...] = (
    {"Length": {"min_instruction": 3}},
    *("Script", "Repetition", "Refusal", "MissingInput", "PersonalData", "NearDuplicate"),
)


@dataclass(frozen=True)
class Settings:
    """Settings of collecting data: which models write, what is kept, and what may be spent.

    Args:
        generator: Writes tasks, and answers to prompts. With --preferences it may be a list: each answers all prompts.
        answerer: Writes answers to the tasks that were grown. None: the generator.
        budget: Limit of money or tokens, with the prices of a million tokens. None: no limit.
        seeds: Tasks to begin with: ``bundled``, or files in any format of the data modules.
        on_bad_row: What happens to rows of seeds or prompts that can't be used.
        novelty: Largest ROUGE-L of a task with a seed or an accepted task. A smaller value drops more.
        filters: What drops rows, in this order: names, or names with settings, such as ``{Length: {max_answer: 500}}``.
        task_sampling: How tasks are sampled.
        answer_sampling: How answers are sampled.
        min_yield: Goes on after the pilot only if at least this share of the tasks that were asked for became rows, in
            every language.
        val: Share of the rows that become validation rows.
        test: Share of the rows that become test rows.
        samples: Answers per prompt and generator, with --preferences.
        reward: With --preferences: ranks answers. A reward model's directory or hub id, the import path of a function,
            or a list of {source: ..., weight: ...}.
        judge: With --preferences: ranks answers by comparing each two in both orders.

    Raises:
        ValueError: A setting is out of range; the message says which.
    """

    generator: Generator | list[Generator]
    answerer: Generator | None = None
    budget: Budget | None = None
    seeds: str | list[str] = "bundled"
    on_bad_row: Literal["raise", "skip"] = "raise"
    novelty: float = 0.7
    filters: Sequence[str | Mapping[str, Any]] = FILTERS
    task_sampling: Writing = field(default_factory=Writing)
    answer_sampling: Writing = field(default_factory=lambda: Writing(temperature=0.7))
    min_yield: float = 0.1
    val: float = 0.05
    test: float = 0.0
    samples: int = 4
    reward: Any = None
    judge: Judge | None = None

    def __post_init__(self) -> None:
        for name, right, rule in (
            ("min_yield", 0 <= self.min_yield <= 1, "between 0 and 1"),
            (
                "val and test",
                min(self.val, self.test) >= 0 and self.val + self.test < 1,
                "0 or more, and below 1 together",
            ),
            ("samples", self.samples >= 1, "at least 1"),
        ):
            if not right:
                raise ValueError(f"{name} must be {rule}.")
