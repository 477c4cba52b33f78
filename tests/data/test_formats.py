"""Rows of every format, Chinese and English, recognized and named; and every way in which a row can be unfit."""

import itertools
import json
import pickle
import string
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlhf.data.formats import FORMATS, ROLES, Conversation, FormatError, check_conversation, to_conversation
from lightning_rlhf.data.sources import BadRowError, BadRows, read_rows


def turns(*pairs: tuple[str, str]) -> tuple[dict, ...]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return tuple({"role": roles[role], "content": content} for role, content in pairs)


EN = turns(("u", "Name a colour."), ("a", "Red 🟥."))
ZH = turns(("u", "说出一种颜色。"), ("a", "红色。"))
EN_LONG = turns(("s", "Be brief."), ("u", "Hi"), ("a", "Hello!"), ("u", "Name a colour.\n\nA warm one"), ("a", "Red"))
ZH_LONG = turns(("s", "请简短。"), ("u", "你好"), ("a", "您好！"), ("u", "说出一种颜色。\n\n暖色"), ("a", "红"))


def in_format(name: str, messages: tuple[dict, ...]) -> dict:
    """A row of the format that stands for the messages."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    rest = messages[1:] if system else messages
    if name == "messages":
        return {"messages": [dict(message) for message in messages]}
    if name == "colossalchat":
        names = {"system": "system", "user": "human", "assistant": "assistant"}
        return {"messages": [{"from": names[m["role"]], "content": m["content"]} for m in messages]}
    if name == "sharegpt":
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages], "id": "x_0"}
    if name == "alpaca":
        texts = [message["content"] for message in rest]
        instruction, _, more = texts[-2].partition("\n\n")
        row = {"instruction": instruction, "input": more, "output": texts[-1], "system": system, "text": "unused"}
        return row | {"history": [texts[i : i + 2] for i in range(0, len(texts) - 2, 2)]}
    assert name == "prompt_completion"
    return {"prompt": [dict(message) for message in messages[:-1]], "completion": messages[-1]["content"]}


# Formats


@pytest.mark.parametrize("messages", [EN, ZH, EN_LONG, ZH_LONG])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "text"])
def test_conversation_formats(name, messages):
    row = in_format(name, messages)
    before = json.dumps(row)
    expected = Conversation(messages=messages)
    assert to_conversation(row) == to_conversation(row, format=name) == expected
    assert FORMATS.detect(row).name == name
    assert expected.first_user_turn == next(m["content"] for m in messages if m["role"] == "user")
    assert json.dumps(row) == before


@pytest.mark.parametrize("text", ["Once upon a time\n", "  从前有座山 🏔"])
@pytest.mark.parametrize("name", ["auto", "text"])
def test_text(name, text):
    conversation = to_conversation({"text": text, "messages": None}, name, system="Be brief.")
    assert conversation == Conversation(text=text) and conversation.first_user_turn == text


@pytest.mark.parametrize("name", ["auto", "prompt_completion"])
def test_prompt_and_completion_are_strings_or_messages(name):
    prompt, completion = "说出一种颜色。", "红色。"
    for p in (prompt, [{"role": "user", "content": prompt}]):
        for c in (completion, [{"role": "assistant", "content": completion}]):
            assert to_conversation({"prompt": p, "completion": c}, name).messages == ZH


def test_prompt_may_lack_a_user_turn():
    row = {"prompt": [{"role": "system", "content": "s"}], "completion": "a"}
    conversation = to_conversation(row)
    assert conversation.messages == turns(("s", "s"), ("a", "a"))
    assert conversation.first_user_turn == "a"  # the system prompt would put all rows into one half of a split


@pytest.mark.parametrize("more", [None, "", "  \n"])
def test_alpaca_without_input(more):
    row = {"instruction": "Name a colour.", "output": "Red 🟥."}
    assert to_conversation(row).messages == to_conversation(row | {"input": more, "history": None}).messages == EN


def test_alpaca_with_only_an_input():
    assert to_conversation({"instruction": "", "input": "Name a colour.", "output": "Red 🟥."}).messages == EN


@pytest.mark.parametrize(("name", "role"), [*ROLES.items(), ("Human", "user"), (" GPT ", "assistant")])
def test_role_names(name, role):
    rows = {"system": ["?", "human", "gpt"], "user": ["system", "?", "gpt"], "assistant": ["system", "human", "?"]}
    row = {"conversations": [{"from": other.replace("?", name), "value": "x"} for other in rows[role]]}
    assert [message["role"] for message in to_conversation(row).messages] == ["system", "user", "assistant"]


def test_content_as_text_parts():
    parts = [{"type": "text", "text": "说出"}, {"type": "text", "text": "一种颜色。", "image": None}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "红色。"}]}
    assert to_conversation(row).messages == ZH


def test_recognition_order():
    both = in_format("messages", EN) | {
        "text": "x",
        "instruction": "i",
        "output": "o",
        "prompt": "p",
        "completion": "c",
    }
    assert to_conversation(both).messages == EN
    assert to_conversation(both, "alpaca").messages == turns(("u", "i"), ("a", "o"))
    assert to_conversation(both, "text").text == "x"
    assert to_conversation(both | {"messages": None}).messages == turns(("u", "i"), ("a", "o"))


# System prompts


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "text"])
def test_system_column_and_default(name):
    row = in_format(name, ZH)
    with_system = (*turns(("s", "甲")), *ZH)
    assert to_conversation(row, system="甲").messages == with_system
    assert to_conversation(row | {"system": "甲"}, system="乙").messages == with_system
    for empty in (None, "", " "):  # as CSV writes a cell that isn't filled
        assert to_conversation(row | {"system": empty}).messages == ZH
        assert to_conversation(row | {"system": empty}, system="甲").messages == with_system


def test_a_system_turn_stays():
    for content in ("Be brief.", ""):
        row = {"messages": list(turns(("s", content), *[(m["role"][0], m["content"]) for m in EN]))}
        assert to_conversation(row, system="default").messages[0] == {"role": "system", "content": content}
    assert to_conversation({"messages": list(EN)}, system="").messages == (*turns(("s", "")), *EN)


def test_two_system_prompts():
    row = {"messages": list(EN_LONG), "system": "Be brief."}
    assert to_conversation(row).messages == EN_LONG
    with pytest.raises(FormatError, match="'system' and the system turn differ") as caught:
        to_conversation(row | {"system": "Be long."})
    assert caught.value.kind == "two system prompts"


# Rows that aren't conversations


def chat(*pairs: tuple[str, object]) -> dict:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": names.get(role, role), "content": content} for role, content in pairs]}


UNFIT = [
    # kind, what the message names, row
    (
        "unknown format",
        r"row: 'frage', 'antwort'\. .*alpaca: 'instruction', 'output' or",
        {"frage": "a", "antwort": "b"},
    ),
    ("unknown format", "this row: none that is filled", {"text": None}),
    ("unknown format", "'instruction'", {"instruction": "a", "output": None}),
    ("no messages", "no turns", {"messages": []}),
    ("no messages", "no turns", {"conversations": []}),
    ("wrong type", r"the column 'messages' is a str\. Make it a list of \{role", {"messages": "[]"}),
    ("wrong type", "the column 'conversations' is a dict", {"conversations": {"from": [], "value": []}}),
    ("wrong type", "turn 2 of 'messages' is a str", {"messages": [{"role": "user", "content": "a"}, "b"]}),
    ("wrong type", "turn 2 of 'messages' lacks 'content', it has 'role'", chat(("u", "a"), ("a", None))),
    ("wrong type", "'content' in turn 1 of 'messages' is a int", chat(("u", 5), ("a", "b"))),
    ("wrong type", "'role' in turn 1 of 'messages' is a int", {"messages": [{"role": 1, "content": "a"}]}),
    (
        "wrong type",
        "turn 2 of 'messages' lacks 'from'",
        {"messages": [{"role": "user", "content": "a"}, {"value": "b"}]},
    ),
    ("wrong type", "part 2 of 'content' in turn 1", chat(("u", [{"type": "text", "text": "a"}, {"type": "image"}]))),
    ("wrong type", "part 1 of 'content' in turn 1", chat(("u", ["a"]), ("a", "b"))),
    ("wrong type", "the column 'output' is a int", {"instruction": "a", "output": 1}),
    ("wrong type", "the column 'input' is a dict", {"instruction": "a", "input": {}, "output": "b"}),
    ("wrong type", "the column 'history' is a str", {"instruction": "a", "output": "b", "history": "c"}),
    ("wrong type", "entry 2 of 'history'", {"instruction": "a", "output": "b", "history": [["c", "d"], ["e"]]}),
    ("wrong type", "entry 1 of 'history' is a NoneType", {"instruction": "a", "output": "b", "history": [["c", None]]}),
    ("wrong type", "the column 'prompt' lacks 'content'", {"prompt": {"role": "user"}, "completion": "b"}),
    ("wrong type", "turn 1 of 'completion' lacks 'role'", {"prompt": "a", "completion": [{"content": "b"}]}),
    ("wrong type", "the column 'text' is a int", {"text": 5}),
    ("wrong type", "the column 'system' is a int", chat(("u", "a"), ("a", "b")) | {"system": 5}),
    ("unknown role", r"turn 1 of 'messages' has the role 'tool'\. Known roles are system", chat(("tool", "a"))),
    ("unknown role", "turn 2 of 'messages' has the role ''", chat(("u", "a"), ("", "b"))),
    ("empty turn", r"turn 2 \(assistant\) is empty", chat(("u", "a"), ("a", ""))),
    ("empty turn", r"turn 3 \(user\) is empty", chat(("s", "x"), ("u", "a"), ("u", " \n\t\u3000"))),
    ("empty turn", r"turn 1 \(user\) is empty", {"instruction": " ", "input": "", "output": "b"}),
    ("empty turn", r"turn 2 \(assistant\) is empty", {"prompt": "a", "completion": ""}),
    ("empty turn", r"turn 2 \(assistant\)", {"instruction": "a", "output": "b", "history": [["c", ""]]}),
    ("empty text", "'text' is empty", {"text": " \n"}),
    ("no assistant turn", "no turn is the assistant's", chat(("u", "a"))),
    ("no assistant turn", "no turn is the assistant's", chat(("s", "a"))),
    (
        "roles out of order",
        r"turn 2 \(user\) follows a turn of the same role",
        chat(("u", "a"), ("u", "b"), ("a", "c")),
    ),
    ("roles out of order", r"turn 3 \(assistant\) follows", chat(("u", "a"), ("a", "b"), ("a", "c"))),
    ("roles out of order", r"turn 1 \(assistant\) answers no user turn", chat(("a", "b"), ("u", "a"), ("a", "c"))),
    ("roles out of order", r"turn 2 \(assistant\) answers no user turn", chat(("s", "b"), ("a", "c"))),
    ("roles out of order", r"turn 3 \(system\) is not the first", chat(("u", "a"), ("a", "b"), ("s", "c"))),
    ("roles out of order", r"turn 2 \(system\) is not the first", chat(("s", "a"), ("s", "b"), ("u", "c"), ("a", "d"))),
    ("last turn not assistant", r"turn 3 \(user\) is the last", chat(("u", "a"), ("a", "b"), ("u", "c"))),
    ("broken character", "character 3 of 'content' in turn 2", chat(("u", "a"), ("a", json.loads('"ok\\ud83d"')))),
    ("broken character", "character 1 of the column 'text'", {"text": "\udcff"}),
    (
        "tool call",
        "turn 2 of 'messages' has 'tool_calls'",
        {
            "messages": [
                *chat(("u", "a"))["messages"],
                {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
            ]
        },
    ),
]


@pytest.mark.parametrize(("kind", "message", "row"), UNFIT, ids=[f"{kind}-{i}" for i, (kind, *_) in enumerate(UNFIT)])
def test_unfit_rows(kind, message, row):
    with pytest.raises(FormatError, match=message) as caught:
        to_conversation(row, system="A default prompt shifts no turn's number.")
    assert caught.value.kind == kind
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.kind) == (str(caught.value), kind)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "alpaca",
            {"instruction": "a", "output": None},
            "'alpaca' needs the column 'output' or 'response', and the row has 'instruction'",
        ),
        ("text", {"messages": []}, "'text' needs the column 'text', and the row has 'messages'"),
        ("sharegpt", {}, "needs the column 'conversations', and the row has none"),
        ("prompt_completion", {"text": "a"}, "needs the column 'prompt', 'completion'"),
    ],
)
def test_named_format_that_does_not_fit(name, row, message):
    with pytest.raises(FormatError, match=message) as caught:
        to_conversation(row, name)
    assert caught.value.kind == "missing column"


def test_every_column_takes_turns_of_either_spelling():
    spelled = [[{who: role, what: text} for role, text in (("user", "a"), ("assistant", "b"))]
             for who in ("role", "from") for what in ("content", "value")]  # fmt: skip
    want = Conversation(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    for turns in spelled:
        for row in ({"messages": turns}, {"conversations": turns}, {"prompt": turns[:1], "completion": turns[1]}):
            assert to_conversation(row) == want
    mixed = [spelled[0][0], spelled[3][1]]
    assert to_conversation({"messages": mixed}) == to_conversation({"messages": mixed}, "messages") == want


def test_unknown_format_name_is_no_fault_of_a_row():
    with pytest.raises(ValueError, match=r"'alpacka' is not known.*'auto'.*alpaca, prompt_completion, text") as caught:
        to_conversation({"text": "a"}, "alpacka")
    assert not isinstance(caught.value, FormatError)  # else a policy that skips rows would skip them all


def test_conversation_is_messages_or_text():
    for given_ in ({}, {"messages": EN, "text": "a"}):
        with pytest.raises(ValueError, match="either messages or text"):
            Conversation(**given_)


# Together with the sources


def load(path: str, policy: str) -> tuple[list[Conversation], BadRows]:
    bad, conversations = BadRows(policy), []
    for row in read_rows(path, bad):
        try:
            conversations.append(to_conversation(row.value))
        except FormatError as error:
            bad.add(row.where, error.kind, str(error))
    return conversations, bad


def test_unfit_rows_of_a_file_are_placed_and_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for _, _, row in [("", "", chat(("u", "a"), ("a", "b"))), *UNFIT])
    )
    conversations, bad = load("my.jsonl", "skip")
    assert len(conversations) == 1 and bad.total == len(UNFIT)
    assert bad.counts == {kind: sum(kind == other for other, *_ in UNFIT) for kind, *_ in UNFIT}
    with pytest.warns(
        UserWarning, match=r"4\d of 4\d rows of my.jsonl were skipped: .*wrong type \(first: my.jsonl:7: the col"
    ):
        bad.report(len(UNFIT) + 1, "my.jsonl")
    with pytest.raises(BadRowError, match=r"^my\.jsonl:2: no known format") as caught:
        load("my.jsonl", "raise")
    assert caught.value.kind == "unknown format"


def test_columns_filled_up_with_none(tmp_path):
    """Parquet and Arrow give each row the columns, and each turn the keys, of all others."""
    rows = [in_format(name, ZH_LONG) for name in ("messages", "colossalchat", "sharegpt", "alpaca")]
    rows.append({"prompt": "说出一种颜色。", "completion": "红色。", "system": "请简短。"})
    keys = {key: None for row in rows for key in row}
    for i, row in enumerate(rows):
        for turn in row.get("messages", []):
            turn.update({key: turn.get(key) for key in ("role", "from", "content")})
        rows[i] = keys | row
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = [ZH_LONG] * 4 + [(ZH_LONG[0], *ZH)]
    assert [c.messages for c in load(tmp_path / "rows.parquet", "raise")[0]] == expected
    assert [c.messages for c in load(datasets.Dataset.from_list(rows), "raise")[0]] == expected


def test_csv_rows(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text(
        'instruction,input,output,system\n"说出一种\n颜色。",,红色。,\nHi,there,"a ""b""",s\n,,x,\n', encoding="utf-8"
    )
    conversations, bad = load(path, "skip")
    assert [c.messages for c in conversations] == [
        turns(("u", "说出一种\n颜色。"), ("a", "红色。")),
        turns(("s", "s"), ("u", "Hi\n\nthere"), ("a", 'a "b"')),
    ]
    assert bad.counts == {"empty turn": 1}
    with pytest.raises(BadRowError, match=r"my\.csv:5: turn 1 \(user\) is empty"):
        load(path, "raise")


