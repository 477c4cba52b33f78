"""Verifiers: what they read, what does not apply, and rows that are wrong."""

import datetime
import json
import math
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_rlhf.cli import main
from lightning_rlhf.rewards import RewardError, make_reward
from lightning_rlhf.rewards.verifiers import (
    code,
    constraints,
    exact,
    json_schema,
    length,
    number,
    read_number,
    regex,
    repetition,
)
from lightning_rlhf.rewards.verifiers import math as math_verifier


def one(verifier, text, value, **options):
    return verifier([""], [text], [value], **options)[0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("So the answer is 42.", "42"),
        ("3 + 4 = 7, not 8\n#### 7", "7"),
        (r"we get \boxed{-1.5}, as 3 < 4", "-1.5"),
        ("1,234,567 people", "1,234,567"),
        ("x2 and v1.2.3", ""),
        ("", ""),
        ("no number", ""),
        ("Answer: 6e3", "6e3"),
    ],
)
def test_what_is_read_as_the_number(text, found):
    assert read_number(text) == found


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [("It is 1000.0", "1,000", 1.0), ("12", 12, 1.0), ("12 or 13", 12, 0.0), ("none", 12, 0.0), ("4", None, None),
     ("#### 5", "2 + 3 = 5\n#### 5", 1.0)],
)  # fmt: skip
def test_numbers_are_compared_as_numbers(text, answer, score):
    assert one(number, text, answer) == score


def test_a_tolerance_is_relative():
    assert one(number, "101", 100, tolerance=0.01) == 1.0 and one(number, "101.1", 100, tolerance=0.01) == 0.0


def test_an_expression_that_takes_for_ever_is_counted():
    late = {"score": -1.0, "timeout": 1.0}
    with pytest.warns(UserWarning, match=r"regex: a completion could not be judged, as it took too long; it scores -1"):
        found = regex([""] * 2, ["a" * 60 + "b", "aaa"], "(a|aa)+$", timeout=0.2, failed_score=-1.0)
    assert found == [late, 1.0]
    schema = {"properties": {"a": {"pattern": "^(a|aa)+$"}}}
    with pytest.warns(UserWarning, match="json_schema: a completion could not be judged"):
        found = json_schema([""], [json.dumps({"a": "a" * 60 + "b"})], [schema], timeout=0.2, failed_score=None)
    assert found == [{"score": None, "timeout": 1.0}]


def test_one_expression_for_all_and_for_the_whole_text():
    texts = ["<a>x\ny</a>", " <a>z</a>\n", "b <a>z</a>", ""]
    assert regex([""] * 4, texts, "<a>.*</a>", whole=True) == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="regex: the option whole is 1: give true or false"):
        regex([""], ["a"], "a", whole=1)


