"""OpenAssistant's trees, in both forms that are published: what each data module takes from them."""

import gzip
import json

import pytest

from lightning_rlhf.data.instruction import InstructionDataModule
from lightning_rlhf.data.oasst import expand_trees, instruction_rows, preference_rows, prompt_rows
from lightning_rlhf.data.packed import unpack
from lightning_rlhf.data.preference import PreferenceDataModule
from lightning_rlhf.data.prompts import PromptDataModule
from lightning_rlhf.data.sources import BadRowError, BadRows, read_rows


def message(name, role, text, rank=None, replies=(), **more):
    """A message with the columns that the published files have."""
    return {
        "message_id": name, "parent_id": None, "user_id": "u", "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": text, "role": role, "lang": "en", "review_count": 3, "review_result": True, "deleted": False,
        "rank": rank, "synthetic": False, "model_name": None, "emojis": {"+1": 2},
        "labels": {"spam": {"value": 0.0, "count": 3}, "quality": {"value": 0.75, "count": 2}},
        "replies": list(replies), **more,
    }  # fmt: skip


TREE = message("p", "prompter", "Capital of France?", replies=[
    message("a1", "assistant", "Lyon.", rank=1, replies=[
        message("p2", "prompter", "Really?", replies=[message("a4", "assistant", "No, Paris.")]),
    ]),
    message("a0", "assistant", "Paris.", rank=0, replies=[
        message("p3", "prompter", "And of Spain?", rank=1),
        message("p4", "prompter", "And of Italy?", rank=0, replies=[
            message("a5", "assistant", "Milan.", rank=1),
            message("a6", "assistant", "Rome.", rank=0, replies=[message("p5", "prompter", "Thank you!")]),
            message("a7", "assistant", "Buy now!", rank=2, review_result=False),
        ]),
    ]),
    message("a2", "assistant", "I don't know.", rank=2),
    message("a3", "assistant", "Nothing", deleted=True),
])  # fmt: skip
OTHER = message("q", "prompter", "你好", lang="zh", replies=[message("b", "assistant", "您好！")])
LONELY = message("r", "prompter", "Is anyone here?")


def flat(root, tree_id):
    """A tree's messages as a file of messages has them."""
    found, waiting = [], [(root, None)]
    while waiting:
        node, parent = waiting.pop()
        replies = node["replies"]
        found.append({**{k: v for k, v in node.items() if k != "replies"}, "parent_id": parent,
                      "message_tree_id": tree_id, "tree_state": "ready_for_export"})  # fmt: skip
        waiting += [(reply, node["message_id"]) for reply in reversed(replies)]
    return found


def tree(root):
    return {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root}


def write(path, rows):
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def given(path, form, *roots):
    return write(
        path, [tree(r) for r in roots] if form == "trees" else [m for r in roots for m in flat(r, r["message_id"])]
    )


FORMS = pytest.mark.parametrize("form", ["trees", "messages"])


def expanded(path, make, policy="skip", format="auto"):
    bad = BadRows(policy)
    rows = list(expand_trees(read_rows(path, bad), make, bad, format))
    return [row.value for row in rows], [row.where for row in rows], bad


@FORMS
def test_the_conversation_follows_the_best_replies(form, tmp_path):
    path = given(tmp_path / "x.jsonl.gz", form, TREE, OTHER)
    rows, places, bad = expanded(path, instruction_rows)
    assert [[m["content"] for m in row["messages"]] for row in rows] == [
        ["Capital of France?", "Paris.", "And of Italy?", "Rome."],  # 'Thank you!' waits for an answer
        ["你好", "您好！"],
    ]
    assert [m["role"] for m in rows[0]["messages"]] == ["prompter", "assistant"] * 2
    assert [row["lang"] for row in rows] == ["en", "zh"] and not bad.counts
    second = 2 if form == "trees" else 1 + len(flat(TREE, "p"))
    assert places == [f"{path}:1 (message a6)", f"{path}:{second} (message b)"]


@FORMS
def test_a_tree_gives_a_ranking_for_every_message_with_ranked_replies(form, tmp_path):
    path = given(tmp_path / "x.jsonl", form, TREE)
    rows, places, _ = expanded(path, preference_rows)
    assert [[m["content"] for m in row["prompt"]] for row in rows] == [
        ["Capital of France?"],
        ["Capital of France?", "Paris.", "And of Italy?"],
    ]
    assert [[answer[0]["content"] for answer in row["answers"]] for row in rows] == [
        ["Lyon.", "Paris.", "I don't know."],  # the deleted one and the one that failed its review are left out
        ["Milan.", "Rome."],
    ]
    assert [row["ranks"] for row in rows] == [[1, 0, 2], [1, 0]]
    assert places == [f"{path}:1 (message p)", f"{path}:1 (message p4)"]


@FORMS
def test_the_first_message_is_the_prompt(form, tmp_path):
    rows, _, bad = expanded(given(tmp_path / "x.jsonl", form, TREE, LONELY), prompt_rows)
    assert [row["prompt"][0]["content"] for row in rows] == ["Capital of France?", "Is anyone here?"]
    assert [row["message_id"] for row in rows] == ["p", "r"] and not bad.counts


