"""What a backbone does to the model in it: constants stay exact."""

import copy
import warnings

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, GPTJForCausalLM

from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.metrics import TokenMean
from lightning_rlhf.models import LoRA, Policy
from lightning_rlhf.models.backbone import is_checkpointing
from lightning_rlhf.models.loading import load_causal_lm
from lightning_rlhf.models.reward import read_head
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.models.value import load_value_model
from lightning_rlhf.rollout import CachedEngine, Request, Sampling


def test_constants_that_can_not_be_made_again_are_told(caplog):
    model = GPTJForCausalLM(GPTJConfig(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=64, rotary_dim=4))
    has_buffers = any("embed_positions" in name for name, _ in model.named_buffers())  # not in all versions
    Policy(model.to(torch.bfloat16))
    assert ("are in half precision" in caplog.text) == has_buffers


def test_a_copy_keeps_its_constants_too(tiny_model_dir):
    policy = copy.deepcopy(Policy(AutoModelForCausalLM.from_pretrained(tiny_model_dir))).to(torch.bfloat16)
    with torch.no_grad():
        policy(pack([Tree([5], [Branch([6, 7])])]))
    assert policy.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_model_loaded_under_a_half_default_dtype_has_fp32_heads_and_frequencies(tiny_model_dir):
    plain = load_causal_lm(tiny_model_dir)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = load_causal_lm(tiny_model_dir, dtype="bfloat16")
        critic = load_value_model(load_causal_lm(tiny_model_dir, dtype="bfloat16"))
    finally:
        torch.set_default_dtype(torch.float32)
    for made in (model, critic):
        assert torch.equal(made.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
        assert made.dtype == torch.bfloat16
    assert critic.score.weight.dtype == torch.float32


def test_a_head_that_a_strategy_cast_is_read_in_fp32():
    torch.manual_seed(0)
    head, states = nn.Linear(64, 1).bfloat16(), torch.randn(5, 64, dtype=torch.bfloat16)
    want = states.double() @ head.weight.double().T + head.bias.double()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            got = read_head(head, states)
        torch.testing.assert_close(got, want[:, 0].float(), atol=1e-6, rtol=0)
    got.sum().backward()
    torch.testing.assert_close(head.weight.grad.float(), states.float().sum(0)[None], atol=0.1, rtol=0)


def test_weights_are_summed_exactly_whatever_their_dtype():
    metric = TokenMean()
    metric.update(torch.ones(513), torch.ones(513, dtype=torch.bfloat16))
    assert metric.weight.item() == 513


def test_no_call_of_ours_warns_of_names_that_go_away(tiny_model_dir, tmp_path):
    """Also where peft, or this test run's own settings, would hide it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = load_causal_lm(tiny_model_dir, lora=LoRA(r=2), gradient_checkpointing=True)
        policy = Policy(model)
        assert is_checkpointing(policy.transformer)
        CachedEngine().generate(policy, tokenizer, [Request([5, 6, 7], [0])], Sampling(max_new_tokens=3), [1])
        save_pretrained(model, tokenizer, tmp_path / "hf", adapter_only=True)
        load_causal_lm(tmp_path / "hf")
