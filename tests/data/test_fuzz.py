"""Rows near every format, in every kind of file, whole and damaged.

Each comes out, or is counted, or an error says where. Nothing is lost silently, and nothing but the reader's own errors
is ever raised.
"""

import csv
import json
import re
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rlhf.data import sources
from lightning_rlhf.data.instruction import InstructionDataModule
from lightning_rlhf.data.preference import PreferenceDataModule
from lightning_rlhf.data.prompts import PromptDataModule
from lightning_rlhf.data.sources import BadRowError, BadRows

FUZZ = settings(
    derandomize=True, database=None, deadline=None, max_examples=50, suppress_health_check=list(HealthCheck)
)
MODULES = {
    "instruction": InstructionDataModule,
    "preference": PreferenceDataModule,
    "prompts": PromptDataModule,
}

# ------------------------------------------------------------------------------------------------------------- rows


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = [value]
    return value


TEXTS = st.one_of(
    st.sampled_from(
        ["Say", "dog", "", " ", "\ud800", "a\ud83d", "\x00", "<|im_end|>", "\n\nHuman: a\n\nAssistant: b", "[1]",
         "null", '[{"role": "user", "content": "a"}]', "1e999", "-3", "NaN", "a,b\r\n\"c\"", "\u2028", "你好"]
    ),
    st.text(st.characters(exclude_categories=()), max_size=6),
)  # fmt: skip
SCALARS = st.one_of(
    TEXTS,
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([10**30, -(10**400), float("nan"), float("inf"), 1e308, nested(60), nested(900)]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
ROLES = st.sampled_from(
    ["user", "human", "prompter", "assistant", "gpt", "system", "tool", " USER ", "", 5, None, "\ud800"]
)


def near(good, times=8):
    """Mostly what belongs there. (Of repeated choices hypothesis keeps as many as there are, of equal ones one.)"""
    return st.sampled_from(range(times + 1)).flatmap(lambda i: VALUES if i == 1 else good)


def turns(role="role", content="content"):
    turn = st.fixed_dictionaries({role: near(ROLES), content: near(TEXTS)}, optional={"tool_calls": VALUES})
    opening = [{role: "user", content: "Say"}, {role: "assistant", content: "dog"}]
    whole = [opening, opening, opening[:1], [{role: "system", content: "Be brief."}, *opening], opening * 2]
    return near(st.sampled_from(range(4)).flatmap(lambda i: st.lists(near(turn), max_size=3) if i == 1 else
                                                  st.sampled_from(whole)))  # fmt: skip


WORDS = st.sampled_from(["Say", "dog", "fox fox", "Paris.", "Say", "dog", "\ud800"])
REPLY = st.fixed_dictionaries(
    {"role": st.sampled_from(["assistant", "prompter", "?"]), "text": near(WORDS)},
    optional={"rank": near(st.integers(0, 2)), "deleted": near(st.booleans()), "review_result": near(st.booleans())},
)
COLUMNS = {
    "messages": st.one_of(turns(), turns("from", "content")),
    "conversations": turns("from", "value"),
    "context": turns("from", "content"),
    "instruction": near(WORDS),
    "input": near(WORDS),
    "output": near(WORDS),
    "history": near(st.lists(st.lists(WORDS, min_size=2, max_size=2), max_size=2)),
    "prompt": near(st.one_of(WORDS, turns())),
    "completion": near(st.one_of(WORDS, turns())),
    "chosen": near(st.one_of(st.just("fox"), turns(), turns("from", "value"))),
    "rejected": near(st.one_of(st.just("cat"), turns(), turns("from", "content"))),
    "answers": near(st.just(["a", "b", "c"])),
    "ranked": near(st.just(["a", "b"])),
    "ranks": near(st.just([1, 2, 2])),
    "scores": near(st.just([3, 2.5, "1"])),
    "margin": near(st.sampled_from([0, 0.5, "1"])),
    "chosen_score": near(st.just(2)),
    "rejected_score": near(st.just(1)),
    "label": near(st.booleans()),
    "system": near(WORDS),
    "source": near(WORDS),
    "lang": near(st.just("en")),
    "question": near(WORDS),
    "text": near(WORDS),
    "answer": VALUES,
}
CONVERSATIONS = [("messages",), ("conversations",), ("instruction", "output"), ("prompt", "completion"), ("text",)]
PAIRS = [("prompt", "chosen", "rejected"), ("context", "chosen", "rejected"), ("conversations", "chosen", "rejected"),
         ("chosen", "rejected")]  # fmt: skip
RANKINGS = [("prompt", "answers", "scores"), ("prompt", "answers", "ranks"), ("prompt", "ranked")]
SHAPES = {
    "instruction": CONVERSATIONS,
    "preference": PAIRS + RANKINGS,
    "prompts": [("prompt",), ("question",), *CONVERSATIONS, *PAIRS],
}
OTHERS = [("prompt", "completion", "label"), *CONVERSATIONS, *PAIRS]


@st.composite
def near_rows(draw, module):
    """A row of a format that the data module knows, with columns too many or too few."""
    names = list(draw(st.sampled_from(OTHERS if draw(st.sampled_from(range(8))) == 1 else SHAPES[module])))
    if draw(st.sampled_from(range(4))) == 1:
        names += draw(st.lists(st.sampled_from(sorted(COLUMNS)), max_size=2))
    row = {name: draw(COLUMNS[name]) for name in names if draw(st.sampled_from(range(20))) != 1}
    return {**row, **draw(st.dictionaries(TEXTS, VALUES, max_size=1))} if draw(st.sampled_from(range(8))) == 1 else row


GOOD = {  # a row that every data module takes, so that not all of a file is bad
    "prompt": [{"role": "user", "content": "Say"}],
    "completion": [{"role": "assistant", "content": "dog"}],
    "chosen": [{"role": "assistant", "content": "dog"}],
    "rejected": [{"role": "assistant", "content": "fox"}],
}


# ------------------------------------------------------------------------------------------------------------ files


def is_tree(row):
    """One row may give none, or several."""
    prompt = row.get("prompt") if isinstance(row, dict) else None
    return isinstance(prompt, dict) and "text" in prompt


def write_jsonl(path, rows):
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
    return len(rows)


def write_json(path, rows):
    path.write_bytes(json.dumps(rows, indent=1).encode())
    return len(rows)


def cell(value):
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    return text.encode(errors="replace").decode().replace("\0", "")


def write_csv(path, rows):
    rows = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(cell(name) for row in rows for name in row)) or ["text"]
    records = [[cell({cell(k): v for k, v in row.items()}.get(name)) for name in names] for row in rows]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([names, *records])
    return len(records)


def write_txt(path, rows):
    lines = [re.sub(r"[\r\n]", " ", str(cell(row))) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    return sum(bool(line.strip()) for line in lines)


def write_parquet(path, rows):
    """Columns that Arrow finds a type for; others as JSON."""
    rows = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(cell(name) for row in rows for name in row)) or ["text"]
    columns = {}
    for name in names:
        values = [{cell(k): v for k, v in row.items()}.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
            pq.write_table(pa.table({name: columns[name]}), path)
        except (pa.ArrowException, ValueError, OverflowError, TypeError, RecursionError, NotImplementedError):
            columns[name] = pa.array([cell(value) for value in values])
    pq.write_table(pa.table(columns), path)
    return len(rows)


WRITERS = {
    "jsonl": write_jsonl, "json": write_json, "csv": write_csv, "txt": write_txt, "parquet": write_parquet,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- properties


class Seen:
    """What a data module made of a file."""

    def __init__(self, module, path, tokenizer, **options):
        self.skipped, self.good = 0, 0
        report = BadRows.report

        def noted(bad, total_rows, name):
            self.skipped += bad.total
            report(bad, total_rows, name)

        data = MODULES[module](str(path), tokenizer=tokenizer, max_length=200, val_fraction=0.0, **options)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(BadRows, "report", noted)
            try:
                data.prepare_data()
                data.setup("fit")
            except BadRowError as error:
                # of a line of a file, or of the file where it can't be read on from somewhere
                assert error.where.startswith(str(path)) and str(error).startswith(error.where)
                self.error = error
                return
            except ValueError as error:
                assert re.match(r"No usable row in the train", str(error)), error
                self.error = error
                return
        self.error = None
        self.good = len(data._rows["train"])
        loader = data.train_dataloader()
        self.batches = list(loader)
        assert len(self.batches) == len(loader)
        assert sorted(row for batch in self.batches for row in batch.rows) == list(range(self.good))


@pytest.mark.parametrize("module", MODULES)
def test_rows_come_out_or_are_counted(module, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")

    @FUZZ
    @given(st.sampled_from(sorted(WRITERS)), st.lists(near(near_rows(module)), min_size=3, max_size=9))
    def check(kind, rows):
        path = folder / f"my.{kind}"
        rows = [row for row in rows if not is_tree(row)]
        count = WRITERS[kind](path, [*rows, GOOD])
        seen = Seen(module, path, tiny_tokenizer, on_bad_row="skip")
        if seen.error is None:
            assert seen.good + seen.skipped == count
        else:
            assert seen.skipped == count or isinstance(seen.error, BadRowError)  # nothing usable, or no header
        strict = Seen(module, path, tiny_tokenizer)
        assert (strict.error is None) == (seen.error is None and not seen.skipped)
        if isinstance(strict.error, BadRowError):
            place = strict.error.where.removeprefix(str(path))
            lines = {"json": r"\[\d+\] \(line \d+\)|:1", "parquet": r"\[\d+\]"}.get(kind, r":\d+( \(message .*\))?")
            of_file = not place and strict.error.kind in ("repeated column", "damaged Parquet")
            assert re.fullmatch(lines, place) or of_file, strict.error

    check()


@pytest.mark.parametrize("module", MODULES)
def test_damaged_files_are_refused_in_words(module, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")

    @FUZZ
    @given(
        st.sampled_from(sorted(WRITERS)),
        st.lists(near_rows(module), max_size=2),
        st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3)), min_size=1, max_size=4),
        st.sampled_from(["skip", "raise"]),
    )
    def check(kind, rows, damage, policy):
        path = folder / f"my.{kind}"
        WRITERS[kind](path, [GOOD, *rows])
        data = bytearray(path.read_bytes())
        for at, new in damage:
            at %= len(data) + 1
            data[at : at + len(new)] = new
        path.write_bytes(bytes(data))
        Seen(module, path, tiny_tokenizer, on_bad_row=policy)

    check()


@pytest.mark.parametrize("module", MODULES)
def test_trees_give_rows_or_are_counted(module, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    replies = st.recursive(
        REPLY.map(lambda reply: {**reply, "message_id": "m"}),
        lambda inner: st.builds(
            lambda reply, below, more: {**reply, "replies": below, **more},
            REPLY, near(st.lists(near(inner), max_size=3)), st.dictionaries(TEXTS, VALUES, max_size=1),
        ),
        max_leaves=6,
    )  # fmt: skip
    names = st.sampled_from(["a", "b", "c"])
    flat = st.builds(
        lambda reply, **more: {**reply, **more},
        REPLY, message_id=near(names), parent_id=near(st.none() | names), message_tree_id=near(st.just("t")),
    )  # fmt: skip
    trees = st.fixed_dictionaries({"message_tree_id": near(st.just("t")), "prompt": near(replies)})
    good = {
        "message_tree_id": "x",
        "prompt": {
            "role": "prompter",
            "text": "Say",
            "replies": [{"role": "assistant", "text": t, "rank": i} for i, t in enumerate(("dog", "fox"))],
        },
    }

    @FUZZ
    @given(st.lists(near(trees | flat), max_size=4), st.sampled_from(["auto", "oasst"]))
    def check(rows, format):
        path = folder / "my.jsonl"
        write_jsonl(path, [*rows, good])
        seen = Seen(module, path, tiny_tokenizer, on_bad_row="skip", format=format)
        assert seen.error is None and seen.good >= 1
        Seen(module, path, tiny_tokenizer, format=format)

    check()


def test_nesting_as_deep_as_json_can_be_read(tiny_tokenizer, tmp_path):
    for depth in (100, 900, 980, 990, 995, 1000, 5000):
        deep = "[" * depth + "]" * depth
        columns = [
            f'"answer": {deep}', f'"messages": {deep}', f'"text": {deep}', f'"message_tree_id": {deep}',
            f'"message_id": {deep}', f'"rank": {deep}',
        ]  # fmt: skip
        rows = [json.dumps(GOOD)[:-1] + f", {column}}}" for column in columns]
        rows.append(f'{{"message_tree_id": "t", "prompt": {{"text": "a", "role": "prompter", "replies": {deep}}}}}')
        (tmp_path / "my.jsonl").write_text("\n".join([json.dumps(GOOD), *rows]))
        for module in MODULES:
            seen = Seen(module, tmp_path / "my.jsonl", tiny_tokenizer, on_bad_row="skip")
            assert seen.error is None and seen.good + seen.skipped == 1 + len(rows)


def test_kinds_of_file_are_all_written():
    assert {f".{kind}" for kind in WRITERS} | {".tsv"} == set(sources._READERS)
