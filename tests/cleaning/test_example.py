"""One face for the rows of all formats."""

import json

import pytest

from lightning_rlhf.cleaning import make_example, read_examples
from lightning_rlhf.data.formats import FORMATS, FormatError
from lightning_rlhf.data.preference_formats import PREFERENCE_FORMATS
from lightning_rlhf.data.sources import BadRowError, BadRows, Row

TURNS = [{"role": "system", "content": "Short."}, {"role": "user", "content": "2+2?"}]
#: A row of each format with the same question and answer.
INSTRUCTIONS = {
    "colossalchat": {"messages": [{"from": "human", "content": "2+2?"}, {"from": "assistant", "content": "4"}]},
    "messages": {"messages": [TURNS[1], {"role": "assistant", "content": "4"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "prompt_completion": {"prompt": "2+2?", "completion": "4"},
    "text": {"text": "2+2?"},
}
PREFERENCES = {
    "pair": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "colossalchat": {
        "context": [{"from": "human", "content": "2+2?"}],
        "chosen": [{"from": "assistant", "content": "4"}],
        "rejected": [{"from": "assistant", "content": "5"}],
    },
    "sharegpt_preference": {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    "transcripts": {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    "ranking": {"prompt": "2+2?", "answers": ["5", "4"], "ranks": [2, 1]},
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_of_all_formats(name):
    example = make_example(INSTRUCTIONS[name], "a.jsonl:1")
    assert (example.kind, example.format, example.instruction, example.where) == (
        "instruction",
        name,
        "2+2?",
        "a.jsonl:1",
    )
    assert example.answers == (() if name == "text" else ("4",))
    assert example.answer == ("" if name == "text" else "4")


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_of_all_formats(name):
    example = make_example(PREFERENCES[name])
    assert (example.kind, example.format, example.instruction) == ("preference", name, "2+2?")
    assert example.answers == ("4", "5") and example.answer == "4"


def test_every_format_is_here():
    assert set(INSTRUCTIONS) == set(FORMATS)
    assert set(PREFERENCES) | {"unpaired"} == set(PREFERENCE_FORMATS)


def test_prompts():
    assert make_example({"prompt": "2+2?"}).kind == "prompt"
    example = make_example({"messages": [*TURNS]}, kind="prompt")
    assert (example.instruction, example.answers) == ("2+2?", ())
    assert make_example({"question": "Why?"}).instruction == "Why?"


def test_several_turns():
    turns = [*TURNS, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3+3?"}]
    example = make_example({"messages": [*turns, {"role": "assistant", "content": "6"}]})
    assert example.questions == ("2+2?", "And 3+3?")
    assert example.answers == ("4", "6") and example.answer == "6"
    assert example.instruction_tokens == ["2", "2", "and", "3", "3"]


def test_language_is_the_columns_or_the_texts():
    row = {"prompt": "What is fog?", "lang": "zh-CN"}
    example = make_example(row)
    assert (example.declared, example.lang, example.language) == ("zh", "zh", "en")
    assert make_example({"prompt": "什么是雾？"}).lang == "zh"


@pytest.mark.parametrize("row", [*INSTRUCTIONS.values(), *PREFERENCES.values()])
def test_rewriting_changes_the_texts_and_nothing_else(row):
    row = {**row, "id": "2+2?", "scores": ["0.5", "2"] if "answers" in row else None}
    example = make_example(row)
    assert example.instruction_tokens == ["2", "2"]
    example.rewrite(lambda text: text.replace("2+2?", "Two and two?"))
    assert example.instruction == "Two and two?"
    assert example.instruction_tokens == ["two", "and", "two"]
    assert example.row["id"] == "2+2?" and example.row["scores"] == row["scores"]
    assert example.rewritten == 1
    assert json.dumps(example.row).replace("Two and two?", "2+2?") == json.dumps(row)


def test_rewriting_that_changes_nothing_keeps_the_row():
    example = make_example(row := {"prompt": "Why?"})
    example.rewrite(str)
    assert example.row == row and not example.rewritten


def test_rewriting_that_spoils_the_row_leaves_it_as_it_was():
    example = make_example(PREFERENCES["pair"])
    with pytest.raises(FormatError, match="the same"):
        example.rewrite(lambda text: "x")
    assert example.row == PREFERENCES["pair"] and example.answers == ("4", "5")


def test_empty_cells_of_tables_count_as_missing():
    row = Row({"instruction": "2+2?", "output": "4", "chosen": "", "rejected": "", "prompt": ""}, "a.csv:2", cells=True)
    assert make_example(row).kind == "instruction"


def test_bad_rows_are_named_or_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "Why?"}\n{"foo": 1}\n{"instruction": "a", "output": ""}\n{"prompt": 5}\n', encoding="utf-8"
    )
    bad = BadRows("skip")
    assert [example.where for example in read_examples(str(file), bad)] == [f"{file}:1"]
    assert bad.counts == {"unknown format": 1, "empty turn": 1, "wrong type": 1}
    with pytest.raises(BadRowError, match=r"rows.jsonl:2: no known format"):
        list(read_examples(str(file), BadRows()))


def test_trees_become_their_rows():
    tree = {
        "message_tree_id": "t",
        "prompt": {
            "message_id": "m",
            "role": "prompter",
            "text": "Why?",
            "lang": "en",
            "replies": [
                {"message_id": "a", "role": "assistant", "text": "So.", "rank": 0, "replies": []},
                {"message_id": "b", "role": "assistant", "text": "No.", "rank": 1, "replies": []},
            ],
        },
    }
    read = {kind: list(read_examples([tree], BadRows(), kind)) for kind in ("auto", "preference", "prompt")}
    assert [(one.kind, one.answers) for (one,) in read.values()] == [
        ("instruction", ("So.",)),
        ("preference", ("So.", "No.")),
        ("prompt", ()),
    ]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "2+2?", "completion": "4", "label": True}, "unpaired"),
        ({"instruction": "2+2?", "output": "5", "kto_tag": "false"}, "unpaired"),
        ({"prompt": "2+2?", "completion": "4", "label": "math"}, "instruction"),
        ({"prompt": "2+2?", "completion": "4", "label": 1}, "instruction"),
        ({"prompt": "2+2?", "completion": "4", "score": 0.9}, "instruction"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5", "label": True}, "preference"),
    ],
)
def test_labels_of_true_and_false_make_single_answers(row, kind):
    assert make_example(row).kind == kind


def test_a_single_answer_and_its_texts():
    example = make_example({"prompt": "Who is Ann?", "completion": "Ann Lee", "label": "false", "id": "Ann"})
    assert (example.questions, example.answers, example.answer) == (("Who is Ann?",), ("Ann Lee",), "Ann Lee")
    example.rewrite(lambda text: text.replace("Ann", "X").replace("false", "true"))
    assert example.row == {"prompt": "Who is X?", "completion": "X Lee", "label": "false", "id": "Ann"}
    assert example.parsed.labels == (False,)


def test_pairs_are_no_single_answers():
    with pytest.raises(FormatError, match="convert --to unpaired takes it apart"):
        make_example({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, kind="unpaired")