@FORMS
def test_trees_that_give_nothing_are_counted(form, tmp_path):
    gone = message("s", "prompter", "?", deleted=True, replies=[message("t", "assistant", "x")])
    path = given(tmp_path / "x.jsonl", form, LONELY, OTHER, gone)
    assert expanded(path, instruction_rows)[2].counts == {"no assistant turn": 1, "deleted": 1}
    assert expanded(path, preference_rows)[2].counts == {"no comparison": 2, "deleted": 1}
    assert expanded(path, prompt_rows)[2].counts == {"deleted": 1}
    with pytest.raises(BadRowError, match=r"x\.jsonl:1: no message has two ranked"):
        expanded(path, preference_rows, "raise")


def test_messages_may_stand_in_any_order_within_their_tree(tmp_path):
    path = write(tmp_path / "x.jsonl", [*flat(TREE, "p")[::-1], *flat(OTHER, "q")])
    rows, places, bad = expanded(path, instruction_rows)
    assert [row["messages"][-1]["content"] for row in rows] == ["Rome.", "您好！"] and not bad.counts
    # the replies come in another order then, which decides between equals alone
    assert places[0].endswith(f":{len(flat(TREE, 'p'))} (message a6)")


def test_messages_without_a_tree_are_counted_with_their_lines(tmp_path):
    messages = flat(TREE, "p")
    parts = [*messages[:3], *flat(OTHER, "q"), *messages[3:5]]
    circle = [{**m, "message_tree_id": "z"} for m in messages[5:7]]
    circle[0]["parent_id"], circle[1]["parent_id"] = circle[1]["message_id"], circle[0]["message_id"]
    root = {**messages[0], "message_tree_id": "y"}
    twice = [root, root, {**root, "message_id": "other"}, {**root, "message_id": "wrong", "parent_id": 5}]
    path = write(tmp_path / "x.jsonl", [*parts, *circle, *twice])
    rows, _, bad = expanded(path, prompt_rows)
    assert bad.counts == {"no parent": 4, "repeated message": 1, "second root": 1, "wrong type": 1}
    assert len(rows) == 3
    with pytest.raises(BadRowError, match=r"x\.jsonl:6: the message answers .* Sort the file by 'message_tree_id'"):
        expanded(path, prompt_rows, "raise")


def test_the_format_may_be_named_and_others_leave_trees_alone(tmp_path):
    path = write(tmp_path / "x.jsonl", [tree(TREE), {"prompt": "a", "completion": "b"}])
    rows, _, bad = expanded(path, instruction_rows, format="oasst")
    assert len(rows) == 1 and bad.counts == {"missing column": 1}
    assert len(expanded(path, instruction_rows)[0]) == 2
    assert expanded(path, instruction_rows, format="prompt_completion")[0][0] == tree(TREE)


@FORMS
def test_through_the_data_modules(form, tiny_tokenizer, tmp_path):
    path = given(tmp_path / "x.jsonl", form, TREE, OTHER)

    def ready(kind, **options):
        data = kind(path, tokenizer=tiny_tokenizer, max_length=200, val_fraction=0.0, **options)
        data.setup("fit")
        return data

    data = ready(InstructionDataModule, format="oasst")
    texts = [tiny_tokenizer.decode([*t.prompt, *t.branches[0].input_ids]) for b in data.train_dataloader()
             for t in unpack(b)]  # fmt: skip
    assert any("And of Italy?<|im_end|>\n<|im_start|>assistant\nRome.<|im_end|>" in text for text in texts)
    with pytest.warns(UserWarning, match="1 of 3 rows of train was skipped: 1 x no comparison"):
        data = ready(PreferenceDataModule, on_bad_row="skip")
    (batch,) = data.train_dataloader()
    found = {data.where("train", row): t for row, t in zip(batch.rows, unpack(batch), strict=True)}
    best = found[f"{path}:1 (message p)"]
    assert [tiny_tokenizer.decode(b.input_ids) for b in best.branches] == [
        "Paris.<|im_end|>", "Lyon.<|im_end|>", "I don't know.<|im_end|>"
    ]  # fmt: skip
    assert [(p.better, p.worse) for p in best.pairs] == [(0, 1), (0, 2), (1, 2)]
    assert data.origins["train"] == [("en",)]
    (batch,) = ready(PromptDataModule).train_dataloader()
    assert sorted(m[0]["content"] for m in batch.messages) == ["Capital of France?", "你好"]
    assert set(batch.columns) == {"message_id", "lang"}


def test_a_fault_in_a_tree_names_line_and_message(tiny_tokenizer, tmp_path):
    bad = message("p", "prompter", "a", replies=[message("x", "wizard", "b", rank=0), message("y", "assistant", " ")])
    path = write(tmp_path / "x.jsonl", [tree(OTHER), tree(bad)])
    with pytest.raises(BadRowError, match=r"x\.jsonl:2: no assistant reply"):
        InstructionDataModule(path, tokenizer=tiny_tokenizer, val_fraction=0.0).setup("fit")
    bad["replies"][0]["role"] = "assistant"
    bad["replies"][0]["rank"] = "first"
    path = write(tmp_path / "x.jsonl", [tree(bad)])
    with pytest.raises(BadRowError, match=r"x\.jsonl:1: the rank of the message x is the text 'first'"):
        InstructionDataModule(path, tokenizer=tiny_tokenizer, val_fraction=0.0).setup("fit")
    bad["replies"] = [message("x", "assistant", " ", rank=0)]
    path = write(tmp_path / "x.jsonl", [tree(bad)])
    with pytest.raises(BadRowError, match=r"x\.jsonl:1 \(message x\): turn 2 \(assistant\) is empty"):
        InstructionDataModule(path, tokenizer=tiny_tokenizer, val_fraction=0.0).setup("fit")
