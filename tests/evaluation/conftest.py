"""A reward model beside the tiny one."""

import pytest
import torch


@pytest.fixture
def reward_dir(tiny_model_dir, tiny_tokenizer, tmp_path):
    """A random reward model of the tiny model's build, whose tokenizer and template are its."""
    from lightning_rlhf.models import load_reward_model
    from lightning_rlhf.models.saving import save_pretrained

    torch.manual_seed(1)
    model = load_reward_model(tiny_model_dir, pad_token_id=tiny_tokenizer.pad_token_id)
    save_pretrained(model, tiny_tokenizer, tmp_path / "reward")
    return tmp_path / "reward"
