"""Single answers as data: trees of one prompt, mismatched answers, the split, bad rows by file and line."""

import gzip
import json
import pickle
from collections import Counter

import numpy as np
import pytest

from lightning_rlhf.data.errors import DataError
from lightning_rlhf.data.packed import Size, StepTotals, Tree, unpack
from lightning_rlhf.data.sources import BadRowError
from lightning_rlhf.data.unpaired import UnpairedDataModule


def row(prompt, completion, label=True, **columns):
    return {"prompt": prompt, "completion": completion, "label": label, **columns}


ROWS = [row(f"question {i % 8}", "fox " * (1 + i % 4), i % 3 > 0) for i in range(32)]


def ready(tokenizer, source=ROWS, stage="fit", **options):
    data = UnpairedDataModule(source, tokenizer=tokenizer, **{"max_length": 200, "val_fraction": 0.0, **options})
    data.prepare_data()
    data.setup(stage)
    return data


def trees(loader, mismatched=False):
    """Tree by row number; each comes once."""
    found = {}
    for batch in loader:
        assert batch.mismatched.rows == batch.rows
        for number, tree in zip(batch.rows, unpack(batch.mismatched if mismatched else batch), strict=False):
            assert number not in found
            found[number] = tree
    return found


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_of(tokenizer, prompt):
    return tokenizer.decode(prompt).split("user\n")[1].split("<|im_end|>")[0]


# -------------------------------------------------------------------------------------------------------------- trees


@pytest.mark.parametrize("streaming", [None, 16])
@pytest.mark.parametrize(("most", "sizes"), [(8, [4] * 8), (3, [3, 1] * 8), (1, [1] * 32)])
def test_answers_of_a_prompt_share_a_tree_wherever_they_stand(most, sizes, streaming, tiny_tokenizer, tmp_path):
    data = ready(tiny_tokenizer, max_answers=most, streaming_window=streaming, cache_dir=tmp_path)
    found = trees(data.train_dataloader())
    assert sorted(len(tree.branches) for tree in found.values()) == sorted(sizes)
    answers = Counter()
    for number, tree in found.items():
        assert tree.size == data._rows["train"].size(number)
        for branch, good in zip(tree.branches, tree.labels, strict=True):
            answers[text_of(tiny_tokenizer, tree.prompt), tuple(branch.input_ids), good] += 1
    want = Counter((r["prompt"], tuple(ids(tiny_tokenizer, f"{r['completion']}<|im_end|>")), r["label"]) for r in ROWS)
    assert answers == want
    [first] = [tree for tree in found.values() if text_of(tiny_tokenizer, tree.prompt) == "question 0"][: most > 2] or [
        None
    ]
    assert first is None or list(first.labels) == [r["label"] for r in ROWS[::8]][: len(first.labels)]


def test_steps_count_answers_and_their_labels(tiny_tokenizer):
    loader = ready(tiny_tokenizer, batch_size=8).train_dataloader()
    totals = [batch.totals for batch in loader]
    assert [t.sequences for t in totals] == [8] * 4
    assert all(t.good + t.bad == 8 for t in totals) and sum(t.good for t in totals) == 21
    for batch in loader:
        assert (batch.totals.good, batch.totals.bad) == (batch.labels.good.sum(), (~batch.labels.good).sum())


def test_prompts_with_other_sources_stay_apart(tiny_tokenizer):
    data = ready(
        tiny_tokenizer, [row("a", "b", source="x"), row("a", "c", source="y"), row("d", "e", False, lang="zh")]
    )
    found = trees(data.train_dataloader())
    assert [len(tree.branches) for tree in found.values()] == [1, 1, 1]
    assert data.origins["train"] == [("x",), ("y",), ("zh",)]
    assert sorted(tree.origin for tree in found.values()) == [0, 1, 2]


def test_the_split_keeps_first_user_turns_apart(tiny_tokenizer, tmp_path):
    source = [row(f"question {i % 12}", f"fox {i}", i % 24 < 12) for i in range(48)]
    data = ready(tiny_tokenizer, source, val_fraction=0.3, cache_dir=tmp_path)
    loaders = data.train_dataloader(), data.val_dataloader()
    sides = [{text_of(tiny_tokenizer, tree.prompt) for tree in trees(loader).values()} for loader in loaders]
    assert len(sides[0] | sides[1]) == 12 and not sides[0] & sides[1] and all(sides)
    again = ready(tiny_tokenizer, source, val_fraction=0.3, cache_dir=tmp_path)  # from the cache
    assert trees(again.train_dataloader()) == trees(loaders[0])


