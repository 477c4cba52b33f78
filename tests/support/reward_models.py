"""Reward models for tests."""

import torch

from lightning_rlhf.models import LoRA, load_reward_model
from lightning_rlhf.models.saving import save_pretrained


def reward_adapter_model(model_dir, tokenizer):
    """A reward model with adapters that are not zero, as they would be at first."""
    torch.manual_seed(1)
    model = load_reward_model(model_dir, lora=LoRA(r=4), pad_token_id=tokenizer.pad_token_id)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.3)
    return model


def save_reward_adapter(model_dir, tokenizer, folder):
    """Saves it merged and as adapters alone, and returns the directories, by whether they hold adapters alone."""
    model = reward_adapter_model(model_dir, tokenizer)
    return {
        only: str(save_pretrained(model, tokenizer, folder / f"adapter {only}", adapter_only=only))
        for only in (False, True)
    }
