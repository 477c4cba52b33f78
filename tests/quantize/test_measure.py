"""Perplexity and KL beside a written-out version with both models in memory; bytes, speed, memory of known models."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from lightning_rlhf.models import load_causal_lm
from lightning_rlhf.quantize.measure import (
    perplexity,
    quality,
    remember,
    storage_bytes,
    tokens_per_second,
)


@pytest.fixture(scope="module")
def stories(stories_model_dir):
    return AutoModelForCausalLM.from_pretrained(stories_model_dir).eval()


@pytest.fixture(scope="module")
def rows():
    """Of several lengths, the shortest that there can be among them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 512, (n,), generator=generator) for n in (2, 17, 40)]


def rounded(model, step=0.05):
    """Another model: each weight but those of embeddings and head at a multiple of a step."""
    other = copy.deepcopy(model)
    for name, weight in other.named_parameters():
        if "proj" in name:
            weight.data = (weight.data / step).round() * step
    return other


@torch.no_grad()
def by_hand(model, original, rows):
    """In fp64, a token and a word of the vocabulary at a time where that is quick enough."""
    nll, kl = [], []
    for row in rows:
        q = model(row[None]).logits[0].double().softmax(-1)
        p = original(row[None]).logits[0].double().softmax(-1)
        for i in range(len(row) - 1):
            nll.append(-math.log(q[i, row[i + 1]]))
            kl.append(sum(a * math.log(a / b) for a, b in zip(p[i].tolist(), q[i].tolist(), strict=True)))
    return math.exp(sum(nll) / len(nll)), sum(kl) / len(kl)


def test_perplexity_and_kl_are_those_of_both_models_in_memory(stories, rows):
    other = rounded(stories)
    reference, own = remember(stories, rows)
    found, (ppl, kl) = quality(other, rows, reference), by_hand(other, stories, rows)
    assert found.perplexity == pytest.approx(ppl, rel=1e-5) and found.kl == pytest.approx(kl, rel=1e-4)
    assert kl > 0.01, "the models differ"
    assert own == pytest.approx(by_hand(stories, stories, rows)[0], rel=1e-5)
    assert perplexity(other, rows) == pytest.approx(found.perplexity, rel=1e-6)


def test_the_reference_does_not_need_the_models_head(stories, rows):
    """A method may also round the head; the reference keeps its own."""
    other = rounded(stories)
    reference, _ = remember(stories, rows)
    other.lm_head.weight = nn.Parameter((other.lm_head.weight / 0.1).round() * 0.1)
    assert quality(other, rows, reference).kl == pytest.approx(by_hand(other, stories, rows)[1], rel=1e-4)


def test_what_a_model_does_to_its_logits_is_done_to_both(rows):
    """Gemma 2 caps them."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    model = Gemma2ForCausalLM(config).eval()
    other = rounded(model, 0.5)
    reference, _ = remember(model, rows)
    ppl, kl = by_hand(other, model, rows)
    assert quality(other, rows, reference) == pytest.approx((ppl, kl), rel=1e-4)


def test_a_model_is_at_no_distance_from_itself(stories, rows):
    reference, own = remember(stories, rows)
    found = quality(stories, rows, reference)
    assert found.kl == pytest.approx(0, abs=1e-7) and found.perplexity == pytest.approx(own, rel=1e-6)


def test_reference_needs_no_model(stories, rows):
    """It holds the head's inputs and a copy of the head, and leaves no hook behind."""
    reference, _ = remember(stories, rows)
    assert [tuple(states.shape) for states in reference.states] == [(len(row), 64) for row in rows]
    assert reference.head.weight.data_ptr() != stories.lm_head.weight.data_ptr()
    quality(stories, rows, reference)
    assert not stories.lm_head._forward_hooks and not stories.lm_head._forward_pre_hooks


def test_bytes_count_a_shared_storage_once(stories):
    layer, twin = nn.Linear(8, 4), nn.Linear(8, 4, bias=False)
    twin.weight = layer.weight
    assert storage_bytes(nn.ModuleList([layer, twin])) == 4 * (32 + 4)
    frequencies = sum(buffer.untyped_storage().nbytes() for buffer in stories.buffers())
    assert stories.lm_head.weight is stories.model.embed_tokens.weight
    assert storage_bytes(stories) == 4 * 260_032 + frequencies
    view = nn.Linear(8, 4, bias=False)
    view.weight = nn.Parameter(torch.zeros(100, 8)[:4])
    assert storage_bytes(view) == 4 * 800, "a view keeps all of its storage"


def nf4_bytes(layer):
    """Two weights a byte, a byte per block of 64, fp32 per 256 blocks, two tables of values, and a mean."""
    weights = layer.in_features * layer.out_features
    return weights // 2 + weights // 64 + 4 * math.ceil(weights / 64 / 256) + 4 * 16 + 4 * 256 + 4


def int8_bytes(layer):
    """A byte per weight and fp32 per row."""
    return layer.in_features * layer.out_features + 4 * layer.out_features


@pytest.mark.parametrize("quantization, of_layer", [("nf4", nf4_bytes), ("int8", int8_bytes)])
def test_bytes_count_what_quantized_layers_keep_beside_their_weights(wide_model_dir, quantization, of_layer):
    """bitsandbytes keeps scales that are neither parameters nor buffers."""
    pytest.importorskip("bitsandbytes")
    model, dense = (load_causal_lm(wide_model_dir, quantization=kind) for kind in (quantization, None))
    layers = [module for name, module in model.named_modules() if name.endswith("proj")]
    rest = storage_bytes(dense) - sum(4 * layer.in_features * layer.out_features for layer in layers)
    assert len(layers) == 14 and storage_bytes(model) == rest + sum(map(of_layer, layers))


def test_speed_leaves_the_prompt_out(stories, monkeypatch):
    """Each forward pass takes a second of a clock of the test's; the first two are not counted."""
    clock, calls = [0.0], []

    def forward(module, args, kwargs):
        clock[0] += 1.0
        calls.append(kwargs["input_ids"].shape)

    hook = stories.register_forward_pre_hook(forward, with_kwargs=True)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    try:
        assert tokens_per_second(stories, torch.arange(3, 8), tokens=5) == 1.0
    finally:
        hook.remove()
    assert calls == [(1, 5), *[(1, 1)] * 6]


def test_decoding_is_greedy(stories):
    """The same tokens as by generate: the cache is used rightly."""
    seen, prompt = [], torch.tensor([1, 403, 407, 261])
    hook = stories.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0, -1].item()), with_kwargs=True
    )
    try:
        tokens_per_second(stories, prompt, tokens=10)
    finally:
        hook.remove()
    want = stories.generate(prompt[None], max_new_tokens=11, min_new_tokens=11, do_sample=False)[0, len(prompt) :]
    assert seen[1:] == want.tolist()
