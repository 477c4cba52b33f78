"""Text arrives whole, and stop strings are found wherever token borders fall."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_rlhf.rollout.detokenizer import Detokenizer, decode, tail, tokens_of

TEXT = "The quick 狐狸 jumps 🦊🦊 over. 你好，请问北京在哪里？ naïve e\u0301 <end>"


def stream(tokenizer, ids, stops=()):
    """The pieces that were released, and the stream; ends where it stops."""
    text, pieces = Detokenizer(tokenizer, stops), []
    for token in ids:
        text.push(token)
        pieces.append(text.release())
        if text.stop is not None:
            break
    return pieces, text


@pytest.fixture(params=["bytes", "byte fallback"])
def tokenizer(request, tiny_tokenizer, stories_model_dir):
    if request.param == "bytes":
        return tiny_tokenizer
    return PreTrainedTokenizerFast.from_pretrained(stories_model_dir)


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


@pytest.mark.parametrize("prompt", ["The dog", "今天", "🦊"])
def test_text_is_what_tokens_add_to_the_prompts(prompt, tokenizer):
    """Some decoders drop the blank that begins a text; a special token before it is not there for them."""
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    whole = tokenizer(prompt + " was 你 here 🦊", add_special_tokens=False).input_ids
    assert whole[: len(before)] == before
    after = tail(tokenizer, before)
    want = decode(tokenizer, whole)[len(decode(tokenizer, before)) :]
    assert want == " was 你 here 🦊" and decode(tokenizer, whole[len(before) :], after) == want
    text = Detokenizer(tokenizer, ["never"], after)
    for token in whole[len(before) :]:
        text.push(token)
    assert text.finish() == want


def test_a_special_token_at_the_prompts_end_is_looked_past(tokenizer):
    whole = tokenizer("the fox was", add_special_tokens=False).input_ids
    border = len(tokenizer("the fox", add_special_tokens=False).input_ids)
    for prompt in ([*whole[:border], 2], [*whole[:border], 2, 2, 1]):
        assert decode(tokenizer, whole[border:], tail(tokenizer, prompt)) == " was"
    assert decode(tokenizer, whole, tail(tokenizer, [1])) == "the fox was"


@pytest.mark.parametrize(
    ("stop", "want", "read"),
    [("</s>", "the fox", 1), ("fox</s>", "the ", 1), ("fo", "the ", 0), ("</s> was", "the fox", 3),
     ("/s", "the fox", 1), ("x</", "the fo", 1), ("</s></s>", "the fox", 2), ("<|im_end|>", "the fox was", None)],
)  # fmt: skip
def test_a_stop_string_may_hold_special_tokens(stop, want, read, tokenizer):
    """As written; the text has none of them. What may become a stop string is held back."""
    whole = tokenizer("the fox was", add_special_tokens=False).input_ids
    border = len(tokenizer("the fox", add_special_tokens=False).input_ids)
    ids = [*whole[:border], 2, 2, *whole[border:]]
    pieces, text = stream(tokenizer, ids, ["never", stop])
    assert text.finish() == "".join(pieces) == want
    assert (text.stop is None) == (read is None)
    if read in (1, 2):  # and no token later
        assert len(pieces) == border + read


def test_a_blank_behind_a_special_token_is_kept(tokenizer):
    whole = tokenizer("the fox was", add_special_tokens=False).input_ids
    border = len(tokenizer("the fox", add_special_tokens=False).input_ids)
    ids = [*whole[:border], 2, *whole[border:]]
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == "the fox was" == decode(tokenizer, ids)


@pytest.mark.parametrize("end", ["", "th", "the fo", "the fox 狐", "the fox 狐 ru"])
def test_tokens_of_a_text_that_a_completion_begins_with(end, tokenizer):
    ids = tokenizer("the fox 狐 runs", add_special_tokens=False).input_ids
    kept = tokens_of(tokenizer, [*ids, 2], end)
    assert decode(tokenizer, kept) == end and 2 not in kept
    shared = next((i for i, (a, b) in enumerate(zip(kept, ids, strict=False)) if a != b), len(kept))
    assert decode(tokenizer, ids[: shared + 1]).startswith(end)  # all that lie wholly before the end are the same


def test_the_first_of_several_stop_strings_counts(tiny_tokenizer):
    ids = tiny_tokenizer("one two three").input_ids
    _, text = stream(tiny_tokenizer, ids, ["three", "two", "wo t"])
    assert text.text[: text.stop] == "one "


def test_what_may_become_a_stop_string_is_held_back(tiny_tokenizer):
    text = Detokenizer(tiny_tokenizer, ["<end>"])
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
    text = Detokenizer(tiny_tokenizer, ["ab"])
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
