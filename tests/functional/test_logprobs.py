"""The scored head against the plain computation, and against finite differences."""

import itertools

import pytest
import torch

from lightning_rlhf.functional import linear_logprobs, linear_nll, logprobs
from lightning_rlhf.functional.logprobs import chunk_of


def plain(hidden, weight, target, bias=None, temperature=1.0, scale=1.0, softcap=None):
    """What the head means: (N, V) logits, log_softmax, gather."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), log_p.argmax(-1) == target


def inputs(dtype=torch.float32, n=23, d=8, v=37, bias=True, frozen=False):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(v, d, generator=g, dtype=dtype).requires_grad_(not frozen)
    b = torch.randn(v, generator=g, dtype=dtype).requires_grad_(not frozen) if bias else None
    return hidden, weight, torch.randint(0, v, (n,), generator=g), b


OPTIONS = [
    dict(temperature=t, scale=s, softcap=c) for t, s, c in itertools.product((1.0, 0.7), (1.0, 0.5), (None, 3.0))
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 37 * 5, 2**22])
def test_equals_plain_computation(options, frozen, bias, chunk):
    hidden, weight, target, b = inputs(bias=bias, frozen=frozen)
    leaves = [t for t in (hidden, weight, b) if t is not None and t.requires_grad]
    out = linear_logprobs(hidden, weight, target, b, entropy=True, chunk=chunk, **options)
    want, entropy, correct = plain(hidden, weight, target, b, **options)
    torch.testing.assert_close(out.logprobs, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.entropies, entropy, atol=1e-5, rtol=0)
    assert torch.equal(out.correct, correct)
    mix = torch.linspace(-1, 1, len(want))
    got = torch.autograd.grad((out.logprobs * mix + out.entropies * mix.flip(0)).sum(), leaves)
    ref = torch.autograd.grad((want * mix + entropy * mix.flip(0)).sum(), leaves)
    for g, r in zip(got, ref, strict=True):
        torch.testing.assert_close(g, r, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("frozen", [False, True])
def test_weighted_loss_equals_plain_computation(options, frozen):
    hidden, weight, target, b = inputs(frozen=frozen)
    leaves = [t for t in (hidden, weight, b) if t.requires_grad]
    weights = torch.linspace(0, 2, len(target))
    out = linear_nll(hidden, weight, target, weights, b, chunk=100, entropy=True, **options)
    assert out.z_loss is None
    want, entropy, correct = plain(hidden, weight, target, b, **options)
    torch.testing.assert_close(out.loss, -(weights * want).sum(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(out.logprobs, want.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.entropies, entropy.detach(), atol=1e-5, rtol=0)
    assert torch.equal(out.correct, correct) and not out.logprobs.requires_grad
    got = torch.autograd.grad(out.loss * 0.3, leaves)
    ref = torch.autograd.grad(-(weights * want).sum() * 0.3, leaves)
    for g, r in zip(got, ref, strict=True):
        torch.testing.assert_close(g, r, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradcheck_in_float64(softcap, frozen):
    hidden, weight, target, b = inputs(torch.float64, n=5, d=3, v=7, frozen=frozen)

    def call(hidden, weight, b):
        out = linear_logprobs(hidden, weight, target, b, temperature=0.7, softcap=softcap, entropy=True, chunk=14)
        return out.logprobs, out.entropies

    assert torch.autograd.gradcheck(call, (hidden, weight, b))


def log_z(hidden, weight, bias, temperature=1.0, scale=1.0, softcap=None):
    """(N,) log of the softmax's denominator, by (N, V) logits."""
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).logsumexp(-1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_z_loss_equals_plain_computation(options, frozen, bias):
    hidden, weight, target, b = inputs(frozen=frozen, bias=bias)
    leaves = [t for t in (hidden, weight, b) if t is not None and t.requires_grad]
    weights = torch.linspace(0, 2, len(target))
    out = linear_nll(hidden, weight, target, weights, b, chunk=100, z_loss=0.1, **options)
    z = 0.1 * log_z(hidden, weight, b, **options) ** 2
    want = -(weights * plain(hidden, weight, target, b, **options)[0]).sum() + (weights * z).sum()
    torch.testing.assert_close(out.loss, want, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(out.z_loss, z.detach(), atol=1e-5, rtol=1e-6)
    assert not out.z_loss.requires_grad
    got, ref = (torch.autograd.grad(loss * 0.3, leaves) for loss in (out.loss, want))
    for g, r in zip(got, ref, strict=True):
        torch.testing.assert_close(g, r, atol=1e-5, rtol=1e-5)


class Again(torch.autograd.Function):
    """A weighted loss made anew for every backward pass: ``gradcheck`` asks for several."""

    @staticmethod
    def forward(ctx, loss, *leaves):
        ctx.loss = loss
        ctx.save_for_backward(*leaves)
        return loss(*leaves).detach()

    @staticmethod
    def backward(ctx, grad):
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        with torch.enable_grad():
            loss = ctx.loss(*leaves)
        found = iter(torch.autograd.grad(loss, [t for t in leaves if t.requires_grad], grad))
        return None, *(next(found) if t.requires_grad else None for t in leaves)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_gradcheck_of_the_weighted_loss_in_float64(softcap, frozen, z_loss):
    hidden, weight, target, b = inputs(torch.float64, n=5, d=3, v=7, frozen=frozen)
    weights = torch.linspace(0, 2, 5, dtype=torch.float64)

    def loss(hidden, weight, b):
        return linear_nll(hidden, weight, target, weights, b, softcap=softcap, chunk=14, z_loss=z_loss).loss

    assert torch.autograd.gradcheck(lambda *leaves: Again.apply(loss, *leaves), (hidden, weight, b))


def test_only_logprobs_or_only_entropies_may_be_used():
    hidden, weight, target, b = inputs()
    for frozen in (False, True):
        w = weight.detach().requires_grad_(not frozen)
        out = linear_logprobs(hidden, w, target, b.detach(), entropy=True)
        torch.autograd.grad(out.logprobs.sum(), hidden, retain_graph=True)
        (got,) = torch.autograd.grad(out.entropies.sum(), hidden)
        (ref,) = torch.autograd.grad(plain(hidden, w, target, b.detach())[1].sum(), hidden)
        torch.testing.assert_close(got, ref, atol=1e-5, rtol=1e-5)


def test_tied_weight_gets_both_gradients():
    _, weight, target, _ = inputs()
    ids = target.flip(0)
    out = linear_logprobs(weight[ids], weight, target)
    (got,) = torch.autograd.grad(out.logprobs.sum(), weight)
    (ref,) = torch.autograd.grad(plain(weight[ids], weight, target)[0].sum(), weight)
    torch.testing.assert_close(got, ref, atol=1e-5, rtol=1e-5)


def test_low_precision_inputs_are_reduced_in_fp32():
    hidden, weight, target, _ = inputs(torch.bfloat16)
    out = linear_logprobs(hidden, weight, target)
    assert out.logprobs.dtype == torch.float32
    logits = (hidden @ weight.T).float()
    torch.testing.assert_close(out.logprobs, logits.log_softmax(-1).gather(-1, target[:, None])[:, 0])


def test_autocast_gradients_arrive_in_the_weights_dtype():
    hidden, weight, target, b = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_nll(hidden, weight, target, torch.ones(len(target)), b).loss
    loss.backward()
    want = plain(hidden.detach(), weight.detach(), target, b.detach())[0]
    torch.testing.assert_close(loss, -want.sum(), rtol=2e-2, atol=0)
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32


def test_memory_is_bounded_by_the_chunk():
    """The largest tensor made in forward and backward is a block of logits or a gradient, never (N, V)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    self.size = max(self.size, t.numel())
            return out

    hidden, weight, target, b = inputs(n=512, d=4, v=1000)
    chunk = 8000
    for function in (
        lambda: linear_logprobs(hidden, weight, target, b, entropy=True, chunk=chunk).logprobs.sum(),
        lambda: linear_nll(hidden, weight, target, torch.ones(512), b, chunk=chunk).loss,
        lambda: linear_nll(hidden, weight, target, torch.ones(512), b, chunk=chunk, z_loss=1e-4).loss,
    ):
        with Largest() as largest:
            function().backward()
        assert largest.size <= max(chunk, weight.numel()) < 512 * 1000


def test_second_backward_through_the_loss_is_refused():
    hidden, weight, target, _ = inputs()
    loss = linear_nll(hidden, weight, target, torch.ones(len(target))).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_shape_and_temperature_errors():
    hidden, weight, target, _ = inputs()
    with pytest.raises(ValueError, match=r"hidden must be \(N, D\)"):
        linear_logprobs(hidden, weight, target[1:])
    with pytest.raises(ValueError, match="temperature"):
        linear_logprobs(hidden, weight, target, temperature=0)
    with pytest.raises(ValueError, match="z_loss must not be negative"):
        linear_nll(hidden, weight, target, torch.ones(len(target)), z_loss=-1e-4)


def test_blocks_of_logits_are_larger_on_a_gpu_unless_a_size_is_given(monkeypatch):
    assert chunk_of(torch.device("cpu")) == 2**22 and chunk_of(torch.device("cuda", 1)) == 2**26
    seen, blocks = [], logprobs._blocks

    def watched(hidden, target, head, chunk, *rest, **more):
        seen.append(chunk)
        return blocks(hidden, target, head, chunk, *rest, **more)

    monkeypatch.setattr(logprobs, "_blocks", watched)
    monkeypatch.setattr(logprobs, "chunk_of", lambda device: 40 + (device.type == "cpu"))
    hidden, weight, target = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 6, 2])
    for given, chunk in ((None, 41), (14, 14)):
        linear_logprobs(hidden, weight, target, chunk=given)
        linear_nll(hidden, weight, target, torch.ones(3), chunk=given)
        assert seen == [chunk] * 2
        seen.clear()
