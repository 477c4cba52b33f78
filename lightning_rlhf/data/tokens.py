"""A conversation as token ids, and which of them the loss reads.

For every chat template and tokenizer:

- The ids are those of ``apply_chat_template``, which inference feeds too, so BOS comes as often as the template writes
  it.
- A prompt's ids are those that inference gets for it alone. If a token of the whole text would reach from the prompt
  into the completion, the text is tokenized in two pieces.
- Every scored turn ends with exactly one stop token, which is scored too: an answer that ends with a stop token loses
  it before it is rendered. Padding has no effect: no rule looks at ids.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast, get_args

from jinja2 import TemplateError
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_rlhf.data.formats import REASONING, Conversation, Message, UnfitRowError
from lightning_rlhf.data.templates import CHAT_TEMPLATES, stop_token_ids
from lightning_rlhf.utils.text import SURROGATE

#: What the loss reads: every assistant turn, the last of them, or all tokens.
LossOn = Literal["assistant", "last", "all"]

#: Advice for faults of turns before the last, for data modules that have this setting.
LAST_ALONE = "Set loss_on to 'last'. Or: "

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TokenizeError(UnfitRowError):
    """A conversation that can't become tokens to train on."""


@dataclass(frozen=True)
class Tokens:
    """A row of tokens.

    Attributes:
        input_ids: The ids.
        scored: For each id, whether the loss reads it. The first never is: nothing predicts it.
        cut: Whether scored tokens were cut off at the end, including the stop token of the last turn.
        unread: Keys of turns that the template doesn't write.
        extra_stops: Whether an answer ended with a stop token of its own, which was left out.
    """

    input_ids: list[int]
    scored: list[bool]
    cut: bool = False
    unread: tuple[str, ...] = ()
    extra_stops: bool = False


class _Span(NamedTuple):
    """A scored turn in characters: from ``start`` to ``end``, which is behind its stop token if it has one."""

    start: int
    end: int
    stopped: bool


