"""A conversation as token ids, and which of them the loss reads.

What holds for every chat template and tokenizer:

- The ids are those of ``apply_chat_template``, which is what inference feeds, so BOS is there as often as the template
  writes it.
- A prompt's ids are those that inference gets for it alone. Where the text, tokenised in one piece, has a token that
  reaches from the prompt into the completion, it is tokenised in two pieces.
- Every turn that is scored ends with a stop token that is scored too. Padding plays no part: nothing is read off ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast, get_args

from jinja2 import TemplateError
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_rlhf.data.formats import Conversation, Message, UnfitRowError
from lightning_rlhf.data.templates import CHAT_TEMPLATES, stop_token_ids

#: What the loss reads: every assistant turn, the last of them, or all tokens.
LossOn = Literal["assistant", "last", "all"]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TokenizeError(UnfitRowError):
    """A conversation that can't become tokens to learn from."""


@dataclass(frozen=True)
class Tokens:
    """A row of tokens.

    Attributes:
        input_ids: The ids.
        scored: For each of them, whether the loss reads it. Never the first, which nothing predicts.
        cut: Whether scored tokens were cut off the end, the stop token of the last turn among them.
    """

    input_ids: list[int]
    scored: list[bool]
    cut: bool = False


class _Span(NamedTuple):
    """A turn that is scored, in characters: from ``start`` to ``end``, behind its stop token if it has one."""

    start: int
    end: int
    stopped: bool


def encode(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    loss_on: LossOn = "assistant",
    stop_ids: Sequence[int] = (),
) -> Tokens:
    """Tokenise a conversation and mark what the loss reads.

    Which characters are the assistant's, the template says itself where it has ``{% generation %}`` markers; a stop
    token that they leave out is scored all the same. Without markers they are found by rendering turn by turn: a turn
    starts where the generation prompt ends, and ends with its stop token. Where the template writes no stop token after
    the last assistant turn, the eos is added there.

    Plain text gets BOS if the tokenizer begins texts with it, and one eos; all of it is scored, whatever `loss_on` is.

    Args:
        tokenizer: The tokenizer, with a chat template if the conversation has messages.
        conversation: The conversation.
        loss_on: ``"assistant"`` scores every assistant turn, ``"last"`` the last one, ``"all"`` every token.
        stop_ids: Tokens that end a turn where the template writes them there, besides those of the tokenizer: the
            module's ``stop_token_ids``.

    Returns:
        The tokens, untruncated.

    Raises:
        TokenizeError: If the conversation can't be learnt from with this template.
        ValueError: If `loss_on` is unknown, or the tokenizer lacks a chat template or a stop token: no fault of a row.
    """
    if loss_on not in get_args(LossOn):
        raise ValueError(f"loss_on is {loss_on!r}. Choose one of: {', '.join(get_args(LossOn))}.")
    if conversation.messages is None:
        return _encode_text(tokenizer, conversation.text or "")
    messages = conversation.messages
    text = _render(tokenizer, messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns and loss_on != "all":
        raise TokenizeError(
            "no assistant turn", "no turn is the assistant's: there is nothing to learn. Add the answer"
        )
    met = turns[-1:] if loss_on == "last" else turns  # the turns that inference may meet
    prompts = {i: _render(tokenizer, messages[:i], add_generation_prompt=True) for i in met if i > 0}
    borders = sorted({len(prompt) for prompt in prompts.values() if text.startswith(prompt)})
    # Where all tokens are scored, only the end of the last turn is of interest.
    read = turns if loss_on == "assistant" else turns[-1:]
    stops = stop_token_ids(tokenizer, stop_ids)
    told = [i for i in stops if i == stops[0] or i in tokenizer.added_tokens_decoder]  # others spell ordinary text
    stop = "|".join(re.escape(str(tokenizer.convert_ids_to_tokens(i))) for i in told)
    spans = _marked_spans(tokenizer, messages, text, borders, stop, only_last=loss_on != "assistant") or [
        _rendered_span(tokenizer, messages, text, turn, prompts.get(turn), stop) for turn in read
    ]

    ids, index = _tokenize(tokenizer, text, borders, {point for span in spans for point in span[:2]})
    scored = [loss_on == "all"] * len(ids)
    for span in spans:
        for i in range(index[span.start], index[span.end]):
            scored[i] = True
    if spans and not spans[-1].stopped:
        end = index[spans[-1].end]
        ids.insert(end, stops[0])
        scored.insert(end, True)
    return _tokens(ids, scored)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message] | str) -> list[int]:
    """Tokenise a prompt as inference does. Rollouts start from it.

    Args:
        tokenizer: The tokenizer, with a chat template if the prompt has messages.
        prompt: Messages, which are rendered with the generation prompt, or a plain text, which no template touches.

    Returns:
        The ids.

    Raises:
        TokenizeError: If the template refuses the messages, or if there are no tokens.
        ValueError: If the tokenizer has no chat template, and the prompt has messages.
    """
    if isinstance(prompt, str):
        ids = _plain_ids(tokenizer, prompt)
    else:
        ids = _ids(tokenizer, _render(tokenizer, prompt, add_generation_prompt=True))
    if not ids:
        raise TokenizeError("empty prompt", "the prompt has no tokens. Write its text or remove the row")
    return ids


def truncate(tokens: Tokens, max_length: int) -> Tokens | None:
    """Cut a row at the end.

    Args:
        tokens: The row.
        max_length: The number of tokens that may stay.

    Returns:
        The row, with ``cut`` set if the loss lost tokens and with them the stop token; None if it would read none.
    """
    if len(tokens.input_ids) <= max_length:
        return tokens
    scored = tokens.scored[:max_length]
    if not any(scored):
        return None
    return Tokens(tokens.input_ids[:max_length], scored, cut=tokens.cut or any(tokens.scored[max_length:]))


