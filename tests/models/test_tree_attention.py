"""Tree attention against one dense (T, T) mask written out token by token."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.models import tree_attention as tree

H, K, E = 4, 2, 8


def packed():
    ids = list(range(40))
    return pack(
        [
            Tree(ids[:5], [Branch(ids[5:9]), Branch(ids[9:12]), Branch(ids[12:13])]),
            Tree(ids[2:4], [Branch(ids[i : 2 * i]) for i in range(1, tree.MERGED + 1)]),
            Tree(ids[13:15], [Branch(ids[15:20])]),
            Tree(ids[20:22], [Branch(ids[22:27])]),  # as long as the one before: one call for both
            Tree(ids[27:28], [Branch(ids[28:40])]),
        ]
    )


def sees(batch, window):
    """(T, T): who may look at whom, from the definition of a tree."""
    T = batch.num_tokens
    seen = torch.zeros(T, T, dtype=torch.bool)
    for prompt, branches in batch.forest.trees:
        prefix = list(range(prompt.start, prompt.start + prompt.length))
        for path in [prefix] + [prefix + list(range(b.start, b.start + b.length)) for b in branches]:
            for i, query in enumerate(path):
                for key in path[max(0, i + 1 - (window or T)) : i + 1]:
                    seen[query, key] = True
    return seen


def dense(q, k, v, seen, scaling, softcap=None, sinks=None):
    k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
    logits = q @ k.mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, -torch.inf)
    top = logits.exp()
    below = top.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp().view(1, H, 1, 1))
    return (top / below @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}, {"s_aux": torch.linspace(-1, 1, H).double()}], ids=str)
def test_equals_a_dense_mask_forward_and_backward(window, extra):
    batch = packed()
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, batch.num_tokens, E, generator=g, dtype=torch.float64, requires_grad=True) for h in (H, K, K)
    )
    out, _ = tree.tree_attention(
        nn.Identity(), q, k, v, None, scaling=0.3, sliding_window=window, forest=batch.forest, **extra
    )
    want = dense(q, k, v, sees(batch, window), 0.3, extra.get("softcap"), extra.get("s_aux"))
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    direction = torch.randn(out.shape, generator=g, dtype=torch.float64)
    got = torch.autograd.grad((out * direction).sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad((want * direction).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_sequences_of_one_length_are_attended_to_without_copies():
    """Nothing is cut and joined again, forward or backward."""
    batch = pack([Tree([i], [Branch(list(range(5)))]) for i in range(3)])
    q, k, v = (torch.randn(1, h, 18, E, dtype=torch.float64, requires_grad=True) for h in (H, K, K))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        out, _ = tree.tree_attention(nn.Identity(), q, k, v, None, scaling=0.3, forest=batch.forest)
        out.sum().backward()
    names = {event.key for event in found.key_averages()}
    assert "aten::scaled_dot_product_attention" in names and "aten::cat" not in names
    torch.testing.assert_close(out, dense(q, k, v, sees(batch, None), 0.3), atol=1e-12, rtol=0)


def test_a_layer_without_its_forest_is_an_error_not_a_leak():
    x = torch.randn(1, H, 4, E)
    with tree.forest_active(), pytest.raises(tree.ForestNotPassedError, match="Identity did not receive the forest"):
        tree.tree_attention(nn.Identity(), x, x, x, None)


def test_more_than_one_row_is_refused():
    x = torch.randn(2, H, 4, E)
    with pytest.raises(ValueError, match="a batch of 2"):
        tree.tree_attention(nn.Identity(), x, x, x, None, forest=packed().forest)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_set_attention_is_read_by_every_layer(family):
    """``_attn_implementation`` is private: this fails where transformers reads it no longer."""
    settings = dict(vocab_size=30, hidden_size=32, intermediate_size=32, num_hidden_layers=3)
    heads = dict(num_attention_heads=4) if family == "gpt_neox" else dict(num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings, **heads)).eval()
    ids = torch.arange(1, 9)[None]
    want = model(input_ids=ids, use_cache=False).logits
    calls = []

    def counted(module, *args, **kwargs):
        calls.append(module)
        return tree.tree_attention(module, *args, **kwargs)

    tree.AttentionInterface.register(tree.NAME, counted)
    try:
        tree.set_attention(model, tree.NAME)
        assert tree.attention_of(model) == tree.NAME
        got = model(input_ids=ids, use_cache=False).logits
    finally:
        tree.AttentionInterface.register(tree.NAME, tree.tree_attention)
    assert calls == tree.attention_modules(model)
    assert len(calls) == 3
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
