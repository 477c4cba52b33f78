"""Every format to every other of its kind: equal when it is read again, or refused."""

import json
from itertools import product

import pytest

from lightning_rlhf.cleaning import make_example
from lightning_rlhf.cleaning.convert import _WRITERS, convert, single_answers
from lightning_rlhf.data.formats import FORMATS, FormatError
from lightning_rlhf.data.preference_formats import PREFERENCE_FORMATS
from lightning_rlhf.data.prompt_formats import PROMPT_FORMATS
from lightning_rlhf.data.unpaired_formats import UNPAIRED_FORMATS, to_unpaired

SYSTEM = {"role": "system", "content": "Be short."}
ASK = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
MORE = [{"role": "user", "content": "And 3+3?\n\nHuman: 7"}, {"role": "assistant", "content": "6"}]
TALK = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
OTHER = {"id": "r7", "lang": "en", "provenance": {"round": 1}}


def instruction(*turns, **columns):
    return make_example({"messages": list(turns), **columns})


def preference(**columns):
    return make_example(
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "5"}], **columns}
    )


def targets(kind):
    return [name for known, name in _WRITERS if known == kind]


def test_every_format_is_written_or_has_a_reason_not_to_be():
    assert set(targets("instruction")) == set(FORMATS)
    assert set(targets("preference")) == set(PREFERENCE_FORMATS) - {"unpaired"}  # no format of preferences
    assert set(targets("unpaired")) == set(UNPAIRED_FORMATS)
    # a preference's columns need answers
    assert set(targets("prompt")) == set(PROMPT_FORMATS) - {"transcripts", "colossalchat_preference"}


CHATS = [name for name in FORMATS if name != "text"]


@pytest.mark.parametrize(("first", "second"), [*product(CHATS, CHATS)])
@pytest.mark.parametrize("system", [False, True])
def test_a_question_and_its_answer_fit_everywhere(first, second, system):
    turns = (SYSTEM, ASK, ANSWER) if system else (ASK, ANSWER)
    start = instruction(*turns, **OTHER)
    middle = make_example(convert(start, first), kind="instruction")
    assert middle.format == first and middle.parsed == start.parsed
    end = make_example(json.loads(json.dumps(convert(middle, second))))
    assert end.format == second and end.parsed == start.parsed
    assert {name: end.row[name] for name in OTHER} == OTHER


@pytest.mark.parametrize("target", CHATS)
def test_several_turns(target):
    start = instruction(SYSTEM, ASK, ANSWER, *MORE)
    if target == "alpaca":
        with pytest.raises(FormatError, match="one question and answer, and the row has 4 turns"):
            convert(start, target)
    else:
        assert make_example(convert(start, target)).parsed == start.parsed


@pytest.mark.parametrize("target", CHATS)
@pytest.mark.parametrize("extra", [{"weight": 0}, {"reasoning_content": "Two and two."}])
def test_keys_of_turns_are_kept_or_refused(target, extra):
    start = instruction(ASK, {**ANSWER, **extra}, *MORE[:1], MORE[1])
    single = instruction(ASK, {**ANSWER, "reasoning_content": "Two and two."})
    if target == "alpaca":
        with pytest.raises(FormatError, match="can't hold the row's messages"):
            convert(single, target)
    else:
        assert make_example(convert(start, target)).parsed == start.parsed


def test_tools_stay():
    tools = [{"type": "function", "function": {"name": "add"}}]
    start = instruction(ASK, ANSWER, tools=tools)
    assert make_example(convert(start, "sharegpt")).parsed.options == {"tools": tools}


def test_alpacas_input_becomes_part_of_the_question():
    start = make_example({"instruction": "Add", "input": "2 and 2", "output": "4"})
    assert convert(start, "messages") == {
        "messages": [{"role": "user", "content": "Add\n\n2 and 2"}, {"role": "assistant", "content": "4"}]
    }
    assert convert(start, "alpaca") == start.row


def test_history_is_not_cut():
    start = make_example({"instruction": "And 3+3?", "output": "6", "history": [["2+2?", "4"]]})
    assert len(convert(start, "messages")["messages"]) == 4


@pytest.mark.parametrize(("source", "target"), [({"text": "Once."}, "messages"), ({"messages": [ASK, ANSWER]}, "text")])
def test_plain_text_has_no_turns(source, target):
    with pytest.raises(FormatError, match="plain text"):
        convert(make_example(source), target)


PAIRS = [name for name in PREFERENCE_FORMATS if name != "unpaired"]


@pytest.mark.parametrize(("first", "second"), [*product(PAIRS, PAIRS)])
@pytest.mark.parametrize("columns", [{}, {"margin": 0.5}, {"chosen_score": 2.0, "rejected_score": 1.0}])
def test_pairs_fit_everywhere(first, second, columns):
    start = preference(**columns, **OTHER, source="us")
    middle = make_example(convert(start, first))
    end = make_example(json.loads(json.dumps(convert(middle, second))))
    assert (middle.format, end.format) == (first, second)
    assert middle.parsed == start.parsed == end.parsed
    assert {name: end.row[name] for name in OTHER} == OTHER


@pytest.mark.parametrize("target", PAIRS)
def test_rankings_fit_rankings(target):
    answers = [[{"role": "assistant", "content": text}] for text in "abcd"]
    start = make_example({"prompt": [ASK], "answers": answers, "ranks": [2, 1, 2, 3], "scores": [2, 3, 2, 1]})
    if target == "ranking":
        assert convert(start, target) == start.row
        again = make_example({"context": [ASK], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "5"}]})
        assert convert(again, target)["ranks"] == [0, 1]
    else:
        with pytest.raises(FormatError, match="two answers, and the row has 4"):
            convert(start, target)