def encode(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    loss_on: LossOn = "assistant",
    stop_ids: Sequence[int] = (),
) -> Tokens:
    """Tokenize a conversation and mark what the loss reads.

    A template with ``{% generation %}`` markers says which characters are the assistant's; a stop token outside of the
    markers is scored too. Without markers, the characters are found by rendering turn by turn: a turn starts where the
    generation prompt ends, and ends with its stop token. If the template writes no stop token after the last assistant
    turn, the eos is added there. A turn of weight 0 is not scored.

    Plain text gets BOS if the tokenizer begins texts with it, and one eos. All of it is scored, with any ``loss_on``.

    Args:
        tokenizer: The tokenizer, with a chat template if the conversation has messages.
        conversation: The conversation.
        loss_on: ``"assistant"`` scores every assistant turn, ``"last"`` the last one, ``"all"`` every token.
        stop_ids: Further tokens that end a turn if the template writes them there: the module's ``stop_token_ids``.

    Returns:
        The tokens, untruncated.

    Raises:
        TokenizeError: The conversation can't be trained on with this template.
        ValueError: ``loss_on`` is unknown, or the tokenizer lacks a chat template or a stop token: no fault of a row.
    """
    if loss_on not in get_args(LossOn):
        raise ValueError(f"loss_on is {loss_on!r}. Choose one of: {', '.join(get_args(LossOn))}.")
    if conversation.messages is None:
        return _encode_text(tokenizer, conversation.text or "")
    options = conversation.options
    text = _render(tokenizer, conversation.messages, options)
    stops = stop_token_ids(tokenizer, stop_ids)
    stop = _pattern(tokenizer, stops)
    messages = _stopped_once(conversation.messages, stop)
    unread = _check_template(tokenizer, messages, options)
    if extra_stops := messages != list(conversation.messages):
        text = _render(tokenizer, messages, options)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    learned = _learned(messages, turns, loss_on)
    met = turns[-1:] if loss_on == "last" else turns  # the turns that inference may be asked for
    prompts = {i: _render(tokenizer, messages[:i], options, add_generation_prompt=True) for i in met if i > 0}
    borders = {i: len(prompt) for i, prompt in prompts.items() if text.startswith(prompt)}
    # if all tokens are scored, only the end of the last turn matters, and the turns that are not learned
    read = learned if loss_on != "all" else [i for i in turns if i == turns[-1] or i not in learned]
    marked = _marked_spans(tokenizer, messages, options, text, stop)
    if marked and read and read[-1] in prompts:
        _check_opening(tokenizer, messages, options, read[-1], prompts[read[-1]], text)
    spans = _by_turn(marked, turns, learned, read, borders) or {
        i: [_rendered_span(tokenizer, messages, options, text, i, prompts.get(i), stop, loss_on)] for i in read
    }

    points = {point for found in spans.values() for span in found for point in span[:2]}
    ids, index = _tokenize(tokenizer, text, borders.values(), points)
    scored = [loss_on == "all"] * len(ids)
    for turn, found in spans.items():
        for span in found:
            for i in range(index[span.start], index[span.end]):
                scored[i] = turn in learned
    last = spans.get(turns[-1]) if turns else None
    if last and not last[-1].stopped:
        end = index[last[-1].end]
        ids.insert(end, stops[0])
        scored.insert(end, turns[-1] in learned)
    return replace(_tokens(ids, scored), unread=unread, extra_stops=extra_stops)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message] | str,
    options: Mapping[str, Any] | None = None,
    stop_ids: Sequence[int] = (),
) -> list[int]:
    """Tokenize a prompt as inference does. Rollouts start with these tokens.

    Args:
        tokenizer: The tokenizer, with a chat template if the prompt has messages.
        prompt: Messages, which are rendered with the generation prompt; or a plain text, which no template touches.
        options: What the template gets beside the messages.
        stop_ids: As for :func:`encode`, for answers in the prompt.

    Returns:
        The ids.

    Raises:
        TokenizeError: The template refuses the messages, or there are no tokens.
        ValueError: The prompt has messages, and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        ids = _plain_ids(tokenizer, prompt)
    else:
        _check_template(tokenizer, prompt, options or {})
        if any(message["role"] == "assistant" for message in prompt):
            prompt = _stopped_once(prompt, _pattern(tokenizer, stop_token_ids(tokenizer, stop_ids)))
        ids = _ids(tokenizer, _render(tokenizer, prompt, options or {}, add_generation_prompt=True))
    if not ids:
        raise TokenizeError("empty prompt", "the prompt has no tokens. Write its text or remove the row")
    return ids


def encode_reply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    last: int,
    options: Mapping[str, Any] | None = None,
    stop_ids: Sequence[int] = (),
) -> list[int]:
    """Tokenize what the chat template puts between an answer and the next one: messages and the generation prompt.

    The answer's own tokens stay as they were sampled, whatever their text would be tokenized to.

    Args:
        tokenizer: The tokenizer, with a chat template.
        messages: What is said to the answer, at least one turn.
        last: The answer's last token. If it is a stop token, the end of the turn is there already.
        options: What the template gets beside the messages.
        stop_ids: As for :func:`encode`.

    Returns:
        The ids, beginning with the token that ends a turn if ``last`` is no stop token.

    Raises:
        TokenizeError: The template refuses the messages, or does not write an answer as it is.
    """
    text = _render(tokenizer, [*_PROBE, *messages], options or {}, add_generation_prompt=True)
    _, found, rest = text.partition(_PROBE[1]["content"])
    if not found:
        reason = "the chat template doesn't write an answer as it is, so what follows it can't be found"
        raise TokenizeError("template rewrites turns", f"{reason}. Set chat_template to another one")
    stops = stop_token_ids(tokenizer, stop_ids)
    if last in stops and (end := re.match(rf"\s*(?:{_pattern(tokenizer, stops)})", rest)):
        rest = rest[end.end() :]
    if last in tokenizer.added_tokens_decoder:  # tokenizers split texts there, and some write no blank behind it
        ids = _ids(tokenizer, str(tokenizer.convert_ids_to_tokens(last)) + rest)
        if ids[:1] == [last]:
            return ids[1:]
    return continued_ids(tokenizer, rest)


_PROBE = (Message(role="user", content="question"), Message(role="assistant", content="probe of an answer"))


def truncate(tokens: Tokens, max_length: int) -> Tokens | None:
    """Cut a row at the end.

    Args:
        tokens: The row.
        max_length: Maximum number of tokens.

    Returns:
        The row, with ``cut`` set if it lost scored tokens (the stop token among them); None if no scored token is left.
    """
    if len(tokens.input_ids) <= max_length:
        return tokens
    scored = tokens.scored[:max_length]
    if not any(scored):
        return None
    cut = tokens.cut or any(tokens.scored[max_length:])
    return replace(tokens, input_ids=tokens.input_ids[:max_length], scored=scored, cut=cut)


def _tokens(ids: list[int], scored: list[bool]) -> Tokens:
    scored[:1] = [False] * len(scored[:1])
    if not any(scored):
        raise TokenizeError("nothing to score", "the loss reads none of the tokens. Write the text or remove the row")
    return Tokens(ids, scored)


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    stop = stop_token_ids(tokenizer)[0]
    ids = _plain_ids(tokenizer, text.removesuffix(str(tokenizer.convert_ids_to_tokens(stop))))
    return _tokens([*ids, stop], [True] * (len(ids) + 1))


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Text with the special tokens that the tokenizer puts before texts, and without eos."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    writes_bos = bos is not None and text.startswith(bos)
    ids = _ids(tokenizer, text, add_special_tokens=not writes_bos)
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(eos):
        ids.pop()
    return ids


def check_answers(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], stop_ids: Sequence[int] = ()
) -> None:
    """Refuse a row with an answer that is only a stop token, like one with an empty answer.

    Raises:
        TokenizeError: An answer is only a stop token.
    """
    stop = re.compile(rf"(?:(?:{_pattern(tokenizer, stop_token_ids(tokenizer, stop_ids))})\s*)+")
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and stop.fullmatch(message["content"].strip()):
            reason = f"turn {number} (assistant) is only a stop token. Write its text or remove the row"
            raise TokenizeError("empty turn", reason)


def _pattern(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> str:
    """A regular expression for these tokens, without those that spell ordinary text."""
    told = [i for i in stops if i == stops[0] or i in tokenizer.added_tokens_decoder]
    return "|".join(re.escape(str(tokenizer.convert_ids_to_tokens(i))) for i in told)


def _stopped_once(messages: Sequence[Message], stop: str) -> list[Message]:
    """The messages, without the stop tokens at the end of the assistant's texts: the template writes one."""
    at_end = re.compile(rf"(?:(?:{stop})\s*)+\Z")
    found = []
    for message in messages:
        text = at_end.sub("", message["content"]) if message["role"] == "assistant" else message["content"]
        found.append(message if text == message["content"] else cast(Message, {**message, "content": text}))
    return found


