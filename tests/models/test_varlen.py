"""Flash attention over rows without forks: what is around the kernel, with a stand-in of torch's signature on a CPU."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from rows import GROUP, inputs, packed
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from lightning_rlhf.models import Policy, flex, varlen
from lightning_rlhf.models import tree_attention as tree
from lightning_rlhf.models.kernels import agrees

ROWS = [(30, [20]), (3, [5]), (1, [12]), (9, [3]), (50, [90])]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """The stand-in is the kernel, and no verdict outlives a test."""
    monkeypatch.setattr(varlen, "_kernel", lambda: standin)
    agrees.cache_clear()
    yield
    agrees.cache_clear()


def standin(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """By the documentation of ``torch.nn.attention.varlen.varlen_attn``: each sequence by itself, with a dense mask."""
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q[-1] == len(query) == len(key)
    assert max_q == max_k == cu_seq_q.diff().max()
    assert all(t.is_contiguous() for t in (query, key, value))
    left, right = window_size
    assert right == 0  # causal
    out = []
    for start, end in zip(cu_seq_q.tolist(), cu_seq_q[1:].tolist(), strict=False):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        at = torch.arange(end - start)
        seen = at[None] <= at[:, None]
        if left >= 0:
            seen &= at[None] >= at[:, None] - left
        out.append(F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 20, 200])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_outputs_and_gradients_are_the_loops(heads, window, scaling):
    batch, results = packed(ROWS), []
    for attention in (tree._loop, varlen.attend):
        qkv = inputs(batch.num_tokens, heads, (16, 16), torch.float64, grad=True)
        out = attention(*qkv, batch.forest, scaling, window)
        direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append((out, *torch.autograd.grad(out, qkv, direction)))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@torch.no_grad()
def test_under_autocast_mixed_inputs_become_one_dtype():
    batch = packed(ROWS)
    q, k, v = inputs(batch.num_tokens)
    want = tree._loop(q, k, v, batch.forest)
    with torch.autocast("cpu", torch.bfloat16):
        got = varlen.attend(q, k, v.bfloat16(), batch.forest)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0)


def test_sequences_are_listed_once_a_batch():
    forest = packed(ROWS).forest
    found = varlen.sequences(forest, CPU)
    assert found.bounds.tolist() == [0, 50, 58, 71, 83, 223]
    assert found.longest == 140
    assert varlen.sequences(forest, CPU) is found


class OnCard:
    """A tensor as :func:`varlen.usable` sees it on a card."""

    is_cuda, device = True, "cuda"

    def __init__(self, heads, size):
        self.shape = 1, heads, 20, size


@pytest.mark.parametrize(
    "why, rows, sizes, softcap, dtype",
    [
        (None, ROWS, (64, 64), None, torch.bfloat16),
        ("a fork", GROUP, (64, 64), None, torch.bfloat16),
        ("fp32", ROWS, (64, 64), None, torch.float32),
        ("soft-capping", ROWS, (64, 64), 30.0, torch.float16),
        ("heads too wide", ROWS, (320, 320), None, torch.float16),
        ("an odd width", ROWS, (12, 12), None, torch.float16),
        ("values of another width", ROWS, (64, 32), None, torch.float16),
    ],
)
def test_it_runs_where_flash_attention_can(monkeypatch, why, rows, sizes, softcap, dtype):
    monkeypatch.setattr(varlen, "_on", lambda device: True)
    query, key, value = OnCard(4, sizes[0]), OnCard(2, sizes[0]), OnCard(2, sizes[1])
    assert varlen.usable(query, key, value, packed(rows).forest, softcap, dtype) == (why is None)


def test_there_is_none_on_a_cpu():
    qkv = [t.bfloat16() for t in inputs(223, sizes=(16, 16))]
    assert not varlen.usable(*qkv, packed(ROWS).forest, None, torch.bfloat16)


@pytest.mark.parametrize("window", [None, 7])
def test_a_model_runs_by_it_where_no_prompt_forks_and_by_flex_elsewhere(monkeypatch, window):
    ran = []
    monkeypatch.setattr(varlen, "usable", lambda q, k, v, forest, *rest: not varlen._forks(forest))
    for kernel in (varlen, flex):
        name, attend = kernel.__name__.rpartition(".")[2], kernel.attend
        monkeypatch.setattr(kernel, "attend", lambda *a, n=name, f=attend: ran.append(n) or f(*a))
    monkeypatch.setattr(flex, "usable", lambda query: True)
    monkeypatch.setattr(tree, "agrees", lambda name, *rest: True)
    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = Policy(MistralForCausalLM(config))
    with torch.no_grad():
        policy(packed(ROWS))  # the first batch is preceded by a trial of the model, which has forks
        ran.clear()
        for rows, name in ((ROWS, "varlen"), (GROUP, "flex")):
            got = policy(packed(rows)).logprobs
            assert set(ran) == {name}
            want = Policy(policy.model, layout="padded")(packed(rows)).logprobs
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
            ran.clear()


@pytest.mark.parametrize("fault", [None, "not causal", "no gradient of values", "does not run"])
def test_a_right_kernel_is_trusted_and_a_wrong_one_is_named(monkeypatch, caplog, fault):
    def faulty(query, key, value, *rest, window_size, **options):
        if fault == "not causal":
            n = len(query)
            return F.scaled_dot_product_attention(
                *(t.transpose(0, 1) for t in (query, key, value)), torch.ones(n, n, dtype=torch.bool), enable_gqa=True
            ).transpose(0, 1)
        if fault == "no gradient of values":
            value = value.detach() + 0 * value
        if fault == "does not run":
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nand so on")
        return standin(query, key, value, *rest, window_size=window_size, **options)

    monkeypatch.setattr(varlen, "_kernel", lambda: faulty)
    asked = ("varlen_attn", varlen.attend, tree._loop, (1, 1), (4, 2), (16, 16), None, torch.float32, CPU)
    assert agrees(*asked) == (fault is None)
    assert ("varlen_attn is not used" in caplog.text) == (fault is not None)
    if fault:
        assert ("Ampere" if fault == "does not run" else "differ by") in caplog.text


@pytest.mark.parametrize("keyword", [{"dropout": 0.1}, {"s_aux": torch.zeros(4)}], ids=["dropout", "sinks"])
def test_the_loop_serves_what_the_kernel_lacks(monkeypatch, keyword):
    monkeypatch.setattr(varlen, "usable", lambda *arguments: True)
    monkeypatch.setattr(varlen, "attend", lambda *arguments: pytest.fail("the kernel has none"))
    batch = packed(ROWS)
    out, _ = tree.tree_attention(nn.Identity(), *inputs(batch.num_tokens), None, forest=batch.forest, **keyword)
    assert out.shape == (1, batch.num_tokens, 4, 12)


def test_torch_has_the_kernel_by_the_arguments_that_are_given():
    module = pytest.importorskip("torch.nn.attention.varlen")
    own = inspect.signature(module.varlen_attn).parameters
    if not {"window_size", "enable_gqa"} <= own.keys():
        pytest.skip("this torch has it without windows or grouped heads")
    theirs, ours = list(own), list(inspect.signature(standin).parameters)
    assert theirs[:7] == ours[:7]
    assert set(ours) <= set(theirs)
