"""Judges by score: what a reward model or a function prefers, whatever stands first."""

import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lightning_rlhf.evaluation import (
    Answer,
    AnswerPair,
    ChatJudge,
    Question,
    RewardJudge,
    judge_pairs,
    make_judge,
    rates,
)
from lightning_rlhf.rewards import FunctionReward, Reward, Scores, WeightedReward

PROMPTS = [[{"role": "user", "content": "Say fox"}], [{"role": "user", "content": "你好"}]]
PAIRS = [
    AnswerPair(PROMPTS[0], Answer("the dog"), Answer("a fox")),
    AnswerPair(PROMPTS[1], Answer("no", truncated=True), Answer("很好")),
    AnswerPair(PROMPTS[1], Answer("很好"), Answer("很好", truncated=True)),
    AnswerPair(PROMPTS[0], Answer(""), Answer("a fox")),
]


def plain_score(directory, tokenizer, prompt, answer):
    """Of plain transformers: prompt, answer and stop token, in one row."""
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) + answer.text
    ids = tokenizer(text).input_ids + ([] if answer.truncated else [tokenizer.eos_token_id])
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, 0].item()


def test_a_reward_model_prefers_what_it_scores_higher(reward_dir, tiny_tokenizer):
    judged = judge_pairs(make_judge(str(reward_dir)), PAIRS)
    for j in judged:
        a, b = (plain_score(reward_dir, tiny_tokenizer, j.pair.prompt, answer) for answer in (j.pair.a, j.pair.b))
        assert abs(a - b) > 1e-4
        assert j.outcome == ("a" if a > b else "b")
        told = [float(x) for x in j.a_first.reason.split(" against ")]
        assert told == pytest.approx([a, b], abs=1e-5)
        assert [float(x) for x in j.b_first.reason.split(" against ")] == told[::-1]
    assert {j.outcome for j in judged} == {"a", "b"}
    assert rates(judged).first_place == 0.5 and rates(judged).agreement == 1


def test_equal_answers_are_ties_whatever_the_reward(reward_dir):
    same = [pair._replace(b=pair.a) for pair in PAIRS]
    found = rates(judge_pairs(make_judge(str(reward_dir)), same))
    assert found.ties == 4 and found.win_rate == 0.5


def test_each_answer_is_scored_once(reward_dir):
    seen = []

    def count(prompts, completions):
        seen.extend(zip(map(str, prompts), completions, strict=True))
        return [len(c) for c in completions]

    judged = judge_pairs(make_judge(count), PAIRS)
    assert len(seen) == 6 and len(set(seen)) == 5  # one text is there cut and whole
    assert [j.outcome for j in judged] == ["a", "tie", "tie", "b"]


def letters(prompts, completions, wanted):
    return [c.count(w) for c, w in zip(completions, wanted, strict=True)]


def test_a_function_reads_columns():
    pairs = [AnswerPair("Say", Answer("aa"), Answer("e"), {"wanted": w}) for w in "ae"]
    assert [j.outcome for j in judge_pairs(make_judge(letters), pairs)] == ["a", "b"]
    with pytest.raises(ValueError, match="wanted"):
        judge_pairs(make_judge(letters), [pair._replace(columns={}) for pair in pairs])


def test_scores_that_are_no_numbers_are_no_verdict():
    class Broken(Reward):
        def forward(self, samples):
            return Scores(torch.tensor([math.nan if "x" in c else 1.0 for c in samples.completions]))

    judged = judge_pairs(RewardJudge(Broken()), [AnswerPair("Say", Answer("x"), Answer("y"))])
    assert judged[0].outcome is None and rates(judged).no_verdict == 1
    assert "scores are not finite" in judged[0].a_first.reason


def test_what_a_judge_may_be(reward_dir, tiny_tokenizer):
    questions = [Question(PROMPTS[0], Answer("the dog runs"), Answer("fox"))]
    reward = FunctionReward(lambda prompts, completions: [len(c) for c in completions])
    chat = ChatJudge("http://127.0.0.1:1/v1", "fake")
    assert make_judge(chat) is chat
    assert make_judge(reward).reward is reward
    path = "lightning_rlhf.rewards.verifiers.length"
    for spec in (reward, path, [WeightedReward(path, 2.0), WeightedReward(str(reward_dir), 0.0)]):
        assert make_judge(spec, tiny_tokenizer).compare(questions)[0].winner in ("first", "tie")
    with pytest.raises(ValueError, match="ChatJudge"):
        make_judge("https://judge.example/v1")
    with pytest.raises(ValueError, match=r"is not a directory in .* a hub id .* or an import path"):
        make_judge("no such thing")


def test_judging_under_inference_mode_leaves_the_reward_usable(reward_dir):
    judge = make_judge(str(reward_dir), device="cpu")
    with torch.inference_mode():
        before = judge_pairs(judge, PAIRS)
    assert not any(p.is_inference() for p in judge.reward.parameters())
    assert judge_pairs(judge, PAIRS) == before


def test_no_questions_no_verdicts(reward_dir):
    assert judge_pairs(make_judge(str(reward_dir)), []) == []
    assert rates([]).win_rate.isnan()


def test_pairs_of_one_prompt_are_told_by_the_prompt():
    def width(prompts):
        pairs = [AnswerPair(p, Answer("long"), Answer("x" * (i % 6))) for i, p in enumerate(prompts)]
        found = rates(judge_pairs(make_judge(lambda prompts, completions: [len(c) for c in completions]), pairs))
        return found.high - found.low

    assert width([f"Say {i}" for i in range(24)]) < width([f"Say {i % 6}" for i in range(24)])
