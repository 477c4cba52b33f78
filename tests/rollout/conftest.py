"""Tiny models of many families, and the ends of rollouts that tests compare."""

import pytest
import torch
import transformers

from lightning_rlhf.models import Policy


def make_model(family, vocab_size=300, **changes):
    """A random model of two layers whose distributions are uneven: greedy answers differ, and sampling is not uniform.

    ``family`` is a prefix of transformers' class names.
    """
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                 num_key_value_heads=2, max_position_embeddings=128, head_dim=8)  # fmt: skip
    if family in ("GPT2", "Bloom"):
        sizes = dict(n_embd=32, hidden_size=32, n_layer=2, n_head=4, n_positions=128)
    if family in ("GPTNeoX", "Qwen2", "Phi", "Olmo2", "Mamba"):
        sizes.pop("head_dim")
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=vocab_size, **{**sizes, **special, **changes})
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, family + head)(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.data.mul_(3 if "embed" in name or "wte" in name else 8)
    return model


@pytest.fixture(name="make_model")
def make_model_fixture():
    """:func:`make_model`."""
    return make_model


@pytest.fixture
def policy():
    return Policy(make_model("Llama"))


@pytest.fixture
def prompts():
    """Of many lengths, a single token among them."""
    return [[(5 + 3 * i + 11 * j) % 300 for j in range(n)] for i, n in enumerate([3, 9, 1, 14, 6])]
