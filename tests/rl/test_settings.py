"""Groups of settings: what they refuse, and what loggers and checkpoints keep of them."""

from pathlib import Path

import pytest
import torch

from lightning_rlhf import KL, Critic, PPOModule, Rollout, Sampling
from lightning_rlhf.data import Branch, Tree, pack
from lightning_rlhf.models import load_reward_model
from lightning_rlhf.rewards import BadScores, Samples, WeightedReward, make_reward

LENGTH = "lightning_rlhf.rewards.verifiers.length"


def test_combinations_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"kl\.estimator is k3, and kl\.where: reward takes k1|kl\.where is reward"):
        KL(estimator="k3")
    with pytest.raises(ValueError, match="greedy completions teach nothing"):
        Rollout(sampling=Sampling(temperature=0.0))
    with pytest.raises(ValueError, match=r"critic\.pretrained is a Linear"):
        Critic(torch.nn.Linear(1, 1))
    assert (KL(where="loss").loss_estimator, KL(where="loss", estimator="k2").loss_estimator) == ("k3", "k2")


def test_loggers_keep_every_setting_and_checkpoints_ask_for_objects(tiny_model_dir, tiny_tokenizer):
    module = PPOModule(tiny_model_dir, LENGTH, critic=Critic(Path(tiny_model_dir), clip=0.3), kl=KL(0.3))
    assert module.hparams.critic == Critic(str(tiny_model_dir), clip=0.3) and module.hparams.kl == KL(0.3)
    model = load_reward_model(tiny_model_dir, pad_token_id=tiny_tokenizer.pad_token_id)
    module = PPOModule(tiny_model_dir, LENGTH, critic=Critic(model, clip=0.3))
    assert module.hparams.critic == Critic(clip=0.3) and module._objects == {"critic": "Critic"}


def test_a_group_is_no_plain_value(tiny_model_dir):
    for given in (dict(critic="runs/reward"), dict(kl={"coef": 0.1}), dict(updates=None)):
        with pytest.raises(ValueError, match=r"give a \w+\(\.\.\.\), a group of settings"):
            PPOModule(tiny_model_dir, LENGTH, **given)


def test_a_subclass_may_have_an_argument_of_a_former_name(tiny_model_dir):
    class Own(PPOModule):
        def __init__(self, pretrained, reward, gamma=0.5):
            super().__init__(pretrained, reward)
            self.mine = gamma

    assert Own(tiny_model_dir, LENGTH, gamma=0.9).mine == 0.9


def test_a_sum_that_overflows_keeps_its_parts():
    def huge(prompts, completions):
        return [3e38] * len(completions)

    batch = pack([Tree([1], [Branch([2])])])
    reward = make_reward([WeightedReward(huge, name="a"), WeightedReward(huge, name="b")], None)
    with pytest.raises(BadScores) as error:
        reward(Samples(batch, ["x"], ["y"], [False], {}))
    assert error.value.scores.total.isnan().all() and set(error.value.scores.parts) == {"a", "b"}
