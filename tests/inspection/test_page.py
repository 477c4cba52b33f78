"""The page: well-formed, whole, of itself alone."""

import re
from html.parser import HTMLParser

import pytest

from lightning_rlhf.inspection import write_page
from lightning_rlhf.inspection.page import page
from lightning_rlhf.inspection.pieces import TokenPiece
from lightning_rlhf.inspection.rows import AnswerView, Inspection, RowView, Section
from lightning_rlhf.inspection.statistics import Bar, Statistics

ROW = RowView(
    3,
    "<my>.jsonl:4",
    ["9 tokens"],
    [
        TokenPiece("<s>", (1,), 0, False, True),
        TokenPiece("<script>", (2,), 1, False, False),
        TokenPiece("鳌", (7, 8, 9), 2, False, False),
    ],
    [
        AnswerView(
            "chosen",
            [TokenPiece("Yes\n", (5,), 5, True, False), TokenPiece("</s>", (6,), 6, True, True)],
            ["better & so"],
        ),
        AnswerView("rejected", [TokenPiece("\u202eno", (5,), 5, False, False), TokenPiece("", (0,), 6, False, False)]),
    ],
)  # fmt: skip
PROMPT = RowView(0, "x:1", [], [TokenPiece("Hi", (1,), 0, False, False)], [], "generation starts here", {"a<b": "<i>"})
FIGURES = Statistics([("rows", "1 < 2")], [Bar(0, 9, 4), Bar(10, 19, 1)], ["over <max_tokens>"])
FOUND = Inspection("Stage: Data", "read", [Section("one", [ROW], FIGURES), Section("two", [PROMPT], FIGURES)])
VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Checks nesting; keeps tags, attributes and the text of each span."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.spans, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "span":
            self.spans.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "span":
            self.spans[-1][1] += data


@pytest.fixture(scope="module")
def read():
    reader = Reader()
    reader.feed(page(FOUND))
    reader.close()
    assert reader.open == []
    return reader


def test_nothing_comes_from_elsewhere_and_nothing_runs(read):
    assert {tag for tag, _ in read.tags} & {"script", "link", "img", "iframe", "a", "form"} == set()
    for _, attributes in read.tags:
        assert not {"src", "href", "onclick", "onload"} & attributes.keys()
    assert not re.search(r"https?://|url\(|@import", page(FOUND))
    [policy] = [a["content"] for t, a in read.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_it_fits_a_phone_and_the_dark(read):
    [viewport] = [a["content"] for t, a in read.tags if t == "meta" and a.get("name") == "viewport"]
    assert "width=device-width" in viewport and "prefers-color-scheme: dark" in page(FOUND)


def test_tokens_have_marks_positions_and_ids(read):
    tokens = [(a.get("class"), a["title"], text) for a, text in read.spans if "title" in a]
    assert tokens == [
        ("x", "position 0 · id 1", "<s>"),
        (None, "position 1 · id 2", "<script>"),
        (None, "position 2–4 · id 7 8 9", "鳌"),
        ("s", "position 5 · id 5 · read by the loss", "Yes⏎\n"),
        ("s x", "position 6 · id 6 · read by the loss", "</s>"),
        (None, "position 5 · id 5", "\\u202eno"),
        (None, "position 6 · id 0", "∅"),
        (None, "position 0 · id 1", "Hi"),
    ]


def test_all_that_the_text_says_is_there(read):
    for text in ("<my>.jsonl:4", "better & so", "1 < 2", "over <max_tokens>", "generation starts here", "a<b", '"<i>"'):
        assert text in read.text
    widths = [a["style"] for t, a in read.tags if "style" in a]
    assert widths == ["width:100.0%", "width:25.0%"] * 2


def test_the_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "new" / "inspect.html"
    write_page(path, FOUND)
    assert path.read_text(encoding="utf-8") == page(FOUND)

    def broken(found):
        raise RuntimeError("half a page")

    monkeypatch.setattr("lightning_rlhf.inspection.page.page", broken)
    with pytest.raises(RuntimeError):
        write_page(path, FOUND)
    assert path.read_text(encoding="utf-8") == page(FOUND)
    assert [file.name for file in path.parent.iterdir()] == ["inspect.html"]
