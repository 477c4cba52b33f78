"""Tokens as text: whole characters, nothing invisible, columns of a terminal."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from lightning_rlhf.inspection.pieces import pieces, special_ids, visible

TEXTS = [
    "The quick brown fox",
    "今天天气很好，鳌 \U0002070e",
    "👨\u200d👩\u200d👧 naïve e\u0301",
    "a\n\n\tb  c",
    "<|im_start|>user\nfox<|im_end|>\n",
    "",
]


def sentencepiece_like():
    """Byte fallback, blanks as ▁, one put before a text, and taken away again from the first token's."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}, "▁": 257, "f": 258, "好": 259}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def cut(tokenizer, ids, scored=None, before=()):
    return list(pieces(tokenizer, ids, scored or [False] * len(ids), special_ids(tokenizer), before))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_pieces_are_the_text_and_all_of_its_tokens(text, kind, tiny_tokenizer):
    tokenizer = tiny_tokenizer if kind == "byte level" else sentencepiece_like()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = cut(tokenizer, ids)
    assert "".join(piece.text for piece in found) == text
    assert [i for piece in found for i in piece.ids] == ids
    assert [piece.position for piece in found] == [sum(len(p.ids) for p in found[:n]) for n in range(len(found))]


def test_tokens_that_are_parts_of_a_character_are_one_piece(tiny_tokenizer):
    found = cut(tiny_tokenizer, tiny_tokenizer("鳌a")["input_ids"])
    assert [(piece.text, len(piece.ids)) for piece in found] == [("鳌", 3), ("a", 1)]


def test_a_cut_character_is_shown_as_such_token_by_token(tiny_tokenizer):
    found = cut(tiny_tokenizer, tiny_tokenizer("a鳌")["input_ids"][:-1])
    assert [(piece.text, len(piece.ids)) for piece in found] == [("a", 1), ("\ufffd", 1), ("\ufffd", 1)]


def test_no_piece_reaches_over_the_border_of_what_is_scored(tiny_tokenizer):
    ids = tiny_tokenizer("鳌a")["input_ids"]
    found = cut(tiny_tokenizer, ids, [False, True, True, True])
    assert [(piece.text, piece.scored) for piece in found] == [
        ("\ufffd", False), ("\ufffd", True), ("\ufffd", True), ("a", True)
    ]  # fmt: skip


def test_what_is_before_counts_in_positions_and_keeps_blanks():
    tokenizer = sentencepiece_like()
    ids = tokenizer("f f")["input_ids"]
    assert [piece.text for piece in cut(tokenizer, ids)] == ["", "f", " ", "f"]
    found = cut(tokenizer, ids[2:], before=cut(tokenizer, ids[:2]))
    assert [(piece.text, piece.position) for piece in found] == [(" ", 2), ("f", 3)]


def test_special_tokens_are_told_apart(tiny_tokenizer):
    found = cut(tiny_tokenizer, tiny_tokenizer("<|im_start|>a<|im_end|>")["input_ids"])
    assert [(piece.text, piece.special) for piece in found] == [
        ("<|im_start|>", True), ("a", False), ("<|im_end|>", True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a好😀", [("a", 1), ("好", 2), ("😀", 2)]),
        ("e\u0301x", [("e\u0301", 1), ("x", 1)]),
        ("\u0301", [("◌\u0301", 1)]),
        ("❤\ufe0f", [("❤", 1)]),
        ("\ufe0f", [("◌", 1)]),
        ("\n\t\r", [("⏎", 1), ("⇥", 1), ("␍", 1)]),
        ("\x1b\u202e\u200d", [("\\x1b", 4), ("\\u202e", 6), ("\\u200d", 6)]),
        ("\ud800\U000e0001", [("\\ud800", 6), ("\\U000e0001", 10)]),
    ],
)
def test_what_cannot_be_seen_is_shown_and_columns_are_counted(text, shown):
    assert list(visible(text)) == shown
