"""Preference data: prompts with answers as branches, pairs with margins and weights, the split, bad rows."""

import json
from types import SimpleNamespace

import pytest

from lightning_rlhf.data.packed import unpack
from lightning_rlhf.data.preference import PreferenceDataModule
from lightning_rlhf.data.sources import BadRowError
from lightning_rlhf.data.templates import CHAT_TEMPLATES, set_chat_template, stop_token_ids
from lightning_rlhf.data.tokens import encode_prompt


def pair(question, chosen="Paris.", rejected="dog", **columns):
    return {"prompt": question, "chosen": chosen, "rejected": rejected, **columns}


def ranking(question, *answers, **columns):
    return {"prompt": question, "ranked": list(answers), **columns}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ROWS = [pair(f"question {i}", "fox " * (1 + i % 4)) for i in range(40)]


def ready(tokenizer, source=ROWS, stage="fit", **options):
    data = PreferenceDataModule(source, tokenizer=tokenizer, **{"max_length": 200, **options})
    data.prepare_data()
    data.setup(stage)
    return data


def trees(loader):
    """Tree by row number; each may come once."""
    found = {}
    for batch in loader:
        for row, tree in zip(batch.rows, unpack(batch), strict=False):  # a filler has no number
            assert row not in found
            found[row] = tree
    return found


def only(tokenizer, row, **options):
    """The tree of a data set of one row."""
    found = trees(ready(tokenizer, [row], val_fraction=0.0, **options).train_dataloader())
    assert list(found) == [0]
    return found[0]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ------------------------------------------------------------------------------------------------------------- tokens