def test_pairs_and_rankings_are_taken_apart(tiny_tokenizer, caplog):
    source = [{"prompt": "a", "chosen": "fox", "rejected": "dog"}, {"prompt": "b", "ranked": ["x", "y", "z"]}]
    caplog.set_level("INFO")
    data = ready(tiny_tokenizer, source, take_apart=True)
    found = trees(data.train_dataloader())
    assert [list(tree.labels) for tree in found.values()] == [[True, False]] * 2
    assert "1 answers in the middle of rankings are left out" in caplog.text
    data = ready(tiny_tokenizer, source, "predict", take_apart=True, predict=source)
    assert [len(tree.branches) for batch in data.predict_dataloader() for tree in unpack(batch)] == [2, 3]


def test_an_openassistant_tree_is_a_ranking(tiny_tokenizer, tmp_path):
    replies = [
        {"message_id": str(i), "role": "assistant", "text": f"fox {i}", "rank": i, "replies": []} for i in range(2)
    ]
    lines = [
        {"message_tree_id": n, "prompt": {"message_id": n, "role": "prompter", "text": n, "replies": replies}}
        for n in ("one", "two")
    ]
    path = tmp_path / "oasst.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    found = trees(ready(tiny_tokenizer, str(path), take_apart=True).train_dataloader())
    assert [list(tree.labels) for tree in found.values()] == [[True, False]] * 2


# --------------------------------------------------------------------------------------------------------- mismatches


def pairing(tokenizer, loader):
    """Prompt and answer to the mismatched answers, of an epoch."""
    own, others = trees(loader), trees(loader, mismatched=True)
    found = {}
    for number, tree in own.items():
        assert others[number].prompt == tree.prompt and not others[number].labels
        for branch, other in zip(tree.branches, others[number].branches, strict=True):
            found[text_of(tokenizer, tree.prompt), tokenizer.decode(branch.input_ids)] = tokenizer.decode(
                other.input_ids
            )
    return found


NAMED = [row(f"question {i % 6}", f"answer {i} of {i % 6}", i % 3 > 0) for i in range(36)]


def test_a_mismatched_answer_belongs_to_another_first_user_turn(tiny_tokenizer):
    turns = [
        {"role": "user", "content": "question 0"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "z"},
    ]
    source = [*NAMED, row(turns, "answer 36 of 0"), row(" question 0 ", "answer 37 of 0")]  # the same first turn
    loader = ready(tiny_tokenizer, source).train_dataloader()
    drawn = Counter()
    for epoch in range(20):
        loader.set_epoch(epoch)
        for (_, answer), other in pairing(tiny_tokenizer, loader).items():
            own, foreign = answer.split(" of ")[1], other.split(" of ")[1]
            assert own != foreign
            drawn[other] += 1
    assert len(drawn) == 38 and max(drawn.values()) < 60  # 20 each in the mean: all of them alike


def test_the_draw_is_a_function_of_seed_and_epoch_alone(tiny_tokenizer, tmp_path):
    def of(epoch=0, ranks=1, micro=1, **options):
        data = ready(tiny_tokenizer, NAMED, cache_dir=tmp_path, **options)
        found = {}
        for rank in range(ranks):
            data._ranks = lambda rank=rank: (ranks, rank)
            loader = data._loader("train", data.batch_size, micro, shuffle=True)
            loader.set_epoch(epoch)
            found |= pairing(tiny_tokenizer, loader)
        assert len(found) == 36
        return found

    first = of()
    assert (
        of()
        == of(ranks=2)
        == of(batch_size=6, micro=2)
        == of(num_workers=2)
        == of(max_answers=8, batch_size=36)
        == first
    )
    for other in (of(epoch=1), of(seed=1)):
        assert sum(other[key] != first[key] for key in first) > 20


