"""Chat templates: how the turns of a conversation become text, and which token ends the assistant's.

A preset marks with ``{% generation %}`` all that the model has to write: what follows the generation prompt, including
the stop token. Presets that end turns with the tokenizer's eos work with any tokenizer; the others add their tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from jinja2 import TemplateError
from lightning.pytorch.utilities import rank_zero_info
from transformers import AddedToken, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatTemplate:
    """A preset.

    Attributes:
        name: Its name in configurations.
        template: The Jinja source.
        stop: The token that ends assistant turns; None for the tokenizer's eos.
        special_tokens: The tokens that it needs in the vocabulary, including ``stop``.
    """

    name: str
    template: str
    stop: str | None = None
    special_tokens: tuple[str, ...] = ()


# transformers renders with trim_blocks, which removes a newline after a block tag: newlines are escapes in strings.
_UNKNOWN_ROLE = "{% else %}{{ raise_exception('This chat template has no role ' + message['role']) }}{% endif %}"

_CHATML = (
    "{% for message in messages %}"
    r"{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    r"{{ '\n' }}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    r"{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# A system turn replaces the usual preamble; an empty system turn removes it.
_ALPACA = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ 'Below is an instruction that describes a task. "
    r"Write a response that appropriately completes the request.\n\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    r"{% if message['content'] %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% elif message['role'] == 'user' %}"
    r"{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    r"{{ '### Response:\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    r"{% if not loop.last %}{{ '\n\n' }}{% endif %}" + _UNKNOWN_ROLE + "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)

# The model writes the blank after "ASSISTANT:": a generation prompt that ended with it would split " word" tokens.
_VICUNA = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ 'A chat between a curious user and an artificial intelligence assistant. "
    r"The assistant gives helpful, detailed, and polite answers to the user\'s questions. ' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% if message['content'] %}{{ message['content'] + ' ' }}{% endif %}"
    "{% elif message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT:' }}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}" + _UNKNOWN_ROLE + "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_ZEPHYR = (
    "{% for message in messages %}"
    "{% if message['role'] in ('system', 'user') %}"
    r"{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    r"{{ '<|assistant|>\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    r"{{ '\n' }}" + _UNKNOWN_ROLE + "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

_PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] in ('system', 'user') %}"
    "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}" + _UNKNOWN_ROLE + "{% endfor %}"
)

#: The presets. ``plain`` joins the contents as they are.
CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    preset.name: preset
    for preset in (
        ChatTemplate("chatml", _CHATML, "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
        ChatTemplate("llama3", _LLAMA3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
        ChatTemplate("alpaca", _ALPACA),
        ChatTemplate("vicuna", _VICUNA),
        ChatTemplate("zephyr", _ZEPHYR),
        ChatTemplate("plain", _PLAIN),
    )
}


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | os.PathLike[str] | None) -> int:
    """Give a tokenizer a chat template, with the tokens that it needs. Save the tokenizer beside the model.

    Two more changes keep other tools in line with training:

    - If the new template ends turns with a special token other than the eos, that token becomes
      ``tokenizer.eos_token``, and a log line says so: some tools stop at nothing else.
    - If the tokenizer begins every text with BOS, a preset does so too: chat templates write BOS themselves, and such a
      model has never read a text without it.

    Args:
        tokenizer: The tokenizer; it is changed.
        chat_template: Name of a preset (:data:`CHAT_TEMPLATES`), or path of a file with a Jinja template. None keeps
            the tokenizer's own template.

    Returns:
        Number of tokens added to the vocabulary. Resize the model's embeddings if it isn't 0.

    Raises:
        ValueError: There is no such preset or file; None is given and the tokenizer has no template; the preset needs
            an eos, which the tokenizer lacks; or the file's template refuses a user turn with its answer.
    """
    presets = ", ".join(CHAT_TEMPLATES)
    if chat_template is None:
        if not tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template of its own. Set chat_template to a preset "
                f"({presets}) or to the path of a Jinja file."
            )
        return 0
    preset = CHAT_TEMPLATES.get(os.fspath(chat_template))
    if preset is None:
        path = Path(chat_template)
        if not path.is_file():
            raise ValueError(f"The chat template {str(path)!r} is neither a preset ({presets}) nor a file.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        _stop_at_turn_end(tokenizer, path.name)
        return 0
    if preset.stop is None and tokenizer.eos_token is None:
        raise ValueError(
            f"The chat template {preset.name!r} ends turns with the eos token, and the tokenizer has none. "
            "Set tokenizer.eos_token, or choose 'chatml' or 'llama3', which add one."
        )
    added = _add_special_tokens(tokenizer, preset.special_tokens)
    begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    writes_bos = "bos_token" in preset.template
    tokenizer.chat_template = ("{{ bos_token }}" if begins_with_bos and not writes_bos else "") + preset.template
    _stop_at_turn_end(tokenizer, preset.name)
    return added


def _stop_at_turn_end(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Makes the token that ends turns the eos token."""
    end = turn_end(tokenizer)
    if end is not None and end != tokenizer.eos_token_id:
        token = str(tokenizer.convert_ids_to_tokens(end))
        rank_zero_info(
            f"The chat template {name!r} ends turns with {token!r}: it replaces {tokenizer.eos_token!r} as the "
            "tokenizer's eos token."
        )
        tokenizer.eos_token = token


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, further: Iterable[int | None] = ()) -> tuple[int, ...]:
    """The tokens that end an assistant turn: the eos, the one that the chat template writes there, and further ones.

    The first two differ in many published models. The template's token is found by rendering a short conversation: it
    is the special token that follows the assistant's text.

    Args:
        tokenizer: The tokenizer, with or without a chat template.
        further: Other ids, such as those of the model's generation config
            (:func:`~lightning_rlhf.models.loading.load_stop_token_ids`). Ids that the tokenizer lacks are left out.

    Returns:
        The ids, the eos first.

    Raises:
        ValueError: There is no such token, or the template refuses a user turn with its answer.
    """
    known = range(len(tokenizer))
    stops = [i for i in (tokenizer.eos_token_id, turn_end(tokenizer), *further) if i in known]
    if not stops:
        raise ValueError(
            "No token ends an assistant turn: the tokenizer has no eos token, and its chat template, if it has one, "
            "writes no special token after the assistant's text. Set tokenizer.eos_token."
        )
    return tuple(dict.fromkeys(stops))


