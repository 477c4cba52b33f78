"""The GPU's kernel against the loop: its mask and forward pass on a CPU, its backward pass by a stand-in.

The compiled kernel is for CUDA; here ``flex_attention`` runs unfused, which has no backward pass.
"""

import shutil

import pytest
import torch
from rows import GROUP, inputs, packed
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_rlhf.models import Policy, flex
from lightning_rlhf.models import tree_attention as tree
from lightning_rlhf.models.backbone import enable_checkpointing
from lightning_rlhf.models.kernels import agrees

ROWS = {
    "short": [(5, [4, 3, 1]), (2, [5]), (1, [12])],
    "long": GROUP,
    "long prompt": [(300, [30, 40]), (4, [2])],
    "no padding": [(100, [100, 56])],  # 256 tokens
    "lone": [(1, [399])],
}


@pytest.fixture(autouse=True)
def fresh():
    """No kernel and no verdict outlives a test."""
    caches = flex._kernel, agrees
    yield
    for cache in caches:
        cache.cache_clear()


def sees(batch, window):
    """(T, T): who may look at whom, from the definition of a tree."""
    seen = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.bool)
    for prompt, branches in batch.forest.trees:
        prefix = list(range(prompt.start, prompt.start + prompt.length))
        for path in [prefix] + [prefix + list(range(b.start, b.start + b.length)) for b in branches]:
            for i, query in enumerate(path):
                seen[query, path[max(0, i + 1 - (window or len(path))) : i + 1]] = True
    return seen


def standin(compiled, softcap, *shape):
    """A kernel with a backward pass: the same mask function and logits, in plain torch."""

    def run(query, key, value, mask, scale):
        assert query.shape[2] % flex.BLOCK == 0 and all(t.is_contiguous() for t in (query, key, value))
        assert all(size & (size - 1) == 0 and size >= 16 for t in (query, key, value) for size in t.shape[3:])
        at = torch.arange(query.shape[2])
        seen = mask.mask_mod(None, None, at[:, None], at[None])
        groups = query.shape[1] // key.shape[1]
        logits = scale * query @ key.repeat_interleave(groups, 1).mT
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(groups, 1)

    return run


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("window", [None, 1, 20, 129])
def test_the_block_mask_is_the_dense_one(rows, window):
    batch = packed(ROWS[rows])
    mask = flex.block_mask(batch.forest, window, torch.device("cpu"))
    length = mask.shape[-1]
    assert length % flex.BLOCK == 0 and length >= 2 * flex.BLOCK
    dense = create_mask(mask.mask_mod, 1, 1, length, length, device="cpu")[0, 0]
    T = batch.num_tokens
    assert torch.equal(dense[:T, :T], sees(batch, window))
    assert not dense[:T, T:].any() and not dense[T:, :T].any()
    assert dense.any(1).all()  # a row that sees nothing would be NaN
    theirs = create_block_mask(mask.mask_mod, 1, 1, length, length, device="cpu")
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(mask, name), getattr(theirs, name)), name


def test_a_mask_is_made_once_a_batch_and_window():
    forest = packed(GROUP).forest
    first = flex.block_mask(forest, None, torch.device("cpu"))
    assert flex.block_mask(forest, None, torch.device("cpu")) is first
    assert flex.block_mask(forest, 20, torch.device("cpu")) is not first
    assert len(forest.masks) == 2


@pytest.mark.parametrize(
    "heads, sizes, window, softcap",
    [
        ((4, 2), (16, 16), None, None),
        ((4, 2), (16, 16), 1, None),
        ((9, 3), (12, 12), 20, None),
        ((9, 3), (12, 12), None, 2.0),
        ((4, 4), (20, 40), 20, 2.0),
        ((2, 1), (96, 8), None, None),
    ],
)
@torch.no_grad()
def test_forward_is_the_loops(heads, sizes, window, softcap):
    forest = packed(GROUP).forest
    qkv = inputs(327, heads, sizes)
    want = tree._loop(*qkv, forest, 0.3, window, softcap)
    got = flex.attend(*qkv, forest, 0.3, window, softcap)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_forward_of_other_rows_and_the_default_scale(rows):
    batch = packed(ROWS[rows])
    qkv = inputs(batch.num_tokens)
    want = tree._loop(*qkv, batch.forest)
    torch.testing.assert_close(flex.attend(*qkv, batch.forest), want, atol=2e-6, rtol=0)


@torch.no_grad()
def test_under_autocast_mixed_inputs_become_one_dtype():
    """A norm on queries and keys, as Qwen 3's, leaves them in fp32 beside bf16 values."""
    batch = packed(ROWS["short"])
    q, k, v = inputs(batch.num_tokens)
    want = tree._loop(q, k, v, batch.forest)
    with torch.autocast("cpu", torch.bfloat16):
        got = flex.attend(q, k, v.bfloat16(), batch.forest)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_pass_the_padding(monkeypatch, window, softcap):
    monkeypatch.setattr(flex, "_kernel", standin)
    forest = packed(GROUP).forest
    results = []
    for attention in (tree._loop, flex.attend):
        qkv = inputs(327, (9, 3), (12, 20), torch.float64, grad=True)
        out = attention(*qkv, forest, None, window, softcap)
        direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append((out, *torch.autograd.grad(out, qkv, direction)))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


