"""Rows and the places they come from: every kind of file, and every kind of fault under both policies."""

import bz2
import csv
import gzip
import importlib.util
import json
import lzma
import os
import pickle
import sys
import warnings
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlhf.data.sources import BadRowError, BadRows, Row, Source, read_rows, source_state

ROWS = [{"text": "one", "n": 1}, {"text": "你好，世界 😀", "n": 2}, {"text": "three\nlines\u2028long", "n": 3}]


def lines_of(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(source: Source, split: str = "train") -> list[Row]:
    return list(read_rows(source, BadRows("raise"), split))


def values(source: Source) -> list[dict]:
    return [row.value for row in read(source)]


def faults(source: Source) -> tuple[list[Row], list[tuple[str, str]]]:
    """Read with both policies; the good rows, and place and kind of each bad one."""

    class Listed(BadRows):
        def add(self, where, kind, reason):
            super().add(where, kind, reason)
            found.append((where, kind))

    found: list[tuple[str, str]] = []
    rows = list(read_rows(source, Listed("skip")))
    with pytest.raises(BadRowError) as caught:
        read(source)
    assert (caught.value.where, caught.value.kind) == found[0]
    assert str(caught.value).startswith(f"{found[0][0]}: ") and "on_bad_row: skip" in str(caught.value)
    return rows, found


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Kinds of files


def test_jsonl_and_blank_lines(here):
    first, *others = lines_of(ROWS).split("\n")[:-1]
    Path("my.jsonl").write_text("\n".join([first, "", "  ", *others]), encoding="utf-8")
    assert read("my.jsonl") == [Row(value, f"my.jsonl:{n}") for value, n in zip(ROWS, [1, 4, 5], strict=True)]


def test_rows_are_streamed(here):
    Path("my.jsonl").write_text('{"a": 1}\nbroken\n')
    rows = read_rows("my.jsonl", BadRows("raise"))
    assert next(rows).value == {"a": 1}  # the broken second line has not been read yet
    with pytest.raises(BadRowError, match=r"^my\.jsonl:2: malformed JSON"):
        next(rows)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_byte_order_mark_and_line_ends(here, newline):
    for name, content in {
        "my.jsonl": '{"text": "你"}\n{"text": "b"}\n',
        "my.json": '[{"text": "你"},\n{"text": "b"}]\n',
        "lines.json": '{"text": "你"}\n{"text": "b"}\n',
        "my.csv": "text\n你\nb\n",
        "my.txt": "你\nb\n",
    }.items():
        Path(name).write_bytes(content.replace("\n", newline).encode("utf-8-sig"))
        assert values(name) == [{"text": "你"}, {"text": "b"}], name


def test_json_array_gives_index_and_line(here):
    Path("my.json").write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")
    assert [(row.value, row.where) for row in read("my.json")] == [
        (ROWS[0], "my.json[0] (line 2)"),
        (ROWS[1], "my.json[1] (line 6)"),
        (ROWS[2], "my.json[2] (line 10)"),
    ]
    Path("flat.json").write_text('[{"a": "x, y"} ,{"a": "[1]"},\n\n{"a": "\\n"}]')
    assert [(row.value["a"], row.where) for row in read("flat.json")] == [
        ("x, y", "flat.json[0] (line 1)"),
        ("[1]", "flat.json[1] (line 1)"),
        ("\n", "flat.json[2] (line 3)"),
    ]
    Path("none.json").write_text(" [ ] ")
    assert read("none.json") == []


def test_json_object_with_one_list(here):
    Path("my.json").write_text(json.dumps({"version": "1.0", "data": ROWS}, indent=1))
    assert read("my.json") == [Row(row, f"my.json[{i}]") for i, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"prompt": "a", "completion": "b"},
        {"data": []},
        {"train": ROWS, "test": ROWS},
    ],
)
def test_json_object_that_is_a_row(here, row):
    Path("my.json").write_text(json.dumps(row))
    assert read("my.json") == [Row(row, "my.json:1")]