def _tokens(ids: list[int], scored: list[bool]) -> Tokens:
    scored[:1] = [False] * len(scored[:1])
    if not any(scored):
        raise TokenizeError(
            "nothing to score", "no token is left for the loss to read. Write the text or remove the row"
        )
    return Tokens(ids, scored)


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    stop = stop_token_ids(tokenizer)[0]
    ids = _plain_ids(tokenizer, text.removesuffix(str(tokenizer.convert_ids_to_tokens(stop))))
    return _tokens([*ids, stop], [True] * (len(ids) + 1))


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Text with the special tokens before it that the tokenizer adds of itself, and no eos after it."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    writes_bos = bos is not None and text.startswith(bos)
    ids = _ids(tokenizer, text, add_special_tokens=not writes_bos)
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(eos):
        ids.pop()
    return ids


def _chat(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer has no chat template. Set chat_template to a preset ({', '.join(CHAT_TEMPLATES)}) "
            "or to the path of a Jinja file."
        )
    if not messages:
        raise TokenizeError("no messages", "the conversation has no turns. Add turns or remove the row")
    try:
        return cast(
            str,
            tokenizer.apply_chat_template(_chat(messages), tokenize=False, add_generation_prompt=add_generation_prompt),
        )
    except TemplateError as error:
        raise TokenizeError(
            "template refused the conversation", f"the chat template refused the conversation: {error}"
        ) from error


def _marked_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    borders: Sequence[int],
    stop: str,
    only_last: bool,
) -> list[_Span]:
    """What generation markers enclose, if the template has them."""
    template = tokenizer.get_chat_template()
    if not _GENERATION.search(template):
        return []
    marked = _one_token_a_character().apply_chat_template(
        _chat(messages),
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **cast(dict[str, Any], tokenizer.special_tokens_map),
    )
    mask: list[int] = cast(BatchEncoding, marked)["assistant_masks"]
    changes = (i for i in range(1, len(mask)) if mask[i] != mask[i - 1])
    edges = [0, *changes, len(mask)]
    spans = [_close(text, start, end, stop) for start, end in pairwise(edges) if any(mask[start:end])]
    if not only_last:
        return spans
    return [span for span in spans if span.start >= borders[-1]] if borders else spans[-1:]


@lru_cache(maxsize=1)
def _one_token_a_character() -> PreTrainedTokenizerFast:
    """With this tokenizer, transformers' mask of the assistant's tokens is a mask of the assistant's characters."""
    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _close(text: str, start: int, end: int, stop: str) -> _Span:
    """Moves the end of a marked stretch to behind the stop token, which markers may leave out or have text after."""
    inside = re.search(rf"({stop})\s*\Z", text[start:end])
    if inside:
        return _Span(start, start + inside.end(1), True)
    behind = re.compile(rf"\s*({stop}|\Z)").match(text, end)
    return _Span(start, behind.end(), bool(behind[1])) if behind else _Span(start, end, False)


def _rendered_span(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    turn: int,
    prompt: str | None,
    stop: str,
) -> _Span:
    """What inference would write after the prompt, up to the stop token. The whole rendering must have it as well."""
    if prompt is None:
        raise TokenizeError(
            "nothing before the assistant",
            "the assistant's turn is the first, and the chat template doesn't mark where it starts. Put a user turn "
            "before it, or use a chat template with generation markers",
        )
    whole = _render(tokenizer, messages[: turn + 1])
    content = messages[turn]["content"].strip()
    found = whole.find(content, len(prompt))  # a stop token that the content spells doesn't end the turn
    stopped = re.compile(stop).search(whole, len(prompt) if found < 0 else found + len(content))
    end = stopped.end() if stopped else len(whole)
    if not (whole.startswith(prompt) and text.startswith(whole[:end])):
        raise TokenizeError(
            "template rewrites turns",
            f"the chat template renders turn {turn + 1} (assistant) otherwise in the whole conversation than when it "
            "is generated, as templates do that strip the thinking of earlier turns. Set loss_on to 'last', or use a "
            "chat template with generation markers",
        )
    return _Span(len(prompt), end, stopped is not None)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, borders: Iterable[int], points: Iterable[int]
) -> tuple[list[int], dict[int, int]]:
    """Tokenises a text so that no token reaches over a border.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        borders: The characters before which prompts end. A prompt's ids are those it has alone.
        points: Further characters whose tokens are asked for.

    Returns:
        The ids, and for each border and point the index of the first token that reaches behind it.
    """
    ids: list[int] = []
    index: dict[int, int] = {}
    start, rest = 0, _ids(tokenizer, text)
    joint = rest
    for point in sorted({*borders, *points}):
        head = continued_ids(tokenizer, text[start:point]) if start else _ids(tokenizer, text[:point])
        shared = next(
            (i for i, (a, b) in enumerate(zip(head, rest, strict=False)) if a != b), min(len(head), len(rest))
        )
        if shared < len(head) and point in borders:
            ids += head
            start, rest, shared = point, continued_ids(tokenizer, text[point:]), 0
        index[point] = len(ids) + shared
    ids += rest
    if start and spell(tokenizer, ids) != spell(tokenizer, joint):
        raise TokenizeError(
            "prompt and completion don't join",
            "a token reaches from the prompt into the completion, and tokenised apart they spell another text. Use a "
            "chat template whose generation prompt ends with a special token or a newline",
        )
    return ids, index


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def continued_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenises text that follows other text: without the blank that SentencePiece puts before a text."""
    before = _ids(tokenizer, "\n")
    both = _ids(tokenizer, "\n" + text)
    return both[len(before) :] if both[: len(before)] == before else _ids(tokenizer, text)


def spell(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of tokens, special ones included, with no blanks tidied away."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