def test_length():
    grid = length([""] * 60, ["x" * n for n in range(60)], low=10, high=20)
    assert max(abs(a - b) for a, b in pairwise(grid)) <= 0.1 + 1e-12  # no step
    lengths = [0, 5, 10, 20, 30, 40, 60]
    found = length([""] * 7, ["x" * n for n in lengths], low=10, high=20)
    assert found == [0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert length([""] * 2, ["one two", "春天来了"], low=[2, 4], high=[2, 4], unit="words") == [1.0, 1.0]
    assert length([""], ["?"], high=1, unit="tokens", completion_ids=[[7, 4]]) == [0.0]
    for options in ({"low": 5, "high": 4}, {"low": 0}, {"low": "5"}, {"unit": "lines"}, {"unit": "tokens"}):
        with pytest.raises(ValueError, match="length"):
            length([""], ["x"], **options)


def test_a_row_without_a_limit_has_no_length_to_keep():
    assert length([""] * 3, ["x"] * 3, low=[1, None, 1], high=[2, 2, None]) == [1.0, None, None]
    with pytest.raises(ValueError, match="length: the option low is None: give a number, 1 or more"):
        length([""], ["x"], low=None)


@pytest.mark.parametrize(
    ("verifier", "options", "texts", "scores"),
    [
        (number, {"answer": 7}, ["7", "8"], [1, 0]),
        (exact, {"answer": "ab"}, ["a", "ab"], [0, 1]),
        (constraints, {"constraints": {"max_words": 1}}, ["a", "a b"], [1, 0]),
        (json_schema, {"schema": {"type": "object"}}, ["{}", "[]"], [1, 0.5]),
    ],
)
def test_an_option_stands_for_the_column_in_all_rows(verifier, options, texts, scores):
    assert verifier(["", ""], texts, **options) == scores
    [name] = options
    with pytest.raises(ValueError, match=f"{name} is a list of 3 for 2 completions: as an option, give one value"):
        verifier(["", ""], texts, **{name: [options[name]] * 3})


@pytest.mark.parametrize(
    ("verifier", "options", "message"),
    [
        (number, {"answer": 1, "tolerance": -1}, "number: the option tolerance is -1: give a number, 0 or more"),
        (number, {"answer": 1, "tolerance": math.nan}, "number: the option tolerance is nan: give a number, 0 or more"),
        (number, {"answer": 1, "tolerance": [0.1]}, "number: the data have a column tolerance: rename it, or give a"),
        (repetition, {"size": 0}, "repetition: the option size is 0: give a whole number of words, 1 or more"),
        (repetition, {"size": 1.5}, "repetition: the option size is 1.5: give a whole number of words, 1 or more"),
    ],
)
def test_settings_are_checked(verifier, options, message):
    with pytest.raises(ValueError, match=message):
        verifier([""], ["1"], **options)


@pytest.mark.parametrize(
    ("verifier", "options", "message"),
    [
        (length, {"unit": "word"}, "length: the option unit is 'word': give characters, words or tokens."),
        (length, {"low": 0}, "length: the option low is 0: give a number, 1 or more."),
        (length, {"low": 5, "high": 4}, "length: low is 5, and high is 4: give a high that is low or more."),
        (regex, {"pattern": "("}, "regex: the option pattern is '(': it is no regular expression: missing ), "
         "unterminated subpattern at position 0."),
        (regex, {"pattern": "a", "timeout": -1}, "regex: the option timeout is -1: give a number of seconds above 0."),
        (regex, {"timeout": "1s"}, "regex: the option timeout is '1s': give a number of seconds above 0."),
        (number, {"answer": "five"}, "number: the option answer is 'five': there is no number in it."),
        (constraints, {"constraints": {"max_word": 3}}, "constraints: the option constraints is {'max_word': 3}: "
         "'max_word' is unknown; did you mean max_words? All: "),
        (json_schema, {"schema": {"type": "thing"}}, "json_schema: the option schema is {'type': 'thing'}: "),
        (repetition, {"size": 0}, "repetition: the option size is 0: give a whole number of words, 1 or more."),
        (math_verifier, {"failed_score": "none"}, "math: the option failed_score is 'none': give a finite number, or "
         "null."),
        (math_verifier, {"answer": " "}, "math: the option answer is ' ': it is empty."),
        (code, {"memory": 1}, "code: the option memory is 1: give a number of MiB, 64 or more."),
        (code, {"failed_score": "x"}, "code: the option failed_score is 'x': give a finite number, or null."),
        (code, {"tests": "x = 1"}, "code: the option tests is 'x = 1': there is no test in it"),
        (code, {"tests": ["assert f()"]}, "code: tests is a list of 1: as an option, give one value"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_told_when_the_reward_is_made(verifier, options, message):
    with pytest.raises(RewardError) as error:
        make_reward([{"source": verifier, "options": options}], None)
    assert str(error.value).startswith(message)


def test_right_options_make_a_reward_that_needs_the_other_columns():
    for verifier, options, needs in [
        (length, {"unit": "tokens"}, set()),
        (regex, {"timeout": 2.0}, {"pattern"}),
        (regex, {"pattern": "a+"}, set()),
        (code, {}, {"tests"}),
        (exact, {"answer": "x"}, set()),
    ]:
        assert make_reward([{"source": verifier, "options": options}], None).needs == needs


def test_exact_and_regex():
    assert [one(exact, " a b\n", v) for v in ("a b", "a  b", None)] == [1.0, 0.0, None]
    assert [one(regex, "a\nb", v) for v in ("a.b", "^b$", None)] == [1.0, 0.0, None]


@pytest.mark.parametrize(
    ("verifier", "value", "message"),
    [
        (number, "five", "number: the column answer has 'five': there is no number in it"),
        (regex, "(", "regex: the column pattern has '(': it is no regular expression: missing )"),
        (json_schema, "{", "json_schema: the column schema has"),
        (json_schema, {"type": "thing"}, "json_schema: the column schema has"),
        (constraints, {"max_word": 3}, "'max_word' is unknown; did you mean max_words?"),
        (regex, 7, "the column pattern has 7: give a regular expression"),
        (json_schema, 7, "a schema is an object"),
        (json_schema, {"$ref": "#"}, "json_schema: the column schema has"),
        (json_schema, {"$ref": "#/definitions/q"}, "does not exist"),
        (constraints, {"max_words": "3"}, "max_words is '3': give a whole number, 0 or more"),
        (constraints, {"max_words": math.nan}, "max_words is nan: give a whole number, 0 or more"),
        (constraints, {"max_words": True}, "max_words is True: give a whole number, 0 or more"),
        (constraints, {"contains": "moon"}, "contains is 'moon': give a list of texts"),
        (constraints, {"contains": [1]}, "contains is [1]: give a list of texts"),
        (constraints, {"ends_with": 1}, "ends_with is 1: give a text"),
        (constraints, 7, "the column constraints has 7: give an object"),
        (constraints, "not json", "the column constraints has 'not json': give an object"),
        (constraints, {"language": "fr"}, "language is 'fr': give zh or en"),
        (constraints, {"case": "title"}, "case is 'title': give lower or upper"),
    ],
)
def test_a_column_that_is_wrong_is_an_error_in_a_line(verifier, value, message):
    with pytest.raises(ValueError) as error:
        one(verifier, "7", value)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "value", "score"),
    [
        ("是7", 7, 1.0),
        ("一共有7个苹果。", 7, 1.0),
        ("第3题:12元", 12, 1.0),
        ("答案是７。", 7, 1.0),
        ("答案:8\n验算 9", 8, 1.0),
        ("是1，000元", 1000, 1.0),
        ("\u22127", -7, 1.0),
        ("5²", 52, 0.0),
        ("x7", 7, 0.0),
        ("1e999999999", 1, 0.0),
        ("1e-999999999", 1, 0.0),
    ],
)
def test_numbers_in_chinese_and_out_of_all_bounds(text, value, score):
    assert one(number, text, value) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"a": 1}', 1.0),
        ('Here:\n```json\n{"a": 2}\n```', 1.0),
        ('{"a": "one"}', 0.5),
        ("[1]", 0.5),
        ("{'a': 1}", 0.0),
        ("[" * 100_000, 0.0),
        ("", 0.0),
    ],
)
def test_json_that_follows_a_schema(text, score):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert one(json_schema, text, schema) == one(json_schema, text, json.dumps(schema)) == score
    assert one(json_schema, text, None) is None


