"""What a config's ``reward`` means."""

from functools import partial

import pytest
import torch

from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.models import load_reward_model
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.rewards import (
    BadScores,
    FunctionReward,
    Reward,
    RewardModelReward,
    Samples,
    WeightedReward,
    WeightedSum,
    make_reward,
)


def long(prompts, completions):
    return [len(c) for c in completions]


def ones(prompts, completions):
    return [1.0] * len(completions)


SAMPLES = Samples(pack([Tree([5], [Branch([7]), Branch([8, 4])])]), ["a", "a"], ["xyz", "x"], [True, False], {})


def test_a_weighted_list_of_functions_and_models(tiny_model_dir, tiny_tokenizer, tmp_path):
    model = load_reward_model(tiny_model_dir, pad_token_id=tiny_tokenizer.pad_token_id)
    save_pretrained(model, tiny_tokenizer, tmp_path / "rm")
    spec = [WeightedReward(long, 2.0), WeightedReward(str(tmp_path / "rm"), -0.5), WeightedReward(ones, name="bias")]
    reward = make_reward(spec, tiny_tokenizer)
    reward.load()
    alone = RewardModelReward(tmp_path / "rm", tiny_tokenizer)
    alone.load()
    want = 2 * torch.tensor([3.0, 1.0]) - 0.5 * alone(SAMPLES).total + 1.0
    found = reward(SAMPLES)
    torch.testing.assert_close(found.total, want)
    assert list(found.parts) == ["long", "rm", "bias"]
    assert found.parts["long"].tolist() == [3.0, 1.0]


def test_parts_of_one_name_stay_apart(tiny_model_dir, tiny_tokenizer, tmp_path):
    """By as much of their paths as tells them apart."""
    for name in ("helpful/hf/last", "harmless/hf/last", "v1.5"):
        tokenizer_and_config = tmp_path / name
        tokenizer_and_config.mkdir(parents=True)
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (tokenizer_and_config / file).write_bytes((tiny_model_dir / file).read_bytes())
    sources = [tmp_path / "helpful/hf/last", f"{tmp_path}/harmless/hf/last/", str(tmp_path / "v1.5"), long, long, ones,
               "lightning_rlhf.rewards.verifiers.length", partial(ones)]  # fmt: skip
    reward = make_reward([*sources, WeightedReward(long, name="last"), sources[6]], tiny_tokenizer)
    assert isinstance(reward, WeightedSum)
    assert reward.names == ["helpful/hf/last", "harmless/hf/last", "v1.5", "long", "long_2", "ones", "length",
                            "ones_2", "last", "length_2"]  # fmt: skip
    with pytest.raises(ValueError, match="reward: 2 parts have the name 'x'"):
        make_reward([WeightedReward(long, name="x"), WeightedReward(ones, name="x")], tiny_tokenizer)


def test_dicts_as_in_a_config(tiny_tokenizer):
    """As docs/ppo.md writes them, in Python; an entry without weight counts once."""
    path = "lightning_rlhf.rewards.verifiers.length"
    reward = make_reward([{"source": long, "weight": 2.0}, {"source": path, "name": "window"}, ones], tiny_tokenizer)
    assert isinstance(reward, WeightedSum)
    assert (reward.names, reward.weights) == (["long", "window", "ones"], [2.0, 1.0, 1.0])
    assert reward(SAMPLES).total.tolist() == [6 + 1 + 1, 2 + 1 + 1]
    assert make_reward({"source": long, "weight": 2.0}, tiny_tokenizer)(SAMPLES).total.tolist() == [6, 2]


@pytest.mark.parametrize(
    ("spec", "words"),
    [(3, r"reward: an object of type int is none\. Give the directory"), ([3], "type int is none"),
     (torch.nn.Linear, "function"), ([{"sorce": long}], "has the key 'sorce'"), ([{"weight": 1.0}], "has no source"),
     ([{"source": long, "weight": "much"}], "is 'much': give a finite number"),
     ([WeightedReward(long, float("nan"))], "is nan: give a finite number")],
)  # fmt: skip
def test_what_can_be_no_reward_is_named(spec, words, tiny_tokenizer):
    with pytest.raises((TypeError, ValueError), match=words):
        make_reward(spec, tiny_tokenizer)


def test_a_model_object_is_no_reward(tiny_model_dir, tiny_tokenizer):
    with pytest.raises(ValueError, match="type LlamaForSequenceClassification is none"):
        make_reward(load_reward_model(str(tiny_model_dir)), tiny_tokenizer)


def test_each_kind(tiny_model_dir, tiny_tokenizer):
    assert isinstance(make_reward(long, tiny_tokenizer), FunctionReward)
    assert isinstance(make_reward(tiny_model_dir, tiny_tokenizer), RewardModelReward)
    given = make_reward(long, tiny_tokenizer)
    assert isinstance(given, Reward) and make_reward(given, tiny_tokenizer) is given
    with pytest.raises(ImportError):
        make_reward("no_such_package.reward", tiny_tokenizer)
    with pytest.raises(OSError, match=r"^reward: someone/no-such-model can't be loaded") as error:
        make_reward("someone/no-such-model", tiny_tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["runs/reward/hf/best", "./nowhere", "/no/such/folder"])
def test_a_path_at_which_there_is_nothing_is_named(spec, tiny_tokenizer):
    with pytest.raises(FileNotFoundError, match=f"^There is no directory {spec}"):
        make_reward(spec, tiny_tokenizer)


@pytest.mark.parametrize("spec", ["not there", ""])
def test_what_is_none_of_them_says_what_was_tried(spec, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"is not a directory in .* a hub id .* or an import path"):
        make_reward(spec, tiny_tokenizer)
    with pytest.raises(ValueError, match="the list is empty"):
        make_reward([], tiny_tokenizer)


def test_a_bad_score_of_a_part_is_named_and_the_others_still_score(tiny_tokenizer):
    def broken(prompts, completions):
        return [float("nan"), 1.0]

    reward = make_reward([WeightedReward(broken, 2.0), WeightedReward(long)], tiny_tokenizer)
    with pytest.raises(BadScores, match="function broken returned nan for completion 0") as error:
        reward(SAMPLES)
    assert error.value.scores.total.isnan().tolist() == [True, False] and error.value.scores.total[1] == 3.0
    assert error.value.scores.parts["long"].tolist() == [3.0, 1.0]
    aside = make_reward([WeightedReward(broken, 0.0), WeightedReward(long)], tiny_tokenizer)
    assert aside(SAMPLES).total.tolist() == [3.0, 1.0]  # what is not learned from spoils nothing
    with pytest.raises(BadScores, match="weighted sum of rewards returned inf"):
        make_reward([WeightedReward(long, 2e38)], tiny_tokenizer)(SAMPLES)
