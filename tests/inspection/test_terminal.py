"""The text: marks lie under what they mark."""

import re

from lightning_rlhf.inspection.pieces import TokenPiece
from lightning_rlhf.inspection.rows import AnswerView, Inspection, RowView, Section
from lightning_rlhf.inspection.statistics import Bar, Statistics
from lightning_rlhf.inspection.terminal import as_text


def row_of(texts, scored=(), first=0, special=()):
    found, position = [], first
    for i, text in enumerate(texts):
        ids = (i,) * (3 if text == "鳌" else 1)
        found.append(TokenPiece(text, ids, position, i in scored, i in special))
        position += len(ids)
    return found


PROMPT = row_of(["<s>", "Hi", " 鳌"[1:], "\n", "好", "\t"], special=[0])
FOUND = Inspection(
    "Stage: Data, train",
    "read by the loss",
    [
        Section(
            "",
            [
                RowView(3, "my.jsonl:4", ["14 tokens"], PROMPT, [
                    AnswerView("chosen", row_of(["Yes", " 😀", "!", "\n\n", "</s>"], [0, 1, 2, 4], 8, [4]), ["better"]),
                    AnswerView("rejected", row_of(["a\x1b[0m", ""], [1], 8), []),
                ]),
            ],
            Statistics([("rows", "1"), ("read by the loss", "4")], [Bar(0, 9, 3), Bar(10, 19, 1), Bar(20, 29, 0)]),
        )
    ],
)  # fmt: skip

GOLDEN = """\
Stage: Data, train

⏎ ⇥ line break, tab   . start of a token   ^~~ read by the loss

row 3 · my.jsonl:4 · 14 tokens
prompt · 8 tokens
│     0 │<s>Hi鳌⏎
│       │.  . . .
│     6 │好⇥
│       │. .
├─ chosen · 5 tokens · better
│     8 │Yes 😀!⏎
│       │^~~^~~^.
│       │⏎
│    12 │</s>
│       │^~~~
└─ rejected · 2 tokens
      8 │a\\x1b[0m∅
        │.       ^

rows              1
read by the loss  4

  0 to 9  ██████████████████████████████ 3
10 to 19  ██████████                     1
20 to 29                                 0
"""


def test_golden():
    assert as_text(FOUND, 80) == GOLDEN


def test_colors_mark_the_same_and_add_no_text():
    text = as_text(FOUND, 80, color=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    golden = [line for line in GOLDEN.splitlines() if not re.search(r"│ +│|^ +│", line) or "⏎" in line]
    assert plain.splitlines()[3:] == golden[3:]
    assert "\x1b[30;42mYes\x1b[0m\x1b[30;46m 😀\x1b[0m" in text and "\x1b[35m<s>\x1b[0m" in text
    assert "\x1b[0mm" not in plain and "\\x1b" in plain, "what a row holds can't color the terminal"


def test_long_tokens_stay_whole_and_marks_stay_beneath():
    texts = ["word ", "好好", "<|special|>"] * 9
    section = Section("", [RowView(0, "x:1", [], row_of(["a"]), [AnswerView("answer", row_of(texts, [1, 2, 5]), [])])],
                      Statistics([("rows", "1")], [Bar(1, 1, 1)]))  # fmt: skip
    lines = as_text(Inspection("t", "", [section]), 40).splitlines()
    assert max(len(line.replace("好", "好 ")) for line in lines if "│" in line) <= 40
    shown = "".join(line.rsplit("│", 1)[1] for line in lines if re.search(r"\d │", line)).removeprefix("a")
    assert shown == "".join(texts)
    assert all(line.count("<|special|>") == line.count("<|") for line in lines)
    starts = [int(match[1]) for line in lines if (match := re.match(r"[│ ] +(\d+) │", line))][1:]
    assert starts == sorted(starts) and starts[0] == 0 and len(starts) > 3


def test_prompts_end_where_generation_starts_and_columns_follow():
    view = RowView(0, "x:1", [], row_of(["Hi"]), [], "generation starts here", {"answer": "4\n2", "long": "x" * 500})
    section = Section("prompts", [view], Statistics([("rows", "1")], [Bar(1, 1, 1)], ["too large"]))
    text = as_text(Inspection("t", "", [section]))
    assert "== prompts ==" in text and "└─▶ generation starts here\n" in text and "\n! too large\n" in text
    assert 'column answer: "4\\n2"' in text and "… (502 characters)" in text
    assert "^~~" not in text, "nothing is marked"