@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [
        ({"min_words": 3}, "one two three", "one two"),
        ({"max_words": 2}, "one-two three", "one two three"),
        ({"max_words": 4}, "春天来了", "春天来了吗"),
        ({"min_characters": 3}, "abc", " ab "),
        ({"max_characters": 3}, "abc", "abcd"),
        ({"sentences": 2}, "A. B!", "A."),
        ({"paragraphs": 2}, "a\n\nb", "a\nb"),
        ({"contains": ["moon", "sun"]}, "Sun and moon", "moon"),
        ({"excludes": ["war"]}, "peace", "War"),
        ({"starts_with": "A"}, "All", "all"),
        ({"ends_with": "!"}, "yes! ", "yes"),
        ({"case": "lower"}, "all small", "One"),
        ({"case": "upper"}, "ALL", "123"),
        ({"language": "zh"}, "你好吗 hi", "hello"),
        ({"language": "en"}, "hello", "你好"),
    ],
    ids=str,
)
def test_constraints(wanted, right, wrong):
    assert (one(constraints, right, wanted), one(constraints, wrong, wanted)) == (1.0, 0.0)
    half = {**wanted, "starts_with": "never"} if "starts_with" not in wanted else {**wanted, "ends_with": "never"}
    assert one(constraints, right, json.dumps(half)) == 0.5


