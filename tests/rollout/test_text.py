"""Text arrives whole, and stop strings are found wherever token borders fall."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_rlhf.rollout.text import TextStream, decode

TEXT = "The quick 狐狸 jumps 🦊🦊 over. 你好，请问北京在哪里？ naïve e\u0301 <end>"


def stream(tokenizer, ids, stops=()):
    """The pieces that were released, and the stream; ends where it stops."""
    text, pieces = TextStream(tokenizer, stops), []
    for token in ids:
        text.push(token)
        pieces.append(text.release())
        if text.stop is not None:
            break
    return pieces, text


@pytest.fixture(params=["bytes", "byte fallback"])
def tokenizer(request, tiny_tokenizer):
    if request.param == "bytes":
        return tiny_tokenizer
    return PreTrainedTokenizerFast.from_pretrained(request.getfixturevalue("assets") / "models" / "stories260K")


def test_pieces_add_up_without_half_characters(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    pieces, text = stream(tokenizer, ids)
    assert len(ids) > len(TEXT)
    assert "".join(pieces) == text.text == decode(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_random_tokens_give_the_text_that_decoding_gives(tokenizer):
    """Sampled text has broken characters, which must neither be lost nor stop the stream."""
    draw = random.Random(0)
    end = tokenizer("ok 狐 .", add_special_tokens=False).input_ids
    for _ in range(200):
        ids = [draw.randrange(3, len(tokenizer)) for _ in range(40)] + end
        pieces, text = stream(tokenizer, ids)
        pieces.append(text.rest())
        assert "".join(pieces) == text.finish()
        if tokenizer.vocab_size < 512:  # with byte fallback, one broken byte undoes all bytes beside it
            assert text.finish() == decode(tokenizer, ids)
        assert text.finish().endswith("ok 狐 .")


@pytest.mark.parametrize("stop", ["quick 狐", "🦊🦊", "狸", "over.", "在哪里？ n", "e\u0301", "<end>", "The"])
def test_a_stop_string_is_found_across_tokens(stop, tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    pieces, text = stream(tokenizer, ids, ["never", stop])
    whole = decode(tokenizer, ids)
    assert text.text[: text.stop] == "".join(pieces) == whole[: whole.index(stop)]
    # it ends with the first token that completes the string, and not later
    fewest = next(n for n in range(len(ids) + 1) if stop in decode(tokenizer, ids[:n]))
    assert len(pieces) == fewest


def test_the_first_of_several_stop_strings_counts(tiny_tokenizer):
    ids = tiny_tokenizer("one two three").input_ids
    _, text = stream(tiny_tokenizer, ids, ["three", "two", "wo t"])
    assert text.text[: text.stop] == "one "


def test_what_may_become_a_stop_string_is_held_back(tiny_tokenizer):
    text = TextStream(tiny_tokenizer, ["<end>"])
    shown = []
    for letter in "a<en":
        (token,) = tiny_tokenizer(letter).input_ids
        text.push(token)
        shown.append(text.release())
    assert shown == ["a", "", "", ""]
    text.push(tiny_tokenizer("x").input_ids[0])
    assert text.release() == "<enx"


def test_a_stop_string_before_its_time_is_passed_over(tiny_tokenizer):
    (a, b) = (tiny_tokenizer(letter).input_ids[0] for letter in "ab")
    text = TextStream(tiny_tokenizer, ["ab"])
    text.push(a)
    text.push(b, may_stop=False)
    assert text.stop is None and text.release() == "ab"
    text.push(a)
    assert text.stop is None
    text.push(b)
    assert text.text[: text.stop] == "ab"


def test_a_stop_string_that_ends_inside_a_token_with_half_a_character_is_found(tiny_tokenizer):
    ids = [*tiny_tokenizer("stop").input_ids, *tiny_tokenizer("🦊").input_ids[:1]]
    _, text = stream(tiny_tokenizer, ids, ["stop"])
    assert text.stop == 0