def test_json_lines_in_a_json_file(here):
    Path("my.json").write_text("\n" + lines_of(ROWS) + "{broken\n", encoding="utf-8")
    rows, found = faults("my.json")
    assert rows == [Row(value, f"my.json:{n}") for n, value in enumerate(ROWS, 2)]
    assert found == [("my.json:5", "malformed JSON")]


def test_txt_rows_are_lines(here):
    Path("my.txt").write_text("  床前明月光\n\nline\u2028one\n \nlast", encoding="utf-8")
    assert read("my.txt") == [
        Row({"text": "  床前明月光"}, "my.txt:1"),
        Row({"text": "line\u2028one"}, "my.txt:3"),
        Row({"text": "last"}, "my.txt:5"),
    ]


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_csv_with_line_breaks_in_fields(here, suffix, delimiter):
    records = [["说\n明", 'a "quoted", b', ""], ["plain", "x\ty", "1"], ["", "two\r\n\nbreaks", "é"], ["end", "z", "2"]]
    with open(f"my.{suffix}", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerows([["instruction", "output", "input"], *records[:2]])
        file.write("\n")
        writer.writerows(records[2:])
    rows = read(f"my.{suffix}")
    assert [list(row.value.values()) for row in rows] == records
    assert all(list(row.value) == ["instruction", "output", "input"] for row in rows)
    assert [row.where for row in rows] == [f"my.{suffix}:{n}" for n in (2, 4, 6, 9)]


def test_csv_with_long_text(here):
    text = "长" * 200_000  # more than the csv module's limit of 131,072
    Path("my.csv").write_text(f"text,n\n{text},1\n", encoding="utf-8")
    assert values("my.csv") == [{"text": text, "n": "1"}]


def test_csv_without_records(here):
    for content in ("", "\n\n", "a,b\n"):
        Path("my.csv").write_text(content)
        assert read("my.csv") == []


def test_parquet(here):
    rows = [
        {"messages": [{"role": "user", "content": f"问 {i}"}], "system": None if i % 2 else "s"} for i in range(2500)
    ]
    pq.write_table(pa.Table.from_pylist(rows), "x.parquet")
    assert read("x.parquet") == [Row(row, f"x.parquet[{i}]") for i, row in enumerate(rows)]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "txt"])
def test_gzip(here, suffix):
    content = {
        "jsonl": '{"text": "你好"}\n{"text": "b"}\n',
        "json": '[{"text": "你好"},\n {"text": "b"}]',
    }.get(suffix, "text\n你好\nb\n")
    Path(f"plain.{suffix}").write_text(content, encoding="utf-8")
    Path(f"packed.{suffix}.GZ").write_bytes(gzip.compress(content.encode()))
    plain, packed = read(f"plain.{suffix}"), read(f"packed.{suffix}.GZ")
    assert [row.value for row in packed] == [row.value for row in plain] and plain[-1].value == {"text": "b"}
    assert [row.where for row in packed] == [
        row.where.replace(f"plain.{suffix}", f"packed.{suffix}.GZ") for row in plain
    ]


# Places