def answer_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """The blank, if any, that the chat template writes between the generation prompt and an answer.

    The model writes it, but it is not part of the answer's content: rendering would write it a second time.
    """
    whole = _rendered_probe(tokenizer)
    prompt = tokenizer.apply_chat_template(_PROBE[:1], tokenize=False, add_generation_prompt=True)
    lead = whole.removeprefix(cast(str, prompt)).partition(_PROBE[1]["content"])[0]
    return lead if lead.isspace() else ""


_PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "stop token probe"}]


def _rendered_probe(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return cast(str, tokenizer.apply_chat_template(_PROBE, tokenize=False))
    except TemplateError as error:
        raise ValueError(f"The chat template refuses a user turn with its answer: {error}") from error


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after an answer, if any."""
    if not tokenizer.chat_template:
        return None
    rest = _rendered_probe(tokenizer).rpartition(_PROBE[1]["content"])[2].lstrip()
    written = [(len(str(t)), i) for i, t in tokenizer.added_tokens_decoder.items() if rest.startswith(str(t))]
    return max(written, default=(0, None))[1]


def _add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...]) -> int:
    """Makes every token special, even one that the vocabulary has as ordinary text. Returns the number of new ids."""
    before = len(tokenizer)
    known = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    missing = [AddedToken(token, special=True, normalized=False) for token in tokens if token not in known]
    tokenizer.add_tokens(missing, special_tokens=True)
    return len(tokenizer) - before
