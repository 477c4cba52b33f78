"""What holds for every data module: the split, the cache, bad rows by file and line, named formats, bundled rows."""

import json

import pytest

from lightning_rlhf.data import InstructionDataModule, PreferenceDataModule, PromptDataModule, instruction, preference
from lightning_rlhf.data import prompts as prompts_home
from lightning_rlhf.data.packed import unpack
from lightning_rlhf.data.sources import BadRowError

MODULES = {"instruction": InstructionDataModule, "preference": PreferenceDataModule, "prompts": PromptDataModule}
EACH = pytest.mark.parametrize("kind", MODULES)


def turn(role, text):
    return {"role": role, "content": text}


def row(prompt, answer="fox", **columns):
    """One that every data module takes."""
    return {"prompt": prompt, "completion": answer, "chosen": answer, "rejected": "dog", **columns}


ROWS = [row(f"question {i}", "fox " * (1 + i % 4)) for i in range(40)]


def ready(kind, tokenizer, source=ROWS, **options):
    data = MODULES[kind](source, tokenizer=tokenizer, **{"max_length": 200, "val_fraction": 0.0, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def texts(data, tokenizer, part="train"):
    """Each row's text as far as its prompt, at least."""
    rows = data._rows[part]
    found = [rows.row(i) for i in range(len(rows))]
    return [tokenizer.decode(row["input_ids"] if "input_ids" in row else row["prompt"]) for row in found]


# -------------------------------------------------------------------------------------------------------------- split


def first_turns(data, tokenizer, part):
    return {text.split("<|im_end|>")[0] for text in texts(data, tokenizer, part)}


@EACH
def test_split_is_by_first_user_turn_and_stable(kind, tiny_tokenizer):
    data = ready(kind, tiny_tokenizer, val_fraction=0.3)
    train, val = (first_turns(data, tiny_tokenizer, part) for part in ("train", "val"))
    assert not train & val and len(train | val) == 40 and 4 <= len(val) <= 20
    longer = [
        row([turn("user", r["prompt"]), turn("assistant", "What?"), turn("user", "again")], "another") for r in ROWS
    ]
    both = ready(kind, tiny_tokenizer, [row("new one"), *longer[::-1], *ROWS], val_fraction=0.3)
    again, held = (first_turns(both, tiny_tokenizer, part) for part in ("train", "val"))
    assert val <= held and train <= again and not again & held and len(again | held) == 41
    other = ready(kind, tiny_tokenizer, val_fraction=0.3, seed=1)
    assert first_turns(other, tiny_tokenizer, "val") != val


@EACH
def test_every_row_lands_in_one_part_and_is_seen_once(kind, tiny_tokenizer):
    data = ready(kind, tiny_tokenizer, val_fraction=0.3, batch_size=4)
    for part, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        assert sorted(i for batch in loader for i in batch.rows) == list(range(len(data._rows[part])))
    found = [*texts(data, tiny_tokenizer), *texts(data, tiny_tokenizer, "val")]
    assert len(found) == 40 == len(set(found))


# -------------------------------------------------------------------------------------------------------------- cache

RANKED = {"prompt": "q", "completion": "a", "ranked": ["x", "y", "z"], "scores": [3, 2, 1]}
#: The function that tokenizes, its number of calls for the rows, and what makes it be called again.
ANEW = {
    "instruction": (instruction, "encode", 5, [dict(loss_on="all"), dict(system="s")], [row("question 3", "other")]),
    "preference": (
        preference, "encode", 11, [dict(pair_weight="prompt"), dict(use_margin=True)],
        [row("question 3", ROWS[3]["chosen"], source="hh"), row("question 3", "dog", rejected=ROWS[3]["chosen"])],
    ),
    "prompts": (prompts_home, "encode_prompt", 5, [dict(as_text=True)], [{**ROWS[3], "number": 5}]),
}  # fmt: skip


@EACH
def test_tokenized_once_and_again_when_anything_changes(kind, tiny_tokenizer, tmp_path, monkeypatch):
    home, function, calls, changes, others = ANEW[kind]
    made = []
    real = getattr(home, function)
    monkeypatch.setattr(home, function, lambda *a, **k: made.append(1) or real(*a, **k))

    def count(last=ROWS[3], ranked=RANKED, **options):
        made.clear()
        ready(kind, tiny_tokenizer, [*ROWS[:3], last, ranked], cache_dir=tmp_path, **options)
        return len(made)

    assert count() == calls
    assert count() == 0
    for options in (*changes, dict(max_length=100), *({"last": other} for other in others)):
        assert count(**options) == calls, options
        assert count(**options) == 0, options
    if kind == "preference":
        assert count(ranked={**RANKED, "scores": [4, 2, 1]}, use_margin=True) == calls
    tiny_tokenizer.chat_template = "{{ '' }}" + tiny_tokenizer.chat_template
    assert count() == calls


@EACH
def test_several_processes_give_the_same_rows(kind, tiny_tokenizer, tmp_path):
    more = {} if kind == "prompts" else {"num_workers": 1}
    one = ready(kind, tiny_tokenizer, cache_dir=tmp_path / "1")
    two = ready(kind, tiny_tokenizer, cache_dir=tmp_path / "2", num_proc=2, **more)
    rows = [[data._rows["train"].row(i) for i in range(40)] for data in (one, two)]
    assert rows[0] == rows[1]
    for a, b in zip(one.train_dataloader(), two.train_dataloader(), strict=True):
        assert a.rows == b.rows
        assert a.prompts == b.prompts if kind == "prompts" else a.input_ids.equal(b.input_ids)


# ----------------------------------------------------------------------------------------------------------- bad rows


def pair(prompt, chosen="a", rejected="b", **columns):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def chat(*turns):
    return {"messages": [turn(*t) for t in turns]}


#: The last is too long: it is refused when it is tokenized.
BAD = {
    "instruction": {
        "malformed": ('{"messages": [', "JSON"),
        "empty turn": (chat(("user", "a"), ("assistant", " ")), "empty"),
        "unknown role": (chat(("wizard", "a")), "wizard"),
        "no assistant": (chat(("user", "a")), "assistant"),
        "wrong type": ({"messages": 3}, "messages"),
        "too long": (chat(("user", "a"), ("assistant", "fox " * 300)), "max_length=200"),
    },
    "preference": {
        "malformed": ('{"prompt": [', "JSON"),
        "no answers": ({"prompt": "a"}, "no known preference format"),
        "a conversation": (chat(("user", "a"), ("assistant", "b")), "no known preference format"),
        "no difference": (pair("a", "x", "x"), "the same"),
        "all tied": ({"prompt": "a", "ranked": ["x", "y"], "ranks": [1, 1]}, "tied"),
        "empty answer": (pair("a", " "), "empty"),
        "scores out of order": (pair("a", chosen_score=1, rejected_score=2), "worse one"),
        "not finite": (pair("a", margin=float("nan")), "nan"),
        "too long": (pair("a", "x", "fox " * 300), "max_length=200"),
    },
    "prompts": {
        "malformed": ('{"prompt": [', "JSON"),
        "no format": ({"article": "a"}, "no known prompt format"),
        "empty": ({"prompt": " "}, "empty"),
        "wrong type": ({"prompt": 3}, "'prompt' is a int"),
        "half a character": ({"prompt": "a\ud800"}, "surrogate"),
        "no user turn": (chat(("system", "s"), ("assistant", "a")), "user"),
        "roles out of order": (chat(("user", "a"), ("user", "b")), "same role"),
        "two system prompts": (chat(("system", "s"), ("user", "b")) | {"system": "t"}, "differ"),
        "too long": ({"prompt": "fox " * 300}, "max_length=200"),
    },
}


def write(path, lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in BAD for name in BAD[kind]])
def test_bad_rows_name_file_line_and_reason(kind, name, tiny_tokenizer, tmp_path):
    line, reason = BAD[kind][name]
    path = write(tmp_path / "rows.jsonl", [row("a"), "", line])
    with pytest.raises(BadRowError, match=rf"rows\.jsonl:3.*{reason}"):
        ready(kind, tiny_tokenizer, path)


@EACH
def test_skipped_rows_are_counted_by_reason_and_where_still_names_lines(kind, tiny_tokenizer, tmp_path):
    lines = [line for line, _ in BAD[kind].values()]
    n = len(lines)
    path = write(tmp_path / "rows.jsonl", [*lines, row("first"), lines[-1], "", row("second")])
    with pytest.warns(UserWarning, match="skipped") as seen:
        data = ready(kind, tiny_tokenizer, path, on_bad_row="skip")
    messages = [str(w.message) for w in seen if "skipped" in str(w.message)]
    assert len(messages) == 2 and f"{n - 1} of {n + 3}" in messages[0] and "2 of 4" in messages[1]
    assert sorted(i for batch in data.train_dataloader() for i in batch.rows) == [0, 1]
    for i, (text, line) in enumerate((("first", n + 1), ("second", n + 4))):
        assert data.where("train", i).endswith(f"rows.jsonl:{line}") and text in texts(data, tiny_tokenizer)[i]


# ------------------------------------------------------------------------------------------------ formats and sources


@pytest.mark.parametrize(
    ("kind", "format", "row"),
    [
        ("instruction", "alpaca", {"instruction": "Say", "output": "Hi", "prompt": "other", "completion": "x"}),
        ("preference", "sharegpt_preference", pair("x") | {"conversations": [{"from": "human", "value": "Say"}]}),
        ("prompts", "question", {"question": "Say", "prompt": "other"}),
    ],
)
def test_the_system_prompt_and_a_named_format(kind, format, row, tiny_tokenizer):
    (text,) = texts(ready(kind, tiny_tokenizer, [row], format=format, system="Be brief."), tiny_tokenizer)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay<|im_end|>")


@EACH
def test_the_bundled_rows_load(kind, tiny_tokenizer):
    data = ready(kind, tiny_tokenizer, "bundled", max_length=4096, val_fraction=0.1)
    assert len(data._rows["train"]) + len(data._rows["val"]) >= (100 if kind == "preference" else 200)
    if kind == "preference":
        assert all(tree.pairs for batch in data.train_dataloader() for tree in unpack(batch))
        assert {name for names in data.origins["train"] for name in names} >= {"zh", "en"}
    prompts = data.sample_prompts(3)
    assert len(prompts) == 3 and all(prompt[-1]["role"] == "user" for prompt in prompts)