def test_globs_directories_and_lists(here):
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "deep/d[1].txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(json.dumps({"text": name}) + "\n" if name.endswith("jsonl") else name)
    Path("notes.md").write_text("not a kind of rows")
    Path(".hidden.txt").write_text("an editor's copy")

    def texts(source: Source) -> list[str]:
        return [row["text"] for row in values(source)]

    assert texts("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert texts("**/*.jsonl") == ["a.jsonl", "b.jsonl", "deep/er/c.jsonl"]
    assert texts(here) == texts(str(here)) == ["a.jsonl", "b.jsonl"]
    assert texts("deep") == texts("deep/d[1].txt") == ["deep/d[1].txt"]  # it exists, so it is no pattern
    assert texts(["b.jsonl", Path("deep"), "[a]*"]) == ["b.jsonl", "deep/d[1].txt", "a.jsonl"]
    assert [row.where for row in read("deep/er")] == ["deep/er/c.jsonl:1"]
    assert texts([]) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", r"^missing\.jsonl: no such file .*working directory.*org/name"),
        ("org/missing.jsonl", r"^org/missing\.jsonl: no such file"),
        ("missing", r"^missing: no such file .*org/name"),
        ("a/b/c", r"^a/b/c: no such file"),
        (Path("org/name"), r"^org.name: no such file"),
        ("./org/name", r"no such file"),
        ("*.jsonl", r"^\*\.jsonl: no file matches"),
        ("empty", r"^empty: the directory has no file of a known kind"),
        (["good.txt", "missing.txt"], r"^missing\.txt: no such file"),
    ],
)
def test_missing_files(here, monkeypatch, source, message):
    monkeypatch.setattr(datasets, "load_dataset", None)  # none of them may be taken for a data set of the hub
    Path("empty").mkdir()
    Path("good.txt").write_text("good")
    with pytest.raises(FileNotFoundError, match=message) as caught:
        next(read_rows(source, BadRows("skip")))
    if "working directory" in str(caught.value):
        assert str(here) in str(caught.value)


@pytest.mark.parametrize("name", ["notes.md", "x.parquet.gz", "plain"])
def test_unknown_kind_of_file(here, name):
    Path(name).write_text("hello")
    for source in (name, f"{name[:-1]}*"):
        with pytest.raises(ValueError, match=rf"^{name}: unknown kind of file.*\.jsonl"):
            read(source)


def test_a_pipe_is_refused_and_a_circle_of_links_is_no_file(here):
    """A pipe was read as an empty file, while its writer waited."""
    Path("data").mkdir()
    os.mkfifo("data/pipe.jsonl")
    Path("data/circle.jsonl").symlink_to("circle.jsonl")
    with pytest.raises(ValueError, match=r"^data/pipe\.jsonl: this is a pipe or a device.*Write them to a file"):
        read("data/pipe.jsonl")
    with pytest.raises(FileNotFoundError, match=r"^data: the directory has no file of a known kind"):
        read("data")
    Path("data/a.jsonl").write_text('{"text": "a"}\n')
    assert values("data") == [{"text": "a"}]


def test_home_directory(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    Path("my.txt").write_text("home")
    assert values("~/my.txt") == [{"text": "home"}]


# Objects in memory and the hub


def test_list_of_dicts(here):
    assert read(ROWS) == [Row(row, f"list[{i}]") for i, row in enumerate(ROWS)]
    rows, found = faults([ROWS[0], 5, None, "a.jsonl", ROWS[1]])
    assert [row.where for row in rows] == ["list[0]", "list[4]"]
    assert found == [(f"list[{i}]", "not an object") for i in (1, 2, 3)]


def test_dataset():
    data = datasets.Dataset.from_list(ROWS)
    assert read(data) == [Row(row, f"Dataset[{i}]") for i, row in enumerate(ROWS)]
    named = datasets.Dataset.from_list(ROWS, split=datasets.Split.TEST).with_format("numpy")
    rows = read(named)
    assert rows == [Row(row, f"Dataset (test)[{i}]") for i, row in enumerate(ROWS)]
    assert type(rows[0].value["n"]) is int


@pytest.mark.parametrize("source", [5, None, {"a": 1}, iter(ROWS), datasets.DatasetDict()])
def test_objects_that_hold_no_rows(source):
    with pytest.raises(TypeError, match="Can't read rows from a"):
        read(source)


def test_hub(here, monkeypatch):
    asked = []

    def load_dataset(path, name=None, *, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("org/set", "test") == [Row(row, f"org/set (test)[{i}]") for i, row in enumerate(ROWS)]
    assert read("org/set.v1:zh-CN")[2].where == "org/set.v1:zh-CN (train)[2]"
    assert asked == [("org/set", None, "test"), ("org/set.v1", "zh-CN", "train")]
    Path("org/set").mkdir(parents=True)
    Path("org/set/my.txt").write_text("local")
    assert values("org/set") == [{"text": "local"}]  # what exists here is never looked for elsewhere


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            ConnectionError("no network"),
            FileNotFoundError,
            "^org/set: no such file .*hub it can't be loaded: no network",
        ),
        (FileNotFoundError("not there"), FileNotFoundError, "^org/set: no such file .*not there"),
        (
            ValueError('Unknown split "train".'),
            ValueError,
            "^org/set: the split 'train'.*Unknown split.*org/name:config",
        ),
    ],
)
def test_hub_fails(here, monkeypatch, error, raised, message):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(raised, match=message):
        read("org/set")


def test_plain_files_need_no_heavy_imports(here, monkeypatch):
    for name in ("datasets", "pyarrow", "pyarrow.parquet", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails
    spec = importlib.util.spec_from_file_location("sources_anew", sys.modules[read_rows.__module__].__file__)
    anew = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, anew)
    spec.loader.exec_module(anew)
    Path("my.jsonl").write_text("{}\n")
    assert len(list(anew.read_rows("my.jsonl", anew.BadRows()))) == 1


# Faults


def test_bad_rows_of_jsonl(here):
    Path("my.jsonl").write_bytes(
        b'{"a": 1}\n{"a": \n\xff{"a": 2}\n[1]\n"x"\nnull\n{"a": "\xe4\xbd"}\n' + b"[" * 100_000 + b'\n{"a": 3}'
    )
    rows, found = faults("my.jsonl")
    assert [(row.where, row.value) for row in rows] == [("my.jsonl:1", {"a": 1}), ("my.jsonl:9", {"a": 3})]
    assert found == [
        ("my.jsonl:2", "malformed JSON"),
        ("my.jsonl:3", "invalid UTF-8"),
        ("my.jsonl:4", "not an object"),
        ("my.jsonl:5", "not an object"),
        ("my.jsonl:6", "not an object"),
        ("my.jsonl:7", "invalid UTF-8"),
        ("my.jsonl:8", "malformed JSON"),
    ]


def test_messages_say_where_what_and_what_to_do(here):
    Path("a.jsonl").write_text('{"a": 1, b}\n')
    with pytest.raises(
        BadRowError, match=r"^a\.jsonl:1: malformed JSON: .* at column 10\. Each line is one JSON object\. "
    ):
        read("a.jsonl")
    Path("b.txt").write_bytes("好\n好的".encode() + b" \xfe\n")
    with pytest.raises(
        BadRowError, match=r"^b\.txt:2: byte 8 of the line \(0xfe\) is not UTF-8; the line is damaged\. Save the file"
    ):
        read("b.txt")
    with pytest.raises(BadRowError, match=r"^list\[1\]: the row is a int, not an object\. "):
        read([{}, 1])


def test_bad_rows_of_csv(here):
    Path("my.csv").write_bytes(
        b"a,b\n"
        b"1,2\n"
        b"1\n"  # line 3: too few
        b'"x\ny",2,3\n'  # lines 4 and 5: too many
        b"3,4\n"
        b'"p\n\xff\nq",r\n'  # lines 7 to 9: the second is not UTF-8
        b"5,6\n"
        b'"s" t,u\n'  # line 11: text after the closing quote
        b"7,8\n"
        b'"open,9\n10,11\n'  # line 13: never closed
    )
    rows, found = faults("my.csv")
    assert [(row.where, row.value["a"]) for row in rows] == [
        ("my.csv:2", "1"),
        ("my.csv:6", "3"),
        ("my.csv:10", "5"),
        ("my.csv:12", "7"),
    ]
    assert found == [
        ("my.csv:3", "wrong number of fields"),
        ("my.csv:4", "wrong number of fields"),
        ("my.csv:8", "invalid UTF-8"),
        ("my.csv:11", "malformed CSV"),
        ("my.csv:13", "malformed CSV"),
    ]
    bad = BadRows("skip")
    list(read_rows("my.csv", bad))
    with pytest.warns(UserWarning, match="malformed CSV in lines 11 to 11"):
        bad.report(9, "my.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,a\n1,2\n", r"^my\.csv: several columns have the name 'a'"),
        (b"a,\xff\n1,2\n", r"^my\.csv:1: byte 3 .*header"),
        (b'\n"a\n', r"^my\.csv:2: malformed CSV.*header"),
    ],
)
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_bad_csv_header_always_raises(here, policy, content, message):
    Path("my.csv").write_bytes(content)
    with pytest.raises(BadRowError, match=message):
        list(read_rows("my.csv", BadRows(policy)))


def test_bad_rows_of_json(here):
    Path("my.json").write_text('[{"a": 1},\n5,\n{"a": 2}]')
    rows, found = faults("my.json")
    assert [row.value["a"] for row in rows] == [1, 2]
    assert found == [("my.json[1] (line 2)", "not an object")]
    Path("scalar.json").write_text('"text"')
    assert faults("scalar.json") == ([], [("scalar.json:1", "not an object")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n {"a": }]', r"^my\.json:2: malformed JSON: .*column 8\. Nothing of the file was read"),
        (b'[{"a": 1},\n', r"^my\.json:2: malformed JSON"),
        (b'{"data": [\n{"a": 1}\n', r"^my\.json:3: malformed JSON"),
        (b'[{"a": 1},\n {"a": "\xff"}]', r"^my\.json:2: byte 9 of the line \(0xff\)"),
        (b"[" * 100_000, r"^my\.json: malformed JSON.*recursion"),
    ],
)
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_malformed_json_document_always_raises(here, policy, content, message):
    Path("my.json").write_bytes(content)
    with pytest.raises(BadRowError, match=message):
        next(read_rows("my.json", BadRows(policy)))


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[: len(data) // 2]])
def test_damaged_gzip_always_raises(here, policy, damage):
    data = gzip.compress("".join(f'{{"a": {i * 7919}}}\n' for i in range(5000)).encode())
    Path("my.jsonl.gz").write_bytes(damage(data))
    with pytest.raises(BadRowError, match=r"^my\.jsonl\.gz: the gzip data is damaged or cut short"):
        list(read_rows("my.jsonl.gz", BadRows(policy)))


def test_bad_rows_of_parquet(here):
    buffers = pa.array([b"good", b"\xff", b"fine"], pa.binary()).buffers()
    array = pa.StringArray.from_buffers(3, buffers[1], buffers[2])
    pq.write_table(pa.table({"text": array}), "x.parquet")
    rows, found = faults("x.parquet")
    assert [row.value["text"] for row in rows] == ["good", "fine"]
    assert found == [("x.parquet[1]", "invalid UTF-8")]


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_damaged_parquet_always_raises(here, policy):
    pq.write_table(pa.table({"text": ["a" * 50, "b"] * 5000}), "x.parquet")
    data = Path("x.parquet").read_bytes()
    for broken in (data[:100], b"{}", data[:4] + bytes(60) + data[64:]):
        Path("x.parquet").write_bytes(broken)
        with pytest.raises(BadRowError, match=r"^x\.parquet: can't be read as Parquet after 0 rows"):
            list(read_rows("x.parquet", BadRows(policy)))


# The ledger


def test_report_is_one_warning():
    bad = BadRows("skip")
    bad.add("my.jsonl:4", "empty turn", "turn 2 is empty")
    bad.add("my.jsonl:9", "unknown role", "turn 1 has the role 'x'")
    bad.add("my.jsonl:12", "empty turn", "turn 1 is empty")
    assert bad.total == 3 and bad.counts == {"empty turn": 2, "unknown role": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bad.report(120, "my.jsonl")
    assert [str(warning.message) for warning in caught] == [
        "3 of 120 rows of my.jsonl were skipped: 2 x empty turn (first: my.jsonl:4: turn 2 is empty), "
        "1 x unknown role (first: my.jsonl:9: turn 1 has the role 'x')"
    ]


def test_report_of_nothing_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BadRows("skip").report(10, "my.jsonl")


def test_raise_counts_nothing_and_says_more():
    bad = BadRows("raise")
    with pytest.raises(BadRowError) as caught:
        bad.add("my.jsonl:4", "empty turn", "turn 2 is empty. Write it")
    assert str(caught.value).startswith("my.jsonl:4: turn 2 is empty. Write it. Correct the row")
    assert (caught.value.where, caught.value.kind) == ("my.jsonl:4", "empty turn") and bad.total == 0
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.kind) == (str(caught.value), "empty turn")


def test_unknown_policy():
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        BadRows("ignore")  # type: ignore[arg-type]


LINE = st.one_of(
    st.binary(max_size=12).map(lambda data: data.replace(b"\n", b"")),
    st.sampled_from(
        [b"", b"  ", b"{}", b"[]", b"1", b'{"a": 1}', b'{"a": "\\ud800"}', b"\xef\xbb\xbf{}", b"{}\r", b"NaN"]
    ),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2).map(lambda row: json.dumps(row).encode()),
)


@settings(derandomize=True, database=None, deadline=None)
@given(st.lists(LINE, max_size=8))
def test_every_line_is_a_row_or_counted(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("lines") / "my.jsonl"
    path.write_bytes(b"\n".join(lines))
    bad = BadRows("skip")
    try:
        rows = list(read_rows(path, bad))
    except BadRowError as error:  # zeros that make a text of another encoding: the whole file is refused
        assert "iconv -f UTF-" in str(error) and b"\0" in path.read_bytes()
        return
    blank = 0
    for number, line in enumerate(path.read_bytes().split(b"\n")):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        blank += not line.decode(errors="replace").strip()
    assert len(rows) + bad.total == len(lines or [b""]) - blank


# Tables


def test_cells_of_csv_that_are_messages(here):
    turns = [{"role": "user", "content": 'a\n"b", c'}, {"role": "assistant", "content": "d"}]
    cells = [json.dumps(turns), json.dumps(turns[0]), '[{"a": 1}]', "[1, 2]", "[", '{"from": "gpt"}', "[]", "", "null"]
    with open("my.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["x", "y"], *([cell, "end"] for cell in cells)])
    rows = read("my.csv")
    assert [row.value["x"] for row in rows] == [turns, turns[0], *cells[2:5], {"from": "gpt"}, *cells[6:]]
    assert [row.where for row in rows] == [f"my.csv:{n}" for n in range(2, 11)]
    Path("my.jsonl").write_text(json.dumps({"x": cells[0]}))
    assert values("my.jsonl") == [{"x": cells[0]}]  # a text of JSON Lines is a text


def test_empty_cells_may_stand_for_none(here):
    Path("my.csv").write_text('a,b,c\n1,," "\n')
    (row,) = read("my.csv")
    assert row.value == {"a": "1", "b": "", "c": " "} and row.filled == {"a": "1"}
    (row,) = read([{"a": ""}])
    assert row.filled == {"a": ""}


@pytest.mark.parametrize("encoding", ["utf-16", "gbk", "latin-1"])
@pytest.mark.parametrize("name", ["my.csv", "my.jsonl", "my.txt", "my.json"])
def test_other_encodings_are_named_with_their_line(here, encoding, name):
    word = "é" if encoding == "latin-1" else "你好"
    text = {"my.csv": f"text\n{word}\n", "my.jsonl": f'{{}}\n{{"text": "{word}"}}\n'}.get(name, f"\n{word}\n")
    Path(name).write_bytes(text.encode(encoding))
    looks = {"utf-16": "UTF-16", "gbk": "GB18030", "latin-1": "WINDOWS-1252"}[encoding]
    convert = rf"{looks}.* Convert it: iconv -f {looks} -t UTF-8 {name} > NEW\{name[2:]}"
    with pytest.raises(BadRowError, match=convert) as caught:
        read(name)
    assert caught.value.where == f"{name}:{1 if encoding == 'utf-16' else 2}"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_wide_encodings_are_named(here, encoding):
    Path("my.jsonl").write_bytes('{"text": "你好"}\n'.encode(encoding))
    with pytest.raises(BadRowError, match=f"the file is {encoding.upper().replace('-LE', 'LE').replace('-BE', 'BE')},"):
        read("my.jsonl")
    Path("my.txt").write_bytes("你好吗\n世界\n".encode("utf-16-le"))  # its letters have no zeros
    with pytest.raises(BadRowError, match="the file is UTF-16LE"):
        read("my.txt")


def test_nested_types_of_arrow(here):
    schema = pa.schema(
        [
            (
                "turns",
                pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string()), ("name", pa.string())])),
            ),
            ("scores", pa.list_(pa.decimal128(5, 2))),
            ("kind", pa.dictionary(pa.int8(), pa.string())),
            ("half", pa.float16()),
            ("none", pa.null()),
        ]
    )
    from decimal import Decimal

    turn = {"role": "user", "content": "a", "name": None}
    rows = [
        {"turns": [turn], "scores": [Decimal("1.50")], "kind": "x", "half": 0.5, "none": None},
        {"turns": None, "scores": [], "kind": None, "half": None, "none": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), "x.parquet")
    assert values("x.parquet") == rows
    from lightning_rlhf.data.preference_formats import to_preference

    row = {"prompt": "q", "answers": ["a", "b"], "scores": [Decimal("1.50"), Decimal("2")]}
    assert to_preference(row).scores == (2.0, 1.5)


def test_names_of_columns_that_are_no_text(here):
    pq.write_table(pa.table({"a column": ["b"]}), "x.parquet", store_schema=False)
    data = Path("x.parquet").read_bytes()
    Path("x.parquet").write_bytes(data.replace(b"a column", b"\x80 column"))
    with pytest.raises(BadRowError, match=r"^x\.parquet: can't be read as Parquet after 0 rows"):
        read("x.parquet")


def test_values_that_python_cannot_hold(here):
    far = pa.array([0, 2**60], pa.timestamp("us"))
    pq.write_table(pa.table({"at": far, "n": [1, 2]}), "x.parquet")
    rows, found = faults("x.parquet")
    assert [row.value["n"] for row in rows] == [1] and found == [("x.parquet[1]", "unreadable value")]


# Weights and states


def test_the_state_of_a_source_changes_with_its_files(here):
    Path("a.jsonl").write_text("{}\n")
    Path("b.jsonl").write_text("{}\n")
    before = source_state("*.jsonl")
    assert before == source_state(["a.jsonl", "b.jsonl"]) != source_state("a.jsonl")
    Path("b.jsonl").write_text("{} \n")
    assert source_state("*.jsonl") != before
    assert source_state([{"a": 1}]) is None and source_state(datasets.Dataset.from_list(ROWS)) is None
    with pytest.raises(FileNotFoundError):
        source_state("missing.jsonl")


def test_the_state_of_a_hub_set_is_that_of_its_files(here, monkeypatch):
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.load_from_disk("saved"))
    name, file, size, _ = source_state("org/set")[0]
    assert name == "org/set" and file.endswith(".arrow") and size > 0


def test_counts_of_bad_rows_are_taken_up_again():
    bad = BadRows("skip")
    bad.add("a:1", "empty turn", "turn 2 is empty")
    bad.add("a:3", "empty turn", "turn 1 is empty")
    bad.add("a:4", "unknown role", "who")
    kept = json.loads(json.dumps(bad.summary()))
    again = BadRows("skip")
    again.merge(kept)
    assert (again.counts, again.summary()) == (bad.counts, bad.summary())
    with pytest.raises(BadRowError, match=r"^a:1: turn 2 is empty"):
        BadRows("raise").merge(kept)


# Files by what they are


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_gzip_is_known_by_content_and_not_by_name(here):
    data = b'{"a": 1}\n{"a": 2}\n'
    for name, content in (("named.jsonl", gzip.compress(data)), ("plain.jsonl.gz", data), ("both.json", data)):
        Path(name).write_bytes(content)
        assert values(name) == [{"a": 1}, {"a": 2}]
    Path("my.csv").write_bytes(gzip.compress(b"a,b\n1,2\n"))
    assert values("my.csv") == [{"a": "1", "b": "2"}]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12\n"


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("name", ["my.jsonl", "my.jsonl.gz", "my.json", "my.csv", "my.txt", "my.parquet"])
def test_a_git_lfs_pointer_is_named(here, name, policy):
    for content in (POINTER, gzip.compress(POINTER)):
        Path(name).write_bytes(content)
        if name != "my.parquet" or content is POINTER:
            with pytest.raises(BadRowError, match=rf"^{name}: this is a Git LFS pointer.*git lfs pull"):
                list(read_rows(name, BadRows(policy)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bz2.compress(b"{}\n"), "bzip2"),
        (lzma.compress(b"{}\n"), "xz"),
        (b"PK\x03\x04....", "zip"),
        (b"\x28\xb5\x2f\xfd....", "Zstandard"),
        (b"PAR1....PAR1", r"the file is Parquet.*\.parquet"),
        ('{"a": 1}\n'.encode("utf-16-le"), "UTF-16"),
        ('{"a": 1}\n'.encode("utf-16-be"), "UTF-16"),
    ],
)
def test_other_kinds_of_files_are_named(here, content, message):
    for name in ("my.jsonl", "my.json", "my.csv"):
        Path(name).write_bytes(content)
        with pytest.raises(BadRowError, match=rf"^{name}.*{message}"):
            list(read_rows(name, BadRows("skip")))


def test_files_with_byte_order_marks_may_be_joined(here):
    for name in ("my.jsonl", "my.json"):
        Path(name).write_bytes(2 * b'\xef\xbb\xbf{"a": 1}\n')
        assert values(name) == [{"a": 1}, {"a": 1}]


def test_a_list_of_turns_is_a_conversation(here):
    Path("my.jsonl").write_text(f"{json.dumps(TURNS)}\n{json.dumps({'messages': TURNS})}\n")
    assert values("my.jsonl") == 2 * [{"messages": TURNS}]
    Path("my.json").write_text(json.dumps([TURNS, TURNS]))
    assert values("my.json") == 2 * [{"messages": TURNS}]
    Path("one.json").write_text(json.dumps(TURNS))
    assert values("one.json") == [{"messages": TURNS}]
    Path("data.json").write_text(json.dumps({"data": [TURNS]}))
    assert values("data.json") == [{"messages": TURNS}]
    assert [row.value for row in read([TURNS, tuple(TURNS)])] == [{"messages": TURNS}, {"messages": tuple(TURNS)}]
    flat = [{"role": "prompter", "text": "a", "message_id": "t"}, {"role": "assistant", "text": "b", "message_id": "u"}]
    Path("flat.json").write_text(json.dumps(flat))
    assert values("flat.json") == flat  # rows, not turns


def test_keys_that_come_twice_are_refused_with_their_line(here):
    twice = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    Path("my.jsonl").write_text(f'{{"a": 1}}\n{twice}\n{{"a": 1, "b": 2, "a": 1}}\n')
    rows, found = faults("my.jsonl")
    assert [row.value for row in rows] == [{"a": 1}]
    assert found == [("my.jsonl:2", "repeated key"), ("my.jsonl:3", "repeated key")]
    Path("my.json").write_text(f'[{{"a": 1}},\n{twice},\n{{"a": 2}}]')
    rows, found = faults("my.json")
    assert [row.value for row in rows] == [{"a": 1}, {"a": 2}]
    assert found == [("my.json[1] (line 2)", "repeated key")]
    Path("one.json").write_text('{"data": [{"a": 1, "a": 2}]}')
    assert faults("one.json") == ([], [("one.json:1", "repeated key")])
    turns = '[{"role": "user", "content": "a", "content": "b"}]'
    with open("my.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["messages"], [turns], ['{"a": 1, "a": 2}']])
    rows, found = faults("my.csv")
    assert [row.value for row in rows] == [{"messages": '{"a": 1, "a": 2}'}]  # a text
    assert found == [("my.csv:2", "repeated key")]
    with pytest.raises(BadRowError, match=r"^my\.jsonl:2: the key 'content' comes twice"):
        read("my.jsonl")


def test_an_empty_file_among_several_is_one_line(here):
    Path("a.jsonl").write_text('{"a": 1}\n')
    for name in ("b.jsonl", "b.json", "b.parquet", "b.jsonl.gz"):
        Path(name).write_bytes(b"")
        with pytest.warns(UserWarning, match=f"^{name} has no row") as caught:
            assert values([name, "a.jsonl"]) == [{"a": 1}]
        assert len(caught) == 1
    Path("c.csv").write_text("a,b\n")
    with pytest.warns(UserWarning, match="c.csv has no row"):
        assert values("c.csv") == []


def test_faults_of_json_say_at_once(here):
    Path("my.jsonl").write_text('{"a": "x\ty"}\n')
    with pytest.raises(BadRowError, match="Invalid control character at column"):
        read("my.jsonl")
