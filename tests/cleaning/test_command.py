"""`lightning-rlhf data`: what it prints, what it writes, and how it takes bad files."""

import csv
import gzip
import json

import pytest

from lightning_rlhf.cleaning import command
from lightning_rlhf.cli import main
from lightning_rlhf.data import InstructionDataModule, UnpairedDataModule

pytest.importorskip("rensa")

TEXT = "Explain in two short sentences why the sky is blue at noon and red at sunset"


def rows(path):
    read = gzip.open if path.suffix == ".gz" else open
    with read(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture
def file(tmp_path):
    """Five good rows, of which two stay, and two bad ones."""
    path = tmp_path / "in" / "my.jsonl"
    path.parent.mkdir()
    lines = [
        json.dumps({"id": "a", "instruction": TEXT, "output": "Light. More light.", "lang": "en"}),
        json.dumps({"id": "b", "instruction": TEXT.upper(), "output": "Light."}),
        "{broken",
        json.dumps({"id": "c", "instruction": "写一首诗", "output": "好", "lang": "en"}, ensure_ascii=False),
        json.dumps({"id": "d", "instruction": "Whom do I ask?", "output": "Mail ann.lee@mail.cn"}),
        json.dumps({"id": "e", "instruction": "Who are you?", "output": "As an AI language model, I am no one."}),
        json.dumps({"foo": 1}),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(*arguments):
    main(["data", *map(str, arguments)])


def test_clean(file, tmp_path, capsys):
    out = tmp_path / "out" / "good.jsonl"
    run("clean", file, "--out", out)
    kept = rows(out)
    assert [row["id"] for row in kept] == ["a", "d"]
    assert kept[0] == rows_by_id(file)["a"] and kept[1]["output"] == "Mail [EMAIL]"
    dropped = rows(tmp_path / "out" / "good.dropped.jsonl")
    assert {(entry["where"].rpartition(":")[2], entry["filter"]) for entry in dropped} == {
        ("2", "NearDuplicate"),
        ("3", "bad row"),
        ("4", "Script"),
        ("6", "Refusal"),
        ("7", "bad row"),
    }
    report = json.loads((tmp_path / "out" / "good.report.json").read_text(encoding="utf-8"))
    assert report["filters"]["kept"] == 2 and set(report["bad_rows"]) == {"malformed JSON", "unknown format"}
    said = capsys.readouterr().out
    assert "2 of 5 rows kept" in said and "my.jsonl:3" in said and str(out) in said
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "good.dropped.jsonl",
        "good.jsonl",
        "good.report.json",
    ]


def rows_by_id(path):
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if "id" in line]
    return {row["id"]: row for row in found}


def test_what_is_written_can_be_trained_on(file, tmp_path, tiny_tokenizer):
    run("clean", file, "--out", tmp_path / "good.jsonl.gz")
    data = InstructionDataModule(str(tmp_path / "good.jsonl.gz"), tokenizer=tiny_tokenizer, val_fraction=0.0)
    data.setup("fit")
    assert len(data.train_dataloader()) == 1


def test_named_filters_and_settings(file, tmp_path):
    run("clean", file, "--out", tmp_path / "a.jsonl", "--filters", "Refusal", "Script")
    assert [row["id"] for row in rows(tmp_path / "a.jsonl")] == ["a", "b", "d"]
    config = tmp_path / "filters.yaml"
    config.write_text("filters: [{Length: {max_answer: 1}}]", encoding="utf-8")
    run("clean", file, "--out", tmp_path / "b.jsonl", "--config", config)
    assert [row["id"] for row in rows(tmp_path / "b.jsonl")] == ["b", "c"]