def test_evaluation_has_the_same_mismatches_every_time(tiny_tokenizer):
    data = ready(tiny_tokenizer, NAMED, val=NAMED)
    loader = data.val_dataloader()
    first = pairing(tiny_tokenizer, loader)
    loader.set_epoch(3)
    assert pairing(tiny_tokenizer, loader) == first


def test_a_long_mismatched_answer_is_cut(tiny_tokenizer):
    source = [row("a " * 20, "fox"), row("b", "dog " * 20, False)]
    found = trees(ready(tiny_tokenizer, source, max_length=60).train_dataloader(), mismatched=True)
    assert max(tree.num_tokens for tree in found.values()) == 60


def test_a_batch_with_mismatches_travels(tiny_tokenizer):
    loader = ready(tiny_tokenizer).train_dataloader()
    batch = next(iter(loader))
    moved = batch.to("cpu", copy=True)
    assert unpack(moved) == unpack(batch) and unpack(moved.mismatched) == unpack(batch.mismatched)
    assert moved.mismatched.input_ids.data_ptr() != batch.mismatched.input_ids.data_ptr()
    again = pickle.loads(pickle.dumps(loader.collate.mismatched))
    assert again(3, 1) == loader.collate.mismatched(3, 1)


# ---------------------------------------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row("a", ""), r"my\.jsonl:2: .*is empty"),
        (row("a", "b", "yes"), r"my\.jsonl:2: the column 'label' is 'yes'"),
        ({"prompt": "a", "completion": "b", "rating": float("nan")}, r"my\.jsonl:2: the column 'rating' is nan"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"my\.jsonl:2: .*PreferenceDataModule"),
        (row("a", "<|im_end|>"), r"my\.jsonl:2: .*only a stop token"),
        (row("a", "b " * 300), r"my\.jsonl:2: .* tokens are over max_length=200"),
    ],
    ids=["empty", "label", "rating", "pair", "stop", "long"],
)
def test_bad_rows_are_named_with_file_and_line(bad, words, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [row("a", "good"), bad, row("b", "other", False), row("a", "fine")]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(BadRowError, match=words):
        ready(tiny_tokenizer, "my.jsonl", threshold=1.0)
    data = ready(tiny_tokenizer, "my.jsonl", threshold=1.0, on_bad_row="skip")
    assert sum(bad.total for bad in data.bad_rows["train"]) == 1
    assert [len(tree.branches) for _, tree in sorted(trees(data.train_dataloader()).items())] == [2, 1]


def test_data_without_a_choice_are_refused(tiny_tokenizer):
    with pytest.raises(DataError, match="All 4 answers of the train data are good: KTO learns from good and bad ones"):
        ready(tiny_tokenizer, [row(f"{i}", "fox") for i in range(4)])
    with pytest.raises(DataError, match="All 4 answers of the train data are bad"):
        ready(tiny_tokenizer, [row(f"{i}", "fox", False) for i in range(4)])
    one = [row("a", f"fox {i}", i % 2 == 0) for i in range(4)]
    with pytest.raises(DataError, match=r"The train data have one first user turn alone.*apo_zero_unpaired"):
        ready(tiny_tokenizer, one)
    with pytest.raises(DataError, match=r"The val data have one first user turn alone.* to data\.val, or raise"):
        ready(tiny_tokenizer, ROWS, val=one)


def test_a_plan_knows_the_trees(tiny_tokenizer, tmp_path):
    """Another max_answers is another plan, which a checkpoint refuses."""
    states = [ready(tiny_tokenizer, cache_dir=tmp_path, max_answers=n).train_dataloader().state_dict() for n in (8, 2)]
    loader = ready(tiny_tokenizer, cache_dir=tmp_path).train_dataloader()
    loader.load_state_dict(states[0])
    with pytest.raises(DataError, match="another plan"):
        loader.load_state_dict(states[1])


def test_sizes_and_totals_of_labels():
    tree = Tree([1, 2], [], labels=[True, False, True])
    assert StepTotals.of([tree]).good == 2 and StepTotals.of([tree]).bad == 1
    assert Size.NAMES == ("num_tokens", "tokens", "sequences", "pairs", "good", "bad")
    assert np.asarray(tree.size.numbers).tolist() == [2, 0, 0, 0, 2, 1]