# ------------------------------------------------------------------------------------------------ what is trusted

ASKED = ("flex_attention", flex.attend, tree._loop, (3, 5), (4, 2), (12, 12), None, torch.float32, torch.device("cpu"))


def test_a_right_kernel_is_trusted_in_whatever_state_a_layer_runs(monkeypatch, caplog):
    monkeypatch.setattr(flex, "_kernel", standin)
    state = torch.get_rng_state()
    for context in (
        torch.enable_grad,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ):
        agrees.cache_clear()
        with context():
            assert agrees(*ASKED)
    assert torch.equal(torch.get_rng_state(), state)
    assert not caplog.records


@pytest.mark.parametrize("fault", ["no mask", "no gradient of keys", "nan", "does not compile"])
def test_a_wrong_kernel_is_not_and_says_so(monkeypatch, caplog, fault):
    def faulty(*arguments):
        right = standin(*arguments)

        def run(query, key, value, mask, scale):
            if fault == "no mask":
                return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            if fault == "no gradient of keys":
                return right(query, key.detach() + 0 * key, value, mask, scale)
            if fault == "nan":
                return right(query, key, value, mask, scale) * torch.nan
            raise RuntimeError("out of resource: shared memory\nand so on")

        return run

    monkeypatch.setattr(flex, "_kernel", faulty)
    assert not agrees(*ASKED)
    assert "flex_attention is not used" in caplog.text
    assert ("shared memory" if fault == "does not compile" else "differ by") in caplog.text


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_runs_by_the_kernel_where_it_may(monkeypatch, checkpointed):
    batch = packed(GROUP)
    results, ran = [], []

    def counted(*arguments):
        def run(*inputs):
            ran.append(inputs)
            return standin(*arguments)(*inputs)

        return run

    for usable in (False, True):
        monkeypatch.setattr(flex, "usable", lambda query, usable=usable: usable)
        monkeypatch.setattr(flex, "_kernel", counted)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_dropout=0.0,
        )
        model = LlamaForCausalLM(config)
        if checkpointed:
            enable_checkpointing(model)
        policy = Policy(model)
        ran.clear()
        logprobs = policy(batch).logprobs
        assert (bool(ran) == usable and ("blocks", None, torch.device("cpu")) in batch.forest.masks) or not usable
        logprobs.sum().backward()
        results.append((logprobs, *(p.grad for p in policy.parameters())))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("keyword", [{"dropout": 0.1}, {"s_aux": torch.zeros(4)}], ids=["dropout", "sinks"])
def test_the_loop_serves_what_the_kernel_lacks(monkeypatch, keyword):
    monkeypatch.setattr(flex, "usable", lambda query: True)
    monkeypatch.setattr(flex, "attend", lambda *arguments: pytest.fail("the kernel has none"))
    batch = packed(ROWS["short"])
    out, _ = tree.tree_attention(nn.Identity(), *inputs(batch.num_tokens), None, forest=batch.forest, **keyword)
    assert out.shape == (1, batch.num_tokens, 4, 12)


def test_there_is_no_kernel_on_a_cpu():
    assert not flex.usable(torch.zeros(1))


# ------------------------------------------------------------------------------------------------ compilation


@torch.no_grad()
def test_rows_of_any_length_and_window_share_two_compilations(monkeypatch):
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend=backend, **options))
    kernel = flex._kernel
    monkeypatch.setattr(flex, "_kernel", lambda compiled, *rest: kernel(True, *rest))
    for rows in ("short", "long prompt", "long", "lone"):
        batch = packed(ROWS[rows])
        for window in (None, 7, 20):
            qkv = inputs(batch.num_tokens)
            got = flex.attend(*qkv, batch.forest, None, window)
            torch.testing.assert_close(got, tree._loop(*qkv, batch.forest, None, window), atol=2e-6, rtol=0)
    assert len(graphs) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiled kernels need a C++ compiler")
@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch compiles none for a CPU before 2.6")
@torch.no_grad()
def test_the_compiled_forward_is_the_loops(monkeypatch):
    kernel = flex._kernel
    monkeypatch.setattr(flex, "_kernel", lambda compiled, *rest: kernel(True, *rest))
    forest = packed(GROUP).forest
    qkv = inputs(327)
    got = flex.attend(*qkv, forest, None, 20, 2.0)
    torch.testing.assert_close(got, tree._loop(*qkv, forest, None, 20, 2.0), atol=2e-6, rtol=0)