# Any row at all

WORDS = st.sampled_from([*FORMATS, *ROLES, "a", "", " ", "你", "\ud800", "type", "tool_calls"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(string.printable, max_size=3)
KEYS = st.sampled_from(
    ["messages", "conversations", "instruction", "input", "output", "system", "history", "prompt", "completion", "text"]
)
TURN_KEYS = st.sampled_from(["role", "from", "content", "value", "type", "text", "tool_calls"])
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TURN_KEYS | WORDS, inner, max_size=3),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {}, optional={"role": WORDS, "from": WORDS, "content": WORDS | NESTED, "value": WORDS | NESTED}
)
ROW = st.dictionaries(KEYS | WORDS, WORDS | NESTED | st.lists(TURN | NESTED, max_size=4), max_size=5)


@st.composite
def nearly_fit(draw) -> dict:
    """A good row in which up to two values, at any depth, were replaced or removed."""
    name = draw(st.sampled_from([name for name in FORMATS if name != "text"]))
    row = json.loads(json.dumps(in_format(name, draw(st.sampled_from([EN, ZH, EN_LONG, ZH_LONG])))))
    for _ in range(draw(st.integers(0, 2))):
        spot = row
        key = draw(st.sampled_from(sorted(spot)))
        while isinstance(spot[key], (dict, list)) and spot[key] and draw(st.booleans()):
            spot = spot[key]
            key = draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
        if draw(st.booleans()):
            spot[key] = draw(WORDS | NESTED)
        elif len(spot) > 1:
            del spot[key]
    return row