def _learned(messages: Sequence[Message], turns: Sequence[int], loss_on: LossOn) -> list[int]:
    """The assistant turns that the loss reads."""
    if not turns and loss_on != "all":
        raise TokenizeError(
            "no assistant turn", "no turn is the assistant's: there is nothing to learn. Add the answer"
        )
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant" and message.get("weight", loss_on == "all") != (loss_on == "all"):
            reason = f"turn {number} ({message['role']}) has the weight {message['weight']}, which loss_on={loss_on!r} "
            raise TokenizeError("weight", f"{reason}overrules for turns that aren't the assistant's. Remove it")
    learned = [i for i in (turns[-1:] if loss_on == "last" else turns) if messages[i].get("weight", 1)]
    if not learned and loss_on != "all":
        reason = f"every turn that loss_on={loss_on!r} reads has the weight 0: there is nothing to learn"
        raise TokenizeError("nothing to learn", f"{reason}. Remove the row")
    return learned


def _check_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any]
) -> tuple[str, ...]:
    """Keys of the messages that the template doesn't write. Reasoning and tools must not be among them."""
    keys = sorted({key for message in messages for key in message} - {"role", "content", "weight"})
    if not keys and "tools" not in options:
        return ()
    plain = _render(tokenizer, _PROBE, {})
    if "tools" in options and _render(tokenizer, _PROBE, {"tools": options["tools"]}) == plain:
        reason = "the row has 'tools', and the chat template doesn't write them. Remove them or the row"
        raise TokenizeError("tools", f"{reason}, or set chat_template to one that does")
    unread = []
    for key in keys:
        if _render(tokenizer, cast("list[Message]", [{**turn, key: "probe"} for turn in _PROBE]), {}) != plain:
            continue
        if key in REASONING:
            number = next(i for i, message in enumerate(messages, 1) if key in message)
            reason = f"turn {number} has {key!r}, and the chat template doesn't write it. Write it into the content"
            raise TokenizeError("reasoning", f"{reason}, remove it, or set chat_template to one that does")
        unread.append(f"{key} of a turn")
    return tuple(unread)