def test_what_a_test_set_has_goes(file, tmp_path):
    test = tmp_path / "test.csv"
    with test.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([["question"], [f"{TEXT}?"]])
    run("clean", file, "--out", tmp_path / "a.jsonl", "--filters", "Length", "--against", test)
    assert [row["id"] for row in rows(tmp_path / "a.jsonl")] == ["c", "d", "e"]
    first = next(entry for entry in rows(tmp_path / "a.dropped.jsonl") if entry["filter"] != "bad row")
    assert first["filter"] == "Contamination" and "test.csv:2" in first["measured"]["contamination"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "in/my.jsonl"], "is an input, and would be overwritten"),
        (["--out", "good.csv"], "written as .jsonl or .jsonl.gz"),
        (["--out", "a.jsonl", "--filters", "Lengths"], "no filter Lengths; did you mean Length"),
        (["--out", "a.jsonl", "--config", "no.yaml"], "No such file"),
        (["--out", "a.jsonl", "--on-bad-row", "raise"], "my.jsonl:3: malformed JSON"),
        (["--out", "a.jsonl", "--on-bad-row", "raise"], "or set --on-bad-row skip to leave such rows out"),
        (["--out", "a.jsonl", "--format", "alpacca"], "'alpacca' is not known"),
        (["--out", "a.jsonl", "--against", "nothing.jsonl"], "no such file"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(file, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = file.read_bytes()
    with pytest.raises(SystemExit) as error:
        run("clean", file, *arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"] and file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "4"], "--workers is for --executor."),
        (["--executor", "local", "--slurm-time", "01:00:00"], "--slurm-time is for --executor slurm."),
        (["--filters", "Length", "--config", "f.yaml"], "--filters and --config both name filters"),
    ],
)
def test_options_that_would_do_nothing_are_refused(file, tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("clean", file, "--out", tmp_path / "a.jsonl", *arguments)
    assert message in capsys.readouterr().err


def test_a_config_in_another_encoding_is_named(file, tmp_path):
    config = tmp_path / "f.yaml"
    config.write_bytes("filters: [Length] # 过滤".encode("gbk"))
    with pytest.raises(SystemExit, match=r"f\.yaml: byte \d+ of the line .* iconv -f GB18030 -t UTF-8"):
        run("clean", file, "--out", tmp_path / "a.jsonl", "--config", config)


def test_rows_with_the_same_id_are_rows_of_their_own(tmp_path):
    lines = [{"id": "1", "prompt": f"What is {what}?"} for what in ("fog", "hail", "dew", "fog")]
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    run("clean", path, "--out", tmp_path / "a.jsonl")
    assert rows(tmp_path / "a.jsonl") == lines[:3]
    assert [entry["where"] for entry in rows(tmp_path / "a.dropped.jsonl")] == [f"{path}:4"]


def test_an_output_that_was_there_stays_until_the_new_one_is_whole(file, tmp_path):
    out = tmp_path / "a.jsonl"
    out.write_text("old", encoding="utf-8")
    with pytest.raises(SystemExit):
        run("clean", file, "--out", out, "--on-bad-row", "raise")
    assert out.read_text(encoding="utf-8") == "old"


def test_links_to_the_input_are_the_input(file, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(file)
    with pytest.raises(SystemExit, match="is an input"):
        run("clean", file, "--out", link)


BAD = {
    "gbk.jsonl": (json.dumps({"prompt": "什么是雾？"}, ensure_ascii=False).encode("gbk") + b"\n", "invalid UTF-8"),
    "cut.jsonl": (b'{"prompt": "Wh', "malformed JSON"),
    "types.jsonl": (b'5\n"text"\n[1]\nnull\n', "not an object"),
    "surrogate.jsonl": (b'{"prompt": "\\ud800"}\n', "broken character"),
    "twice.jsonl": (b'{"prompt": "a", "prompt": "b"}\n', "repeated key"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_counted_by_kind_and_named_by_number(tmp_path, name, capsys):
    data, kind = BAD[name]
    path = tmp_path / name
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "What is fog?"}\n' + data)
    run("clean", path, "--out", tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows(tmp_path / "out.jsonl")] == ["What is fog?"]
    dropped = rows(tmp_path / "out.dropped.jsonl")
    assert [entry["where"] for entry in dropped] == [f"{path}:{i + 2}" for i in range(len(data.splitlines()))]
    assert all(entry["reason"].startswith(kind) for entry in dropped)
    assert f"{path}:2" in capsys.readouterr().out


def test_empty_files_mixed_formats_and_a_huge_row(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.csv").write_text("question\nWhat is fog?\n", encoding="utf-8")
    huge = {"instruction": "Repeat", "output": "word " * 1_000_000}
    lines = [huge, {"prompt": "2+2?", "chosen": "4", "rejected": "5"}, {"text": "Once upon a time there was a fox."}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.warns(UserWarning, match="a.jsonl has no row"):
        run("clean", tmp_path, "--out", tmp_path / "out" / "x.jsonl")
    assert rows(tmp_path / "out" / "x.jsonl") == [{"question": "What is fog?"}, *lines[1:]]
    (dropped,) = rows(tmp_path / "out" / "x.dropped.jsonl")
    assert dropped["filter"] == "Length" and dropped["row"] == huge


def test_numbers_that_json_lacks_are_not_written(tmp_path, capsys):
    path, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    lines = ['{"prompt": "What is fog?", "x": {"y": [NaN]}}', '{"prompt": "What is rain?"}']
    path.write_text("\n".join([*lines, '{"prompt": "What is snow?", "x": -1e999}']), encoding="utf-8")
    for args in (["clean", path], ["convert", path, "--to", "prompt", "--on-bad-row", "skip"]):
        run(*args, "--out", out)
        assert [row["prompt"] for row in rows(out)] in (
            ["What is rain?"],
            [[{"role": "user", "content": "What is rain?"}]],
        )
        first, second = rows(tmp_path / "out.dropped.jsonl")
        assert first["where"] == f"{path}:1" and "the column 'x' holds NaN" in first["reason"]
        assert second["where"] == f"{path}:3" and "the column 'x' is -inf, which JSON can't hold" in second["reason"]
    with pytest.raises(SystemExit, match=r"a\.jsonl:1: the column 'x' holds NaN"):
        run("convert", path, "--to", "prompt", "--out", out)


def test_convert(file, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"my\.jsonl:3: malformed JSON"):
        run("convert", file, "--to", "messages", "--out", tmp_path / "a.jsonl")
    run("convert", file, "--to", "messages", "--out", tmp_path / "a.jsonl", "--on-bad-row", "skip")
    made = rows(tmp_path / "a.jsonl")
    assert [row["id"] for row in made] == list("abcde")
    assert made[0]["messages"][0] == {"role": "user", "content": TEXT} and made[0]["lang"] == "en"
    assert "5 rows as messages; 2 left out" in capsys.readouterr().out
    run("convert", tmp_path / "a.jsonl", "--to", "alpaca", "--out", tmp_path / "b.jsonl")
    assert [row["instruction"] for row in rows(tmp_path / "b.jsonl")][:1] == [TEXT]


def test_what_a_format_cannot_hold_is_refused_or_counted(tmp_path, capsys):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[:2]}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"my\.jsonl:1: the format 'alpaca' holds one question and answer"):
        run("convert", path, "--to", "alpaca", "--out", tmp_path / "a.jsonl")
    run("convert", path, "--to", "alpaca", "--out", tmp_path / "a.jsonl", "--on-bad-row", "skip")
    assert len(rows(tmp_path / "a.jsonl")) == 1
    assert "1 left out: 1 x several turns" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no format alpacca to write"):
        run("convert", path, "--to", "alpacca", "--out", tmp_path / "b.jsonl")


def test_stats(file, tmp_path, capsys):
    run("stats", file, "--json", tmp_path / "stats.json")
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "stats.json").read_text(encoding="utf-8"))
    assert found["rows"] == 5 and found["languages"] == {"en": 4, "zh": 1} and found["formats"] == {"alpaca": 5}
    assert found["equal_instructions"] == 1 and found["near_duplicates"] == 0 and found["other_language"] == 1
    assert found["instruction_tokens"]["texts"] == 5 and found["instruction_tokens"]["max"] == 16
    assert found["bad_rows"]["malformed JSON"][0] == 1
    assert "rows        5" in said and "my.jsonl:3" in said


def test_stats_of_preferences(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    pairs = [("a b c", "a"), ("a b", "c"), ("a", "b c"), ("a", "b")]
    lines = [json.dumps({"prompt": f"Why {i}?", "chosen": c, "rejected": r}) for i, (c, r) in enumerate(pairs)]
    path.write_text("\n".join(lines), encoding="utf-8")
    run("stats", path)
    assert "the answer that is longer 50.0%, shorter 25.0%, equally long 25.0%" in capsys.readouterr().out


def test_where_a_row_comes_from(tmp_path, capsys):
    path = tmp_path / "grown.jsonl"
    grown = [
        {"id": "s1", "prompt": "What is fog?"},
        {"id": "r1", "prompt": "What is hail?", "provenance": {"parents": ["s1", "s2"], "round": 1}},
        {"id": "r2", "prompt": "What is dew?", "provenance": {"parents": ["r1", "s1", "r1"], "round": 2}},
    ]
    path.write_text("\n".join(map(json.dumps, grown)), encoding="utf-8")
    run("stats", path, "--row", "r2")
    assert capsys.readouterr().out.splitlines() == [
        "r2: What is dew?",
        "│    round 2",
        "├─ r1: What is hail?",
        "│  │    round 1",
        "│  ├─ s1: What is fog?",
        "│  └─ s2: not in these files",
        "├─ s1: What is fog?",
        "└─ r1: What is hail? (shown above)",
    ]
    with pytest.raises(SystemExit, match="no row has the id r3"):
        run("stats", path, "--row", "r3")
    path.write_text("\n".join(map(json.dumps, grown[:1] * 2)), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"grown\.jsonl:2: the id s1 comes twice"):
        run("stats", path, "--row", "s1")


def test_help_and_misspelt_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    assert "stats" in capsys.readouterr().out
    for name in ("stats", "clean", "convert"):
        with pytest.raises(SystemExit, match="0"):
            run(name, "--help")
        assert "PATH" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run("cleans", "x")
    assert "there is no cleans; did you mean clean?" in capsys.readouterr().err


def test_what_is_missing_is_said_with_its_command(file, tmp_path, monkeypatch):
    import importlib

    real = importlib.import_module

    def missing(name, *more):
        if name == "rensa":
            raise ModuleNotFoundError("No module named 'rensa'", name="rensa")
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SystemExit, match=r"needs rensa\. Install it: pip install 'lightning_rlhf\[collect\]'"):
        command.main(["clean", str(file), "--out", str(tmp_path / "a.jsonl")])


@pytest.fixture
def thumbs(tmp_path):
    """Single answers, three of them to one prompt."""
    path = tmp_path / "thumbs.jsonl"
    answers = [("Paris is its capital.", True), ("It may be Lyon.", False), ("Paris is its capital!", True)]
    lines = [
        json.dumps({"prompt": "What is the capital of France?", "completion": text, "label": label})
        for text, label in answers
    ]
    path.write_text("\n".join([*lines, '{"messages": [], "label": true}']), encoding="utf-8")
    return path


def test_stats_of_single_answers(thumbs, tmp_path, capsys):
    run("stats", thumbs, "--json", tmp_path / "stats.json")
    assert "labels      good 2, bad 1" in capsys.readouterr().out
    found = json.loads((tmp_path / "stats.json").read_text(encoding="utf-8"))
    assert found["kinds"] == {"unpaired": 3} and len(found["bad_rows"]) == 1


def test_cleaning_keeps_the_different_answers_to_a_prompt(thumbs, tmp_path):
    run("clean", thumbs, "--out", tmp_path / "clean.jsonl", "--filters", "NearDuplicate")
    assert [row["completion"] for row in rows(tmp_path / "clean.jsonl")] == ["Paris is its capital.", "It may be Lyon."]


def test_convert_takes_preferences_apart(tmp_path, tiny_tokenizer, capsys):
    path, out = tmp_path / "ranked.jsonl", tmp_path / "single.jsonl"
    pair = {"prompt": "Who?", "chosen": "me", "rejected": "you"}
    lines = [json.dumps({"prompt": "Why?", "ranked": ["a b", "c", "d e f"]}), json.dumps(pair)]
    path.write_text("\n".join(lines), encoding="utf-8")
    run("convert", path, "--to", "unpaired", "--out", out)
    assert "4 rows as unpaired; 0 left out\n1 answers in the middle" in capsys.readouterr().out
    (dropped,) = rows(tmp_path / "single.dropped.jsonl")
    assert dropped["where"].endswith("ranked.jsonl:1") and dropped["filter"] == "no label"
    trees = []
    for source in (path, out):
        data = UnpairedDataModule(str(source), tokenizer=tiny_tokenizer, take_apart=True, val_fraction=0.0)
        data.setup("fit")
        found = data.train_dataloader().rows
        trees.append([found(i) for i in range(len(found))])
    assert repr(trees[0]) == repr(trees[1]) and len(trees[0]) == 2


def test_a_threshold_is_for_single_answers(file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("convert", file, "--to", "text", "--out", tmp_path / "out.jsonl", "--threshold", 3)
    assert "--threshold makes labels of ratings, and text has none" in capsys.readouterr().err