@settings(derandomize=True, database=None, deadline=None, max_examples=500)
@given(nearly_fit() | ROW, st.just("auto") | st.sampled_from(["auto", *FORMATS]), st.none() | WORDS)
def test_any_row_is_a_fit_conversation_or_a_format_error(row, name, system):
    try:
        conversation = to_conversation(row, name, system)
    except FormatError as error:
        assert error.kind and str(error)
        return
    assert isinstance(conversation.first_user_turn, str) and conversation.first_user_turn.strip()
    if conversation.text is not None:
        assert conversation.messages is None and conversation.text.strip() and conversation.text.encode()
        return
    messages = conversation.messages
    check_conversation(messages, user_first=False)
    roles = [message["role"] for message in messages]
    assert roles[-1] == "assistant" and "system" not in roles[1:]
    assert all(a != b for a, b in itertools.pairwise(roles))
    assert all(set(message) == {"role", "content"} and isinstance(message["content"], str) for message in messages)
    assert all(message["content"].strip() for message in messages if message["role"] != "system")


# What other trainers give a meaning

ASKED = chat(("u", "a"), ("a", "b"))


def turn(**keys) -> dict:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **keys}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        *((ASKED | {name: ["a.jpg"]}, f"the row has '{name}'") for name in ("images", "audio", "videos", "image")),
        (turn(images=["a.jpg"]), "turn 2 of 'messages' has 'images'. Training takes text only"),
        (turn(tool_calls=[{}]), "turn 2 of 'messages' has 'tool_calls'"),
        (turn(weight=0.5), "turn 2 of 'messages' has the weight 0.5.*Make it 1 or 0"),
        (turn(weight=0, train=True), "'weight', 'train', which differ"),
        (turn(train_detail=[{}]), "turn 2 of 'messages' has 'train_detail'"),
        (ASKED | {"functions": [{}]}, "the row has 'functions'. Write the functions as 'tools'"),
        (ASKED | {"completion_mask": [1]}, "the row has 'completion_mask'"),
        (ASKED | {"loss_mask": [0, 1]}, "the row has 'loss_mask'"),
        (ASKED | {"weight": 0.3}, "the column 'weight' is 0.3"),
        (ASKED | {"train": False}, "the column 'train' is False"),
        (ASKED | {"label": False}, "the column 'label' says that this answer is bad"),
        (ASKED | {"kto_tag": "false"}, "the column 'kto_tag' says"),
        (ASKED | {"tools": "search"}, "the column 'tools' is a str"),
        (ASKED | {"tools": ["search"]}, "tool 1 is a str"),
        (ASKED | {"system": "a", "system_prompt": "b"}, "'system', 'system_prompt' differ"),
        ({"role": "user", "content": "a"}, "put all turns of a conversation into a list 'messages'"),
    ],
)
def test_what_cant_be_done_is_refused_by_name(row, message):
    with pytest.raises(FormatError, match=message):
        to_conversation(row)