def _chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


#: Arguments of the template that a row can't set.
_OWN = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"tools", "documents"}


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    add_generation_prompt: bool = False,
) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer has no chat template. Set chat_template to a preset ({', '.join(CHAT_TEMPLATES)}) "
            "or to the path of a Jinja file."
        )
    if not messages:
        raise TokenizeError("no messages", "the conversation has no turns. Add turns or remove the row")
    if own := sorted(options.keys() & _OWN):
        raise TokenizeError("chat_template_kwargs", f"a row can't set {own[0]!r}. Remove it")
    try:
        return cast(
            str,
            tokenizer.apply_chat_template(
                _chat(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **options
            ),
        )
    except (
        TemplateError,
        TypeError,
    ) as error:  # a template may also add what isn't text, such as a missing key of a tool
        raise TokenizeError(
            "template refused the conversation", f"the chat template refused the conversation: {error}"
        ) from error


def _check_opening(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    turn: int,
    prompt: str,
    whole: str,
) -> None:
    """Refuses a template whose generation prompt ends with text that its rendering of an answer lacks, as R1's does."""
    if whole.startswith(prompt) or not whole.startswith(_render(tokenizer, messages[:turn], options)):
        return
    raise TokenizeError(
        "template rewrites turns",
        f"the chat template's generation prompt ends with {prompt[_shared(prompt, whole) :]!r}, which its rendering of "
        f"turn {turn + 1} (assistant) lacks: inference would feed another text than is learned. Set chat_template to a "
        "preset, or to a FILE with this template in which both begin an answer alike",
    )


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of items that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _marked_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    text: str,
    stop: str,
) -> list[_Span]:
    """Returns what the template's generation markers enclose, if it has any."""
    template = tokenizer.get_chat_template()
    if not _GENERATION.search(template):
        return []
    marked = _one_token_a_character().apply_chat_template(
        _chat(messages),
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **{**cast(dict[str, Any], tokenizer.special_tokens_map), **options},
    )
    mask: list[int] = cast(BatchEncoding, marked)["assistant_masks"]
    changes = (i for i in range(1, len(mask)) if mask[i] != mask[i - 1])
    edges = [0, *changes, len(mask)]
    return [_close(text, start, end, stop) for start, end in pairwise(edges) if any(mask[start:end])]


def _by_turn(
    spans: Sequence[_Span],
    turns: Sequence[int],
    learned: Sequence[int],
    read: Sequence[int],
    borders: Mapping[int, int],
) -> dict[int, Sequence[_Span]]:
    """The marked spans of each turn that is read; empty if markers don't tell the turns apart."""
    if not spans or not read:
        return {}
    if learned == turns == read:
        return {turns[-1]: spans}
    if any(span.start < border < span.end for span in spans for border in borders.values()):
        return {}  # two turns in one span
    if read == turns[-1:]:
        start = borders.get(turns[-1])
        return {turns[-1]: spans[-1:] if start is None else [span for span in spans if span.start >= start]}
    if missing := [turn for turn in turns if turn > 0 and turn not in borders]:
        reason = f"the chat template writes what precedes turn {missing[0] + 1} (assistant) differently later on"
        raise TokenizeError("weight", f"{reason}, so a weight can't tell the turns apart. Remove the weights")
    found: dict[int, list[_Span]] = {turn: [] for turn in read}
    for span in spans:
        turn = max(turn for turn in turns if borders.get(turn, 0) <= span.start)
        if turn in found:
            found[turn].append(span)
    return dict(found)