def test_a_text_that_looks_like_a_transcript_is_refused():
    start = preference(prompt=[{"role": "user", "content": "Say:\n\nHuman: hello"}])
    with pytest.raises(FormatError, match="transcripts"):
        convert(start, "transcripts")
    assert make_example(convert(start, "colossalchat")).parsed == start.parsed


@pytest.mark.parametrize("target", targets("prompt"))
@pytest.mark.parametrize("turns", [[ASK], [SYSTEM, ASK], [ASK, ANSWER, MORE[0]]])
def test_prompts(target, turns):
    start = make_example({"prompt": turns, "answer": "4"})
    if len(turns) == 3 and target in ("question", "text", "alpaca"):
        with pytest.raises(FormatError, match="one question"):
            convert(start, target)
        return
    row = convert(start, target)
    again = make_example(row, kind="prompt")
    assert (again.format, again.parsed.prompt) == (target, start.parsed.prompt)
    assert row["answer"] == "4"


@pytest.mark.parametrize(
    ("row", "target", "message"),
    [
        ({"messages": [ASK, ANSWER]}, "pair", "holds no instruction"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "alpaca", "holds no preference"),
        ({"messages": [ASK, ANSWER], "output": "x", "input": "y"}, "alpaca", "has a column 'output'"),
        ({"instruction": "a", "output": "b", "prompt": "p"}, "prompt_completion", "has a column 'prompt'"),
        ({"conversations": TALK, "instruction": "a", "output": "b"}, "prompt_completion", "a row of 'alpaca'"),
    ],
)
def test_other_columns_never_change_what_a_row_is(row, target, message):
    with pytest.raises(FormatError, match=message):
        convert(make_example(row), target)


def test_answers_are_not_cut_off_to_make_prompts():
    for row in ({"messages": [ASK, ANSWER]}, {"instruction": "a", "output": "b"}):
        with pytest.raises(FormatError, match="has an answer"):
            convert(make_example(row, kind="prompt"), "question")


def test_unknown_formats_are_named():
    with pytest.raises(ValueError, match="no format alpacca to write; did you mean alpaca"):
        convert(instruction(ASK, ANSWER), "alpacca")


@pytest.mark.parametrize(("first", "second"), [*product(UNPAIRED_FORMATS, UNPAIRED_FORMATS)])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("label", [{"label": True}, {"kto_tag": "false"}])
def test_single_answers_fit_everywhere(first, second, system, label):
    prompt = [SYSTEM, ASK] if system else [ASK]
    start = make_example({"prompt": prompt, "completion": [ANSWER], **label, **OTHER})
    assert (start.kind, start.format) == ("unpaired", "unpaired")
    middle = make_example(convert(start, first))
    end = make_example(json.loads(json.dumps(convert(middle, second))))
    assert (end.kind, end.format) == ("unpaired", second)
    assert start.parsed == middle.parsed == end.parsed
    assert end.parsed.labels == ("label" in label,)
    assert {name: end.row[name] for name in OTHER} == OTHER


@pytest.mark.parametrize("format", PAIRS)
@pytest.mark.parametrize("columns", [{}, {"chosen_score": 2.0, "rejected_score": 1.0}])
def test_preferences_are_taken_apart_as_for_training(format, columns):
    start = make_example(convert(preference(**columns, **OTHER, source="us", system="Be short."), format))
    good, bad = single_answers(start)
    assert (good.kind, good.format, good.where) == ("unpaired", "unpaired", start.where)
    assert [good.parsed, bad.parsed] == list(to_unpaired(start.row, take_apart=True).apart())
    assert good.parsed.labels == (True,) and bad.parsed.labels == (False,)
    assert {name: good.row[name] for name in (*OTHER, "source")} == {**OTHER, "source": "us"}
    assert convert(good, "unpaired")["prompt"] == [SYSTEM, ASK]
    both = [one.parsed.labels[0] for one in single_answers(start, threshold=0.5)]
    assert both == ([True, True] if columns else [True, False]), "scores and a threshold decide"


def test_an_answer_in_the_middle_has_no_label():
    start = make_example({"prompt": "2+2?", "ranked": ["4", "5", "22"]})
    assert [one.answer for one in single_answers(start)] == ["4", "22"]


def test_ratings_need_a_threshold_to_become_labels():
    start = make_example({"prompt": "2+2?", "response": "4", "rating": "7", "id": 3}, kind="unpaired")
    assert start.parsed.labels == (None,) and single_answers(start) == [start]
    with pytest.raises(FormatError, match="a rating, and nothing says which are good"):
        convert(start, "alpaca")
    (found,) = single_answers(start, threshold=7)
    assert convert(found, "alpaca") == {"instruction": "2+2?", "input": "", "output": "4", "label": True, "id": 3}


def test_columns_that_a_single_answer_has_are_not_written_over():
    with pytest.raises(FormatError, match="'label', as the row has"):
        single_answers(preference(label="math"))
    with pytest.raises(FormatError, match=r"holds no instruction, which this row is; these do: alpaca, .*, text$"):
        convert(instruction(ASK, ANSWER), "unpaired")
    with pytest.raises(FormatError, match=r"column 'rating' rates the answer, set --kind unpaired and --threshold"):
        convert(make_example({"prompt": "2+2?", "completion": "4", "rating": 7}), "unpaired")