def test_keys_of_other_trainers_are_honored():
    tools = [{"type": "function", "function": {"name": "f", "strict": None}}]
    plain = [{"type": "function", "function": {"name": "f"}}]
    for spelled in (tools, json.dumps(plain)):
        row = turn(weight=0.0, reasoning_content="so", name=None) | {"tools": spelled, "system_prompt": "Be brief."}
        made = to_conversation(row, system="other")
        assert [m["role"] for m in made.messages] == ["system", "user", "assistant"]
        assert made.messages[0]["content"] == "Be brief."
        assert made.messages[2] == {"role": "assistant", "content": "b", "weight": 0, "reasoning_content": "so"}
        assert made.options == {"tools": plain} and made.unread == ()
    for keys in ({"train": False}, {"weight": "0"}, {"loss": 0}):
        assert to_conversation(turn(**keys)).messages[1]["weight"] == 0
    asked = ASKED | {"chat_template_kwargs": {"enable_thinking": False, "x": None}, "tools": []}
    assert to_conversation(asked).options == {"enable_thinking": False}
    for nothing in (None, [], "[]", "{}", "null", "", " "):  # as tables of texts spell it
        assert to_conversation(ASKED | {"tools": nothing, "chat_template_kwargs": nothing}).options == {}


def test_passages_of_dolly_belong_to_the_question():
    row = {"instruction": "Who?", "context": "By Ann.", "response": "Ann", "category": "qa"}
    made = to_conversation(row)
    assert [m["content"] for m in made.messages] == ["Who?\n\nBy Ann.", "Ann"] and made.unread == ("category",)
    assert [m["content"] for m in to_conversation(row | {"context": ""}).messages] == ["Who?", "Ann"]


def test_unread_keys_are_noted():
    row = ASKED | {
        "id": 3,
        "source": None,
        "label": True,
        "weight": 1,
        "images": [],
        "lang": "en",
        "mask_history": False,
    }
    row["messages"][0]["timestamp"] = 5
    assert to_conversation(row).unread == ("id", "timestamp of a turn")
    assert to_conversation({"text": "a", "system": "b", "tools": [{}]}).unread == ("system", "tools")
    assert to_conversation(ASKED | {"label": 3}).unread == ("label", "timestamp of a turn")
