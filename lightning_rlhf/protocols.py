"""What data modules, the modules of stages, and callbacks ask of one another.

No class has to inherit from these: ``isinstance`` tells whether an object has what is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_rlhf.data import PromptBatch
    from lightning_rlhf.models import Load
    from lightning_rlhf.rollout import Completion, Sampling

SamplePrompt: TypeAlias = "list[dict[str, str]] | str"


@runtime_checkable
class HasTokenizer(Protocol):
    """Data modules without a tokenizer of their own use the module's, with its chat template."""

    tokenizer: PreTrainedTokenizerBase


@runtime_checkable
class HasStopTokens(Protocol):
    """``stop_token_ids`` end an answer, the first of them first."""

    stop_token_ids: Sequence[int]


def stop_tokens_of(module: object) -> tuple[int, ...]:
    """Returns a module's ``stop_token_ids``; none if it has none."""
    return tuple(module.stop_token_ids) if isinstance(module, HasStopTokens) else ()


@runtime_checkable
class HasContext(Protocol):
    """``context_length`` is the maximum number of tokens per sequence; None if the model's config has none."""

    context_length: int | None


@runtime_checkable
class LimitsPrompts(Protocol):
    """``prompt_limit`` is the maximum number of tokens per prompt that leaves room for its completion."""

    prompt_limit: int | None


@runtime_checkable
class DrawsSamples(Protocol):
    """``sampling`` says how the module draws completions in training, ``samples_per_prompt`` how many."""

    @property
    def sampling(self) -> Sampling: ...  # noqa: D102

    @property
    def samples_per_prompt(self) -> int: ...  # noqa: D102


@runtime_checkable
class ReadsMismatched(Protocol):
    """``reads_mismatched`` says whether batches need answers of other prompts (KTO's reference point)."""

    @property
    def reads_mismatched(self) -> bool: ...  # noqa: D102


@runtime_checkable
class HasLoad(Protocol):
    """``load`` says how the module holds weights."""

    load: Load


@runtime_checkable
class ScoresCompletions(Protocol):
    """``score_completions`` gives values by name, one per completion, for ``SampleCompletions``."""

    def score_completions(  # noqa: D102
        self, prompts: PromptBatch, completions: Sequence[Sequence[Completion]]
    ) -> Mapping[str, Sequence[float]]: ...


@runtime_checkable
class RecordsCompletions(Protocol):
    """``completion_records`` gives this rank's completions of the last of ``iteration`` iterations."""

    iteration: int

    def completion_records(self) -> list[dict[str, Any]]: ...  # noqa: D102


@runtime_checkable
class PlaysEpisodes(Protocol):
    """``play_episodes`` completes prompts in the module's ``environment``, where it has one.

    ``read_openings`` gives the tokens that the policy reads before its first turn.
    """

    environment: object | None

    def play_episodes(  # noqa: D102
        self, prompts: PromptBatch, keys: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Completion]]: ...

    def read_openings(self, prompts: PromptBatch) -> list[list[int]]: ...  # noqa: D102


@runtime_checkable
class ReadsTexts(Protocol):
    """``as_text`` says that prompts are plain texts that no chat template touches."""

    as_text: bool


@runtime_checkable
class GivesSamplePrompts(Protocol):
    """Prompts for ``SampleCompletions`` and ``MeasureWinRate``, with the columns that reward functions get."""

    def sample_prompts(self, n: int) -> Sequence[SamplePrompt]: ...  # noqa: D102

    def sample_columns(self, n: int) -> Sequence[Mapping[str, Any]]: ...  # noqa: D102


@runtime_checkable
class FindsRows(Protocol):
    """``where`` names the file and line of a row of a part (train, val, test, predict)."""

    def where(self, part: str, row: int) -> str: ...  # noqa: D102


@runtime_checkable
class KnowsLengths(Protocol):
    """``longest`` is the maximum number of tokens of a part's rows; 0 if the part has none or was not set up."""

    def longest(self, part: str) -> int: ...  # noqa: D102


@runtime_checkable
class ChecksValidation(Protocol):
    """``check_validation`` warns before training if nothing is validated, and names the callbacks that wait."""

    def check_validation(self) -> None: ...  # noqa: D102


@runtime_checkable
class GivesPrompts(KnowsLengths, Protocol):
    """``batch_size`` prompts per iteration; ``beside`` has the data modules of ``ptx`` and ``pairs``, if there are."""

    batch_size: int

    @property
    def beside(self) -> Mapping[str, KnowsLengths]: ...  # noqa: D102


@runtime_checkable
class NamesOrigins(Protocol):
    """``origins`` has for each part the names (source, language) of the numbers that its pairs carry."""

    origins: dict[str, list[tuple[str, ...]]]
