"""Groups of settings: what they refuse, and what loggers and checkpoints keep of them."""

from pathlib import Path

import pytest
import torch

from lightning_rlhf import KL, Critic, PPOModule, Rollout, Sampling
from lightning_rlhf.models import load_reward_model

LENGTH = "lightning_rlhf.rewards.functions.length_window"


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
