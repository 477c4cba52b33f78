"""Rankings of answers: their order, ties, what can't be ranked, and that a reward model learns from them."""

import math
from collections import Counter

import lightning.pytorch as L
import pytest
import torch
from scripted import Scripted

from lightning_rlhf import RewardModule
from lightning_rlhf.collection.answers import Writing
from lightning_rlhf.collection.grow import GrowthError
from lightning_rlhf.collection.preferences import ByJudge, Preferences, make_ranker, read_prompts
from lightning_rlhf.collection.trace import Trace, write_rows
from lightning_rlhf.data import PreferenceDataModule
from lightning_rlhf.data.preference_formats import to_preference
from lightning_rlhf.data.sources import BadRows
from lightning_rlhf.endpoint import Ledger, Reply
from lightning_rlhf.rewards.judges import Judge, Verdict

PROMPTS = [{"prompt": f"Name {n} rivers.", "lang": "en", "least": n} for n in range(1, 71)]


def numbers(request, rng):
    return " ".join(str(rng.randrange(10)) for _ in range(rng.randrange(1, 6)))


def total(prompts, completions):
    """The sum of the numbers in an answer."""
    return [float(sum(map(int, completion.split()))) for completion in completions]


def prefer(folder, generators=None, ranker=None, samples=4, prompts=PROMPTS, seed=0) -> Preferences:
    folder.mkdir(exist_ok=True)
    asked = read_prompts(prompts, BadRows())
    generators = generators or [Scripted(write=numbers)]
    with Ledger(folder / "ledger.sqlite") as ledger:
        work = Preferences(
            asked, generators, samples, ranker or make_ranker(total, None), Writing(), Trace(folder / "trace", {}),
            ledger, seed=seed,
        )  # fmt: skip
        while work.done < len(asked):
            work.step()
    return work


def test_rankings_are_in_the_order_of_a_known_reward(tmp_path):
    work = prefer(tmp_path)
    pairs = 0
    for row in work.rows:
        assert row["scores"] == total([], row["ranked"]) == sorted(row["scores"], reverse=True)
        assert len({*row["ranked"]}) == len(row["ranked"]) == len(row["provenance"]["answers"])
        if len(row["ranked"]) == 2:
            assert row["margin"] == row["scores"][0] - row["scores"][1] > 0
        made = to_preference(row)
        pairs += len(made.pairs)
        for better, worse in made.pairs:
            texts = [made.answers[i][0]["content"] for i in (better, worse)]
            assert total([], texts)[0] > total([], texts)[1]
    assert pairs == work.count.pairs and work.count.rows == len(work.rows)
    every = [
        (a, b) for row in work.rows for a in row["ranked"] for b in row["ranked"] if total([], [a]) > total([], [b])
    ]
    longer = sum(len(a) > len(b) for a, b in every)
    assert work.count.longer_share == longer / sum(len(a) != len(b) for a, b in every) > 0.5


