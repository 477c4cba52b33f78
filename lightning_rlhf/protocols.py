"""What data modules, the modules of stages, and callbacks ask of one another.

No class has to inherit from these: ``isinstance`` tells whether an object has what is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SamplePrompt: TypeAlias = "list[dict[str, str]] | str"


@runtime_checkable
class HasTokenizer(Protocol):
    """Data modules without a tokenizer of their own use the module's, with its chat template."""

    tokenizer: PreTrainedTokenizerBase


@runtime_checkable
class HasStopTokens(Protocol):
    """``stop_token_ids`` end an answer, the first of them first."""

    stop_token_ids: Sequence[int]


@runtime_checkable
class HasContext(Protocol):
    """``context_length`` is the maximum number of tokens per sequence; None if the model's config has none."""

    context_length: int | None


@runtime_checkable
class LimitsPrompts(Protocol):
    """``prompt_limit`` is the maximum number of tokens per prompt that leaves room for its completion."""

    prompt_limit: int | None


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
class HasPtx(KnowsLengths, Protocol):
    """``ptx`` is the data module of the texts beside the prompts (PPO-ptx), or None."""

    @property
    def ptx(self) -> KnowsLengths | None: ...  # noqa: D102


@runtime_checkable
class NamesOrigins(Protocol):
    """``origins`` has for each part the names (source, language) of the numbers that its pairs carry."""

    origins: dict[str, list[tuple[str, ...]]]