@lru_cache(maxsize=1)
def _one_token_a_character() -> PreTrainedTokenizerFast:
    """A tokenizer with which transformers' mask of the assistant's tokens is one of the assistant's characters."""
    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _close(text: str, start: int, end: int, stop: str) -> _Span:
    """Moves the end of a marked span behind the stop token, which may be outside, or inside with blanks after it."""
    inside = re.search(rf"({stop})\s*\Z", text[start:end])
    if inside:
        return _Span(start, start + inside.end(1), True)
    behind = re.compile(rf"\s*({stop}|\Z)").match(text, end)
    return _Span(start, behind.end(), bool(behind[1])) if behind else _Span(start, end, False)


def _rendered_span(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    text: str,
    turn: int,
    prompt: str | None,
    stop: str,
    loss_on: LossOn,
) -> _Span:
    """Returns what a model would write after the prompt, up to the stop token.

    The rendering of the whole conversation must contain it too.
    """
    if prompt is None:
        raise TokenizeError(
            "nothing before the assistant",
            "the assistant's turn is the first, and the chat template doesn't mark where it starts. Put a user turn "
            "before it, or use a chat template with generation markers",
        )
    whole = _render(tokenizer, messages[: turn + 1], options)
    _check_opening(tokenizer, messages, options, turn, prompt, whole)
    content = messages[turn]["content"].strip()
    found = whole.find(content, len(prompt))  # a stop token inside of the content doesn't end the turn
    stopped = re.compile(stop).search(whole, len(prompt) if found < 0 else found + len(content))
    end = stopped.end() if stopped else len(whole)
    if not (whole.startswith(prompt) and text.startswith(whole[:end])):
        raise TokenizeError(
            "template rewrites turns",
            f"the chat template renders turn {turn + 1} (assistant) differently in the whole conversation than when it "
            "is generated, as templates do that strip the reasoning of earlier turns. "
            f"{LAST_ALONE if loss_on != 'last' else ''}Use a chat template with generation markers",
        )
    return _Span(len(prompt), end, stopped is not None)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, borders: Iterable[int], points: Iterable[int]
) -> tuple[list[int], dict[int, int]]:
    """Tokenizes a text so that no token crosses a border.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        borders: The characters before which prompts end. A prompt's ids are those that it has alone.
        points: Other characters whose tokens are asked for.

    Returns:
        The ids, and for each border and point the index of the first token that ends behind it.
    """
    ids: list[int] = []
    index: dict[int, int] = {}
    start, rest = 0, _ids(tokenizer, text)
    joint = rest
    for point in sorted({*borders, *points}):
        head = continued_ids(tokenizer, text[start:point]) if start else _ids(tokenizer, text[:point])
        shared = _shared(head, rest)
        if shared < len(head) and point in borders:
            ids += head
            start, rest, shared = point, continued_ids(tokenizer, text[point:]), 0
        index[point] = len(ids) + shared
    ids += rest
    if start and spell(tokenizer, ids) != spell(tokenizer, joint):
        raise TokenizeError(
            "prompt and completion don't join",
            "a token crosses from the prompt into the completion, and tokenized apart they spell another text. Use a "
            "chat template whose generation prompt ends with a special token or a newline",
        )
    return ids, index


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    if found := SURROGATE.search(text):
        reason = f"U+{ord(found[0]):04X}, which is half a surrogate pair, is no character. Remove it"
        raise TokenizeError("broken character", reason)
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def continued_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenizes text that follows other text, so without the blank that SentencePiece puts before a text."""
    before = _ids(tokenizer, "\n")
    both = _ids(tokenizer, "\n" + text)
    return both[len(before) :] if both[: len(before)] == before else _ids(tokenizer, text)


def spell(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of tokens, including special tokens and all blanks."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