def test_ties_and_scores_that_are_not_finite_are_counted(tmp_path):
    def odd(prompts, completions):
        return [math.nan if value > 20 else math.inf if value == 0 else value // 5 for value in total([], completions)]

    work = prefer(tmp_path, ranker=make_ranker(odd, None))
    plain = prefer(tmp_path / "plain", ranker=make_ranker(lambda prompts, completions: [0.0] * len(completions), None))
    assert plain.rows == [] and plain.count.pairs == 0 and plain.count.problems["prompts without a better answer"] == 70
    answers = plain.count.answers - plain.count.problems["answers that repeat another"]
    assert answers < plain.count.answers == 280 and plain.count.problems["ties"] > answers
    assert work.count.problems["answers without a finite score"] > 0
    assert work.count.problems["ties"] > 0
    for row in work.rows:
        assert all(0 < value <= 20 for value in total([], row["ranked"]))
    pairs = sum(math.comb(len(row["scores"]), 2) - ties(row["scores"]) for row in work.rows)
    assert pairs == work.count.pairs


def ties(scores):
    return sum(math.comb(count, 2) for count in Counter(scores).values())


class First(Judge):
    """Always prefers what stands first."""

    def compare(self, questions):
        return [Verdict("first") for _ in questions]


class BySum(Judge):
    """Prefers the larger sum; says nothing about answers of one number."""

    def compare(self, questions):
        return [self._one(question) for question in questions]

    def _one(self, question):
        first, second = total([], [question.first.text, question.second.text])
        if " " not in question.first.text or " " not in question.second.text:
            return Verdict(None, "too short")
        return Verdict("tie" if first == second else "first" if first > second else "second")


def test_a_judge_that_always_says_a_gives_no_pair(tmp_path):
    work = prefer(tmp_path, ranker=ByJudge(First(), "first"))
    assert work.rows == [] and work.count.pairs == 0
    assert work.count.problems["pairs on which the orders disagree"] == work.count.problems["pairs judged"] > 300


def test_a_judge_ranks_as_it_prefers_and_an_answer_without_verdict_is_left_out(tmp_path):
    work = prefer(tmp_path, ranker=ByJudge(BySum(), "sum"), samples=3)
    assert work.count.problems["pairs without a verdict"] > 0
    for row in work.rows:
        assert total([], row["ranked"]) == sorted(total([], row["ranked"]), reverse=True)
        assert all(" " in text for text in row["ranked"])
    assert work.rows and to_preference(work.rows[0]).pairs


def test_several_models_answer_each_prompt(tmp_path):
    def high(request, rng):
        return " ".join(str(rng.randrange(10, 20)) for _ in range(5))

    work = prefer(tmp_path, [Scripted("low", write=numbers), Scripted("high", write=high)], samples=2)
    assert work.count.wins["high"] == [work.count.wins["low"][1], 0]
    for row in work.rows:
        assert row["provenance"]["generators"][:2] == ["high", "high"]


def test_answers_that_cannot_be_used_are_counted(tmp_path):
    class Half(Scripted):
        def generate(self, requests, ledger=None, budget=None, on_reply=None):
            replies = super().generate(requests, ledger, budget, on_reply)
            cut = [Reply(one.key, one.text, "length" if i % 4 else "stop") for i, one in enumerate(replies)]
            return [
                Reply(one.key, problem="timeout", kind="timeout") if i % 4 == 3 else one for i, one in enumerate(cut)
            ]

    work = prefer(tmp_path, [Half(write=numbers)])
    assert work.rows == [] and work.count.problems["prompts with fewer than two answers"] == 70
    assert work.count.problems["answers not used: cut"] == 140
    assert work.count.problems["answers not used: timeout"] == 70


def test_a_stopped_run_ends_with_the_same_rankings_and_sends_nothing_twice(tmp_path):
    whole = prefer(tmp_path / "whole")
    left = iter(range(100))

    def dying(request, rng):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return numbers(request, rng)

    with pytest.raises(KeyboardInterrupt):
        prefer(tmp_path / "stopped", [Scripted(write=dying)])
    rest = Scripted(write=numbers)
    assert prefer(tmp_path / "stopped", [rest]).rows == whole.rows and len(rest.sent) == 180
    again = Scripted(write=numbers)
    assert prefer(tmp_path / "stopped", [again]).rows == whole.rows and again.sent == []
    assert prefer(tmp_path / "other", seed=1).rows != whole.rows


def test_a_reward_reads_the_columns_of_the_prompts(tmp_path):
    def above(prompts, completions, least):
        return [float(value > low) for value, low in zip(total([], completions), least, strict=True)]

    work = prefer(tmp_path, ranker=make_ranker(above, None))
    assert work.rows and all({*row["scores"]} == {0.0, 1.0} for row in work.rows)


def test_what_ranks_must_be_given_once():
    for wrong in ({"reward": None, "judge": None}, {"reward": total, "judge": First()}):
        with pytest.raises(ValueError, match="set either reward or judge"):
            make_ranker(**wrong)


def test_one_answer_cannot_be_ranked(tmp_path):
    with pytest.raises(ValueError, match="a prompt needs at least 2 answers"):
        prefer(tmp_path, samples=1)


def test_a_model_without_any_reply_ends_it(tmp_path):
    class Silent(Scripted):
        def generate(self, requests, ledger=None, budget=None, on_reply=None):
            return [Reply(one.key(self.name), problem="refused", kind="connection") for one in requests]

    with pytest.raises(GrowthError, match=r"No request to scripted got a reply \(first: refused\)"):
        prefer(tmp_path, [Silent()])


def test_prompts_are_read_in_any_format_and_once_each(tmp_path):
    rows = [
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"prompt": "Why?"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
                      {"role": "user", "content": "And?"}]},
    ]  # fmt: skip
    asked = read_prompts(rows, BadRows())
    assert [one.messages[-1]["content"] for one in asked] == ["Why?", "And?"] and len(asked[1].messages) == 3
    with pytest.raises(ValueError, match="There is no prompt"):
        read_prompts([], BadRows())


@pytest.mark.slow
def test_a_reward_model_learns_the_reward_that_ranked(tiny_model_dir, tmp_path):
    def sentence(request, rng):
        return " ".join(rng.choices(["dog", "Paris", "fine", "good", "公园", "fox", "fox"], k=rng.randint(3, 6)))

    def foxes(prompts, completions):
        return [float("fox" in completion.split()) for completion in completions]

    prompts = [{"prompt": f"Say {n}", "lang": "en"} for n in range(160)]
    work = prefer(tmp_path, [Scripted(write=sentence)], make_ranker(foxes, None), prompts=prompts)
    write_rows(tmp_path / "train.jsonl", work.rows)
    torch.manual_seed(0)
    module = RewardModule(tiny_model_dir, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3))
    data = PreferenceDataModule(str(tmp_path / "train.jsonl"), batch_size=32, val_fraction=0.25)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=6, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    before = trainer.validate(module, data, verbose=False)[0]["val/accuracy"]
    trainer.fit(module, data)
    assert before < 0.8 and trainer.callback_metrics["val/accuracy"] > 0.9