def test_a_prompt_stands_once_and_its_answers_end_with_the_stop_token(tiny_tokenizer):
    (batch,) = ready(tiny_tokenizer, [ranking("Say", "dog", "fox fox", "你好")], val_fraction=0.0).train_dataloader()
    prompt = ids(tiny_tokenizer, "<|im_start|>user\nSay<|im_end|>\n<|im_start|>assistant\n")
    answers = [ids(tiny_tokenizer, f"{text}<|im_end|>") for text in ("dog", "fox fox", "你好")]
    assert batch.input_ids.tolist() == [*prompt, *(i for answer in answers for i in answer)]
    (tree,) = unpack(batch)
    assert (tree.prompt, [b.input_ids for b in tree.branches]) == (prompt, answers)
    assert set(batch.input_ids[batch.last].tolist()) == {tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert batch.lengths.tolist() == [len(answer) for answer in answers]


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_every_preset_gives_the_ids_of_inference(template, tiny_tokenizer):
    set_chat_template(tiny_tokenizer, template)
    prompt = [user("Say"), assistant("What?"), user("Hello 你好")]
    tree = only(tiny_tokenizer, {"prompt": prompt, "chosen": "fox dog", "rejected": "Paris."})
    assert tree.prompt == encode_prompt(tiny_tokenizer, prompt)
    stops = stop_token_ids(tiny_tokenizer)
    for branch, text in zip(tree.branches, ("fox dog", "Paris."), strict=True):
        *answer, stop = branch.input_ids
        assert stop in stops and not set(answer) & set(stops)
        assert tiny_tokenizer.decode(answer).strip() == text


def test_answers_of_several_turns_share_what_they_begin_with(tiny_tokenizer):
    start = [{"role": "system", "content": "Be brief."}, user("a"), assistant("b"), user("c")]
    row = {"chosen": [*start, assistant("d"), user("e"), assistant("f")], "rejected": [*start, assistant("no")]}
    tree = only(tiny_tokenizer, row)
    assert tree.prompt == encode_prompt(tiny_tokenizer, start)
    texts = [tiny_tokenizer.decode(b.input_ids) for b in tree.branches]
    assert texts == [
        "d<|im_end|>\n<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\nf<|im_end|>",
        "no<|im_end|>",
    ]


# -------------------------------------------------------------------------------------------------------------- pairs


def pairs(tree):
    return [(p.better, p.worse) for p in tree.pairs]


def test_a_ranking_gives_all_its_pairs(tiny_tokenizer):
    tree = only(tiny_tokenizer, ranking("Say", "a", "b", "c", "d"))
    assert pairs(tree) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert [p.weight for p in tree.pairs] == [1.0] * 6
    tied = only(tiny_tokenizer, {"prompt": "Say", "answers": ["b", "a", "c"], "scores": [1, 3, 1]})
    assert [tiny_tokenizer.decode(b.input_ids[:1]) for b in tied.branches] == ["a", "b", "c"]
    assert pairs(tied) == [(0, 1), (0, 2)]


def test_pairs_of_a_prompt_share_its_weight(tiny_tokenizer):
    rows = [
        ranking("a", "a", "b", "c", "d"),
        pair("b"),
        {"prompt": "c", "answers": ["a", "b", "c"], "scores": [1, 0, 0]},
    ]
    data = ready(tiny_tokenizer, rows, val_fraction=0.0, pair_weight="prompt")
    (batch,) = data.train_dataloader()
    found = trees([batch])
    for i, count in enumerate((6, 1, 2)):
        assert [p.weight for p in found[i].pairs] == pytest.approx([1 / count] * count)
    assert batch.totals.pairs == pytest.approx(3.0)
    assert batch.totals.sequences == 9
    (even,) = ready(tiny_tokenizer, rows, val_fraction=0.0).train_dataloader()
    assert even.totals.pairs == 9.0


MARGINS = {
    "its own": (pair("a", margin=0.5), [0.5]),
    "of scores": (pair("a", chosen_score=3, rejected_score=1.5), [1.5]),
    "its own before scores": (pair("a", margin="0.25", score_chosen=3, score_rejected=1), [0.25]),
    "none": (pair("a"), [0.0]),
    "of a ranking": (ranking("a", "x", "y", "z", scores=[5, 3, -1]), [2.0, 6.0, 4.0]),
    "of a ranking without scores": (ranking("a", "x", "y", "z"), [0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("name", MARGINS)
def test_margins_are_asked_for_only_if_told_to(name, tiny_tokenizer):
    row, margins = MARGINS[name]
    assert [p.margin for p in only(tiny_tokenizer, row, use_margin=True).pairs] == margins
    assert [p.margin for p in only(tiny_tokenizer, row).pairs] == [0.0] * len(margins)


def test_origins_are_named_by_source_and_language(tiny_tokenizer):
    rows = [
        pair("a", source="hh", lang="en"),
        pair("b", source="hh", language="zh"),
        pair("c", source="books"),
        pair("d"),
        pair("e", source="hh", lang="en"),
    ]
    data = ready(tiny_tokenizer, rows, val=rows[1:2], test=rows)
    assert data.origins["train"] == [(), ("books",), ("hh", "en"), ("hh", "zh")]
    assert data.origins["val"] == [("hh", "zh")]
    names = {row: data.origins["train"][t.origin] for row, t in trees(data.train_dataloader()).items()}
    assert names == {0: ("hh", "en"), 1: ("hh", "zh"), 2: ("books",), 3: (), 4: ("hh", "en")}
    (batch,) = data.val_dataloader()
    assert batch.pairs.origin.tolist() == [0]


def test_rows_of_unlike_columns_stay_together(tiny_tokenizer):
    """The table of tokens must not take its types from the first thousand rows, which may have no pair and no name."""
    talks = [{"messages": [user(f"q {i % 7}"), assistant("a")]} for i in range(1001)]
    data = ready(tiny_tokenizer, stage="predict", predict=[*talks, pair("a", source="hh")])
    last = list(data.predict_dataloader())[-1]
    assert last.rows[-1] == 1001 and last.pairs.origin.tolist() == [1]
    assert data.origins["predict"] == [(), ("hh",)]


# -------------------------------------------------------------------------------------------------------------- split


def prompts(loader, tokenizer):
    return {tokenizer.decode(tree.prompt) for tree in trees(loader).values()}


def test_no_prompt_of_real_data_is_on_both_sides(tiny_tokenizer, assets):
    lines = (assets / "data" / "preference.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for line in lines if (row := json.loads(line))["lang"] == "en"][::3]
    for row in rows:
        row["chosen"], row["rejected"] = "a", "b"  # answers have no part in it
    data = ready(tiny_tokenizer, rows, max_length=4096, val_fraction=0.2, batch_size=64)
    train, val = (trees(loader) for loader in (data.train_dataloader(), data.val_dataloader()))
    asked = [{str(tree.prompt) for tree in side.values()} for side in (train, val)]
    assert len(train) + len(val) == len(rows) > len(asked[0] | asked[1])  # there are twins
    assert asked[1] and not asked[0] & asked[1]


# ----------------------------------------------------------------------------------------------------------- bad rows


def test_a_row_as_long_as_may_be_is_kept(tiny_tokenizer):
    size = len(encode_prompt(tiny_tokenizer, [user("Say")])) + len(ids(tiny_tokenizer, "fox dog<|im_end|>"))
    row = pair("Say", "a", "fox dog")
    assert len(only(tiny_tokenizer, row, max_length=size).branches) == 2
    with pytest.raises(BadRowError, match=f"{size} tokens are over max_length={size - 1}"):
        only(tiny_tokenizer, row, max_length=size - 1)


def test_a_prompt_that_an_answer_changes_is_refused(tiny_tokenizer):
    tiny_tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_start|>' }}{% endif %}{% endfor %}"
    )
    with pytest.raises(BadRowError, match=r"list\[0\].*answers can't share it"):
        only(tiny_tokenizer, pair("Say"))


def test_a_template_that_writes_earlier_turns_otherwise_serves(tiny_tokenizer):
    """As of models that think: only the last turn carries its thoughts, and the reward reads no other."""
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    prompt = [user("a"), assistant("b"), user("c")]
    tree = only(tiny_tokenizer, {"prompt": prompt, "chosen": "dog", "rejected": "fox"})
    assert tree.prompt == encode_prompt(tiny_tokenizer, prompt)
    assert tiny_tokenizer.decode(tree.branches[0].input_ids) == "<think></think>dog<|im_end|>"


# ------------------------------------------------------------------------------------------------------------ loaders


def test_predict_takes_single_answers_and_preferences_in_order(tiny_tokenizer):
    rows = [
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
        ranking("e", "x", "y", "z"),
        {"instruction": "f", "output": "g"},
        pair("h"),
    ]
    data = ready(tiny_tokenizer, stage="predict", predict=rows, system="Be brief.", eval_batch_size=4)
    batches = list(data.predict_dataloader())
    assert [row for batch in batches for row in batch.rows] == [0, 1, 2, 3]
    assert len(batches) > 1
    found = trees(batches)
    assert [len(tree.branches) for tree in found.values()] == [1, 3, 1, 2]
    assert [len(tree.pairs) for tree in found.values()] == [0, 3, 0, 1]
    assert found[0].prompt == encode_prompt(
        tiny_tokenizer, [{"role": "system", "content": "Be brief."}, user("a"), assistant("b"), user("c")]
    )
    assert tiny_tokenizer.decode(found[0].branches[0].input_ids) == "d<|im_end|>"
    assert [data.where("predict", row) for row in found] == [f"list[{i}]" for i in range(4)]


def test_predict_reads_the_validation_rows_by_default_and_refuses_what_is_neither(tiny_tokenizer):
    data = ready(tiny_tokenizer, stage="predict", val=ROWS[:3])
    assert len(trees(data.predict_dataloader())) == 3
    with pytest.raises(BadRowError, match=r"list\[0\]"):
        ready(tiny_tokenizer, stage="predict", predict=[{"text": "a plain text"}])
    with pytest.raises(BadRowError, match=r"list\[0\].*chosen"):  # a named format holds for predictions too
        ready(tiny_tokenizer, stage="predict", format="pair", predict=[{"prompt": "a", "completion": "b"}])


@pytest.mark.parametrize("batch_size", [5, 16])
def test_every_row_is_seen_once_an_epoch_over_ranks_and_micro_batches(batch_size, tiny_tokenizer):
    rows = [*ROWS[:21], *(ranking(f"ranked {i}", "x", "fox " * i, "z") for i in range(1, 11))]
    orders = []
    for epoch in (0, 1):
        seen, weights, sides = [], [], []
        for rank in (0, 1):
            data = ready(tiny_tokenizer, rows, val_fraction=0.0, batch_size=batch_size, pair_weight="prompt")
            sampler = dict(num_replicas=2, rank=rank)
            data.trainer = SimpleNamespace(accumulate_grad_batches=2, distributed_sampler_kwargs=sampler)
            loader = data.train_dataloader()
            loader.set_epoch(epoch)
            sides.append(list(loader))
            seen += [row for batch in sides[-1] for row in batch.rows]
        assert sorted(seen) == list(range(31))
        assert len(sides[0]) == len(sides[1]) == len(loader) and not len(loader) % 2
        for i in range(0, len(loader), 2):
            step = [batch for side in sides for batch in side[i : i + 2]]
            assert {batch.totals for batch in step} == {step[0].totals}
            assert step[0].totals.bins == 4
            weights.append(sum(batch.pairs.weight.sum().item() for batch in step))
            assert weights[-1] == pytest.approx(step[0].totals.pairs)
            assert sum(len(batch.rows) for batch in step) == pytest.approx(step[0].totals.pairs)
        assert sum(weights) == pytest.approx(31)
        orders.append(seen)
    assert orders[0] != orders[1]


def test_answers_that_the_template_makes_alike_are_no_pair(tiny_tokenizer):
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("m['content']", "m['content'] | trim")
    good = {"prompt": "a", "chosen": "Rome.", "rejected": "Oslo."}
    for alike in ("Rome.\n", "Rome.<|im_end|>"):
        rows = [good, {"prompt": "Capital?", "chosen": "Rome.", "rejected": alike}]
        data = PreferenceDataModule(rows, tokenizer=tiny_tokenizer, val_fraction=0.0, max_length=200, on_bad_row="skip")
        with pytest.warns(UserWarning, match=r"1 of 2 rows of train was skipped: 1 x no difference .first: list\[1\]"):
            data.setup("fit")
        assert len(data._rows["train"]) == 1


def test_advice_for_pairs_names_no_setting_that_they_lack(tiny_tokenizer):
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + (m['content'] if loop.last else m['content'].split('>')[-1]) }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
    )
    turns = [{"role": role, "content": text} for role, text in (("assistant", "x</think>y"), ("user", "b"))]
    sides = {side: [*turns, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    sides["rejected"][0] = {"role": "assistant", "content": "z</think>y"}
    data = PreferenceDataModule([{"prompt": "a", **sides}], tokenizer=tiny_tokenizer, val_fraction=0.0, max_length=200)
    with pytest.raises(ValueError, match="differently in the whole conversation") as caught:
        data.setup("fit")
    assert "loss_on" not in str(caught.value)