def test_no_constraints_do_not_apply():
    assert one(constraints, "x", None) is None and one(constraints, "x", {}) is None
    assert one(constraints, "x", {"max_words": 1, "contains": None}) == 1.0  # as Parquet gives it
    assert one(constraints, "x", {"contains": None}) is None


def test_repetition_counts_what_occurred_before():
    found = repetition([""] * 4, ["a b c d", "a b c a b c", "", "好好好好好好"])
    assert found == [0.0, pytest.approx(-0.25), 0.0, pytest.approx(-0.75)]


# ------------------------------------------------------------------------------------------------- the command

NUMBER = "lightning_rlhf.rewards.verifiers.number"
ROWS = [
    {"prompt": "2+2?", "completion": "It is 4.", "answer": 4},
    {"prompt": "2+3?", "completion": "It is 6.", "answer": "5"},
    {"prompt": "why?", "completion": "so so so so", "answer": None},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_the_command_shows_scores_and_writes_them(file, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    repeat = "lightning_rlhf.rewards.verifiers.repetition"
    main(["verify", "--reward", NUMBER, "--reward", repeat, str(file), "--out", str(out)])
    shown = capsys.readouterr().out
    assert (
        f"{file}:1: number 1  repetition 0  It is 4.\n    number: 4\n" in shown
        and "number -  repetition -0.5  so so" in shown
    )
    assert "number: mean 0.5 of 2 rows; does not apply to 1" in shown
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["score/number"] for row in found] == [1.0, 0.0, None] and found[2]["score"] == -0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reward", "lightning_rlhf.rewards.verifiers.digit"], "verifiers has no digit"),
        (["--reward", "lightning_rlhf.rewards.verifiers.numbers"], "did you mean number?"),
        (["--reward", NUMBER, "--limit", "-1"], "--limit is -1: give 0 or more"),
        (["--reward", NUMBER, "--out", "no/where.jsonl"], "no/where.jsonl can't be written: there is no folder no"),
        (["--reward", NUMBER, "--out", __file__], "is there already. Give --out another path"),
        (["--reward", NUMBER, "--completion", "text"], "the column 'text' is no text; the row has prompt, completion"),
        (
            ["--reward", "lightning_rlhf.rewards.verifiers.regex"],
            "regex needs the column pattern, or an option of that name; the prompts' rows have answer",
        ),
        (["--reward", "number"], "(package.module.function); did you mean lightning_rlhf.rewards.verifiers.number?"),
        (["--reward", "regexs"], "'regexs' is not a directory in "),
        (["--reward", "regexs"], "; did you mean lightning_rlhf.rewards.verifiers.regex?"),
        (["--reward", "answer_match"], "did you mean lightning_rlhf.rewards.functions.answer_match?"),
        (["--reward", "verifiers.number"], "; did you mean lightning_rlhf.rewards.verifiers.number?"),
        (["--reward", "lightning_rlhf.rewards.math"], "; did you mean lightning_rlhf.rewards.verifiers.math?"),
        (
            ["--reward", "{source: lightning_rlhf.rewards.verifiers.regex, options: {pattern: '('}}"],
            "verify: regex: the option pattern is '(': it is no regular expression",
        ),
        (["--reward", "[]"], "reward: the list is empty"),
        (["--reward", "[a"], "--reward [a: no YAML"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_line(file, options, message):
    with pytest.raises(SystemExit) as stop:
        main(["verify", *options, str(file)])
    assert message in str(stop.value) and "\n" not in str(stop.value)


def test_the_command_takes_a_list_as_a_config_has_it_and_names_parts_in_short(file, capsys):
    regex = "lightning_rlhf.rewards.verifiers.regex"
    given = f"[{{source: {regex}, options: {{pattern: '4'}}}}, {{source: {regex}, options: {{pattern: so}}}}, {NUMBER}]"
    main(["verify", "--reward", given, "--reward", NUMBER, str(file)])
    shown = capsys.readouterr().out
    assert f"{file}:1: regex 1  regex_2 0  number 1  number_2 1  It is 4.\n" in shown
    assert f"{file}:3: regex 0  regex_2 1  number -  number_2 -  so so" in shown


def test_the_command_replaces_no_column_of_the_rows(tmp_path, capsys):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    for column in ("score", "score/number", "reward/number/timeout"):
        path.write_text(json.dumps({"completion": "It is 4.", "answer": 4, column: 0.25}) + "\n")
        with pytest.raises(SystemExit) as stop:
            main(["verify", "--reward", NUMBER, str(path), "--out", str(out)])
        assert str(stop.value) == (
            f"lightning-rlhf verify: {path}:1: the row has a column {column!r}, which --out would replace. Rename it, "
            "or leave out --out."
        )
        assert not out.exists()
        main(["verify", "--reward", NUMBER, str(path)])
    assert "number: mean 1 of 1 row" in capsys.readouterr().out


def test_the_command_reads_a_table_of_completions(tmp_path, capsys):
    path = tmp_path / "completions.jsonl"
    rows = [
        {"completion": "It is 4.", "score": 1.0, "data/answer": 4},
        {"completion": "5", "answer": 5, "data/answer": 6},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["verify", "--reward", NUMBER, str(path)])
    assert "number: mean 1 of 2 rows" in capsys.readouterr().out, "a column itself comes before data/"


def words(prompts, completions):
    return [{"score": 1.0, "words": len(c.split())} for c in completions]


def test_the_command_shows_and_writes_further_numbers_and_any_value_of_the_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    file, out = tmp_path / "rows.parquet", tmp_path / "out.jsonl"
    pq.write_table(pa.table({"completion": ["a b", "c"], "day": [datetime.date(2024, 2, 29)] * 2}), file)
    main(["verify", "--reward", "test_verifiers.words", str(file), "--out", str(out)])
    shown = capsys.readouterr().out
    assert "words: mean 1 of 2 rows\n" in shown and "words/words: mean 1.5 of 2 rows\n" in shown
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found[0] == {"completion": "a b", "day": "2024-02-29", "score": 1, "score/words": 1, "reward/words/words": 2}


def counts_ids(prompts, completions, completion_ids):
    return [float(len(ids)) for ids in completion_ids]


def test_the_command_makes_up_no_tokens(file, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    by_tokens = "{source: lightning_rlhf.rewards.verifiers.length, options: {unit: tokens}}"
    for given, message in (
        (by_tokens, "tokens are known in a run only"),
        ("test_verifiers.counts_ids", "in a run only"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["verify", "--reward", given, str(file)])


def test_the_command_names_the_row_that_is_wrong_and_counts_timeouts(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"completion": "It is 4.", "answer": 4}, {"completion": "It is 6.", "answer": "five"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--reward", NUMBER, str(path)])
    assert f"{path}:2: " in str(stop.value) and "answer has 'five': there is no number in it" in str(stop.value)
    path.write_text("{")
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--reward", NUMBER, str(path)])
    assert f"{path}:1: malformed JSON" in str(stop.value) and "on_bad_row" not in str(stop.value), "it skips no row"
    rows = [{"completion": "a" * 60 + "b"}, {"completion": "aaa"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "{source: lightning_rlhf.rewards.verifiers.regex, weight: 2, options: {pattern: (a|aa)+$, timeout: 0.2}}"
    with pytest.warns(UserWarning, match="could not be judged"):
        main(["verify", "--reward", options, str(path)])
    shown = capsys.readouterr().out
    assert "regex: mean 0.5 of 2 rows" in shown and "1 completion could not be judged: timeout" in shown
    assert "    regex: 'aaa'" in shown
