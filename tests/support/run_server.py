"""Fixtures: the folder of a run, and a real server of it."""

import pytest
import torch
from server_process import serving

from lightning_rlhf.models import LoRA, load_causal_lm, load_reward_model, load_tokenizer
from lightning_rlhf.models.saving import save_pretrained


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, stories_model_dir):
    """The folder of three runs: two that exported adapters of one model, and a reward model of its weights."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = load_tokenizer(stories_model_dir)
    for name, lora in (("ppo", LoRA(r=2, targets=["q_proj", "v_proj"])), ("sft", LoRA(r=4))):
        torch.manual_seed(lora.r)
        model = load_causal_lm(stories_model_dir, lora=lora)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.03)
        save_pretrained(model, tokenizer, folder / name / "hf" / "last", adapter_only=True)
    model = load_reward_model(stories_model_dir, pad_token_id=tokenizer.pad_token_id)
    model.config.score_offset = 0.5
    save_pretrained(model, tokenizer, folder / "reward" / "hf" / "best")
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory, run_dir):
    """A real server of ``ppo``, ``sft`` and their ``base``, and of the reward model."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder / "log", run_dir, "--votes", folder / "votes") as process:
        process.votes = folder / "votes"
        yield process
