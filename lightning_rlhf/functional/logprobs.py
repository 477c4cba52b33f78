"""Log-probabilities of given tokens under a linear head, without ``(N, V)`` logits in memory.

Logits are computed for a few rows at a time (``chunk`` elements), in at least fp32, reduced, and freed. Two functions
share the arithmetic:

* :func:`linear_logprobs`: a token's gradient may depend on all log-probs (PPO, DPO);
* :func:`linear_nll`: the loss is a weighted sum (SFT), and gradients are computed together with the logits, so that
  nothing is computed twice.

Tensor parallelism cuts the head's vocabulary over ranks. Each rank then has (n, V / tp) logits of a block, and ranks
exchange two small tensors per block: the maximum, then the sums of the softmax. The backward pass exchanges only the
gradient of the hidden states, once.

Shapes: N scored tokens, V vocabulary (of this rank, where it is cut), D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.functional.precision import without_subclass
from lightning_rlhf.utils.compilation import uncompiled

#: Elements per block of logits on a CPU: 16 MiB in fp32. Larger blocks take more memory and do not fit into its cache.
CHUNK = 2**22
#: On other devices: 256 MiB in fp32. A block of a vocabulary of 152,000 then has 441 rows, whose products take longer
#: than reading the head.
LARGE_CHUNK = 2**26


def chunk_of(device: torch.device) -> int:
    """Returns the number of logits that are in memory at once, where none is given."""
    return CHUNK if device.type == "cpu" else LARGE_CHUNK


class ScoredTokens(NamedTuple):
    """Results for each scored token.

    Attributes:
        logprobs: (N,) log-softmax of the logits at the token, in fp32 (float64 for float64 input).
        entropies: (N,) entropy of the distribution that the token was sampled from, in nats, or None.
        correct: (N,) bool, whether the token is the most probable one; no gradient.
        loss: Scalar weighted sum of ``-logprobs`` plus z-loss, or None without weights.
        z_loss: (N,) each token's z-loss, or None without z-loss; no gradient.
        values: (N,) a value head's values before each token, in at least fp32, or None without such a head.
        last_values: (S,) its values after each sequence's last token, or None.
    """

    logprobs: Tensor
    entropies: Tensor | None
    correct: Tensor
    loss: Tensor | None = None
    z_loss: Tensor | None = None
    values: Tensor | None = None
    last_values: Tensor | None = None


class VocabularySlice(NamedTuple):
    """The part of a head's vocabulary that this rank holds under tensor parallelism.

    Attributes:
        start: Id of the part's first token.
        widest: Number of tokens in the largest part. It decides how rows are split into blocks, of which all ranks must
            make the same number.
        group: Process group of the ranks that hold the parts.
    """

    start: int
    widest: int
    group: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> VocabularySlice:
        return self  # a process group cannot be copied, and the copy of a module has the same


class _Head(NamedTuple):
    """The function from hidden states to logits, and its derivative."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None
    temperature: float
    part: VocabularySlice | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns (n, V) logits for the softmax, from (n, D) hidden states."""
        logits = F.linear(hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.softcap is not None:
            logits = torch.tanh(logits.mul_(self.scale / self.softcap)).mul_(self.softcap / self.temperature)
        elif self.scale != self.temperature:
            logits = logits.mul_(self.scale / self.temperature)
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """Returns the derivative of :meth:`logits` with respect to ``hidden @ weight.T``, computed from its output."""
        if self.softcap is None:
            return self.scale / self.temperature
        cap = self.softcap
        return (1 - (logits * (self.temperature / cap)).square()).mul_(self.scale / self.temperature)


class _Block(NamedTuple):
    """One block of rows, with the values that callers need."""

    rows: slice
    log_p: Tensor  # (n, V)
    log_z: Tensor | None  # (n,) log of the softmax's denominator, for the z-loss
    slope: Tensor | float  # derivative of the logits with respect to the head's product, for gradients
    target: Tensor  # (n,) index of each target in V
    held: Tensor | None = None  # (n,) bool, whether V has the target; None if it always has


def rows_of_blocks(count: int, most: int) -> Iterator[slice]:
    """Yields the rows of each block. ``plan`` puts another in its place, since blocks are alike.

    Args:
        count: Number of rows.
        most: Rows of a block.
    """
    for start in range(0, count, most):
        yield slice(start, min(start + most, count))


def _blocks(
    hidden: Tensor,
    target: Tensor,
    head: _Head,
    chunk: int,
    out: ScoredTokens | None,
    gradient: bool,
    log_z: bool = False,
    known_log_z: Tensor | None = None,
) -> Iterator[_Block]:
    """Computes the logits block by block, fills ``out``, and yields each block's log-probabilities.

    Where the vocabulary is cut, ``log_z`` is always computed, and nothing is exchanged if the caller knows it.
    """
    if head.part is not None:
        yield from _blocks_of_part(hidden, target, head, head.part, chunk, out, gradient, known_log_z)
        return
    for s in rows_of_blocks(hidden.shape[0], max(1, chunk // head.weight.shape[0])):
        logits = head.logits(hidden[s])
        slope = head.slope(logits) if gradient else 1.0
        top = logits.amax(-1)
        if out is not None:
            out.correct[s] = logits.gather(-1, target[s, None])[:, 0] >= top
        log_p = logits.sub_(top[:, None])
        total = log_p.exp().sum(-1, keepdim=True).log_()
        log_p.sub_(total)
        if out is not None:
            out.logprobs[s] = log_p.gather(-1, target[s, None])[:, 0]
            if out.entropies is not None:
                out.entropies[s] = -(log_p.exp() * log_p).sum(-1)
        yield _Block(s, log_p, top + total[:, 0] if log_z else None, slope, target[s])


def _blocks_of_part(
    hidden: Tensor,
    target: Tensor,
    head: _Head,
    part: VocabularySlice,
    chunk: int,
    out: ScoredTokens | None,
    gradient: bool,
    known_log_z: Tensor | None,
) -> Iterator[_Block]:
    """As :func:`_blocks`, where other ranks hold the other logits of each row."""
    width = head.weight.shape[0]
    for s in rows_of_blocks(hidden.shape[0], max(1, chunk // part.widest)):
        at = target[s] - part.start
        held = (at >= 0) & (at < width)
        at = at.clamp(0, width - 1)
        logits = head.logits(hidden[s])
        slope = head.slope(logits) if gradient else 1.0
        if known_log_z is not None:
            yield _Block(s, logits.sub_(known_log_z[s, None]), known_log_z[s], slope, at, held)
            continue
        top = logits.amax(-1)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=part.group)
        logits.sub_(top[:, None])
        exp = logits.exp()
        sums = [exp.sum(-1), logits.gather(-1, at[:, None])[:, 0].mul_(held)]
        if out is not None and out.entropies is not None:
            sums.append(exp.mul_(logits).sum(-1))
        whole = torch.stack(sums)
        dist.all_reduce(whole, group=part.group)
        total = whole[0].log()
        if out is not None:
            out.logprobs[s], out.correct[s] = whole[1] - total, whole[1] >= 0
            if out.entropies is not None:
                out.entropies[s] = total - whole[2] / whole[0]
        yield _Block(s, logits.sub_(total[:, None]), top + total, slope, at, held)


def _empty(hidden: Tensor, entropy: bool) -> ScoredTokens:
    n, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    make = hidden.new_empty
    return ScoredTokens(
        make(n, dtype=dtype), make(n, dtype=dtype) if entropy else None, make(n, dtype=torch.bool), None
    )


def _product_gradient(block: _Block, d_log_p: Tensor, d_log_z: Tensor | None = None) -> Tensor:
    """Computes the (n, V) gradient of the head's product from (n,) gradients of each target's log-prob and of log Z.

    d log p[t] / d logits = onehot(t) - p, and d log Z / d logits = p. It overwrites ``block.log_p``.
    """
    gradient = block.log_p.exp_().mul_((-d_log_p if d_log_z is None else d_log_z - d_log_p)[:, None])
    d_target = d_log_p if block.held is None else d_log_p * block.held
    gradient.scatter_add_(-1, block.target[:, None], d_target[:, None])
    return gradient if isinstance(block.slope, float) and block.slope == 1 else gradient.mul_(block.slope)


class _GradientSums:
    """Gradients of the head's inputs, summed over blocks in fp32 and cast once."""

    def __init__(self, hidden: Tensor, head: _Head, wanted: tuple[bool, bool, bool]) -> None:
        self.inputs = hidden, head
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=dtype) if wanted[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=dtype) if wanted[2] and head.bias is not None else None

    def add(self, rows: slice, gradient: Tensor) -> None:
        hidden, head = self.inputs
        low = gradient.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] = low @ head.weight
        if self.weight is not None:
            if self.weight.dtype == hidden.dtype:
                self.weight.addmm_(low.T, hidden[rows])
            else:
                self.weight += low.T @ hidden[rows]
        if self.bias is not None:
            self.bias += gradient.sum(0)

    def cast(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        _, head = self.inputs
        _sum_parts(head, self.hidden)
        weight = None if self.weight is None else self.weight.to(head.weight.dtype)
        bias = None if self.bias is None or head.bias is None else self.bias.to(head.bias.dtype)
        return self.hidden, weight, bias


def _sum_parts(head: _Head, *gradients: Tensor | None) -> None:
    """Adds the gradients of hidden states in place that come from other parts of the vocabulary."""
    for gradient in gradients if head.part is not None else ():
        if gradient is not None:
            dist.all_reduce(gradient, group=head.part.group)  # type: ignore[union-attr]


class _LinearLogprobs(torch.autograd.Function):
    """Log-probs and entropies with arbitrary gradients.

    With a trainable head, the backward pass computes the blocks of logits again. With a frozen head (LoRA), the forward
    pass computes each token's Jacobian ``d log p / d hidden``, a row of D numbers, from the logits. This Jacobian is
    enough for any gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        scale, softcap, temperature, entropy, chunk, part, grad = options
        head = _Head(weight, bias, scale, softcap, temperature, part)
        out = _empty(hidden, entropy)
        log_z = torch.empty_like(out.logprobs) if part is not None else None
        ctx.set_materialize_grads(False)  # entropies without a gradient then take no time in the backward pass
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        jacobian = grad and frozen and hidden.requires_grad
        d_logprobs = torch.empty_like(hidden) if jacobian else None
        d_entropies = torch.empty_like(hidden) if jacobian and entropy else None
        for block in _blocks(hidden, target, head, chunk, out, gradient=jacobian):
            s = block.rows
            if log_z is not None and block.log_z is not None:
                log_z[s] = block.log_z
            if d_entropies is not None and out.entropies is not None:
                d = _entropy_gradient(block, out.entropies[s])
                d_entropies[s] = d.mul_(block.slope).to(hidden.dtype) @ weight
            if d_logprobs is not None:
                d = _product_gradient(block, torch.ones_like(out.logprobs[s]))
                d_logprobs[s] = d.to(hidden.dtype) @ weight
        _sum_parts(head, d_logprobs, d_entropies)
        ctx.options, ctx.jacobian = options, jacobian
        if jacobian:
            ctx.save_for_backward(d_logprobs, d_entropies)
        else:
            ctx.save_for_backward(hidden, weight, bias, target, out.entropies, log_z)
        ctx.mark_non_differentiable(out.correct)
        return out.logprobs, out.entropies, out.correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        d_logprob, d_entropy = grads[0], grads[1]
        scale, softcap, temperature, _, chunk, part, _ = ctx.options
        if ctx.jacobian:
            by_logprob, by_entropy = ctx.saved_tensors
            d_hidden = by_logprob * d_logprob[:, None] if d_logprob is not None else torch.zeros_like(by_logprob)
            if by_entropy is not None and d_entropy is not None:
                d_hidden = d_hidden + by_entropy * d_entropy[:, None]
            return d_hidden.to(by_logprob.dtype), None, None, None, None
        hidden, weight, bias, target, entropies, log_z = ctx.saved_tensors
        if d_logprob is None:
            d_logprob = torch.zeros_like(target, dtype=torch.promote_types(hidden.dtype, torch.float32))
        head = _Head(weight, bias, scale, softcap, temperature, part)
        sums = _GradientSums(hidden, head, ctx.needs_input_grad[:3])
        for block in _blocks(hidden, target, head, chunk, None, gradient=True, known_log_z=log_z):
            s = block.rows
            extra = None
            if entropies is not None and d_entropy is not None:
                extra = _entropy_gradient(block, entropies[s]).mul_(block.slope).mul_(d_entropy[s, None])
            gradient = _product_gradient(block, d_logprob[s])
            sums.add(s, gradient if extra is None else gradient.add_(extra))
        return (*sums.cast(), None, None)


def _entropy_gradient(block: _Block, entropies: Tensor) -> Tensor:
    """Returns (n, V) d entropy / d logits = -p (log p + entropy)."""
    return block.log_p.exp().mul_(block.log_p + entropies[:, None]).neg_()


class _LinearNLL(torch.autograd.Function):
    """Weighted sum of ``-log p`` and z-loss. The forward pass also computes the gradients from the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        weights: Tensor,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
        scale, softcap, temperature, entropy, chunk, part, grad, z_loss = options
        head = _Head(weight, bias, scale, softcap, temperature, part)
        out = _empty(hidden, entropy)
        wanted = (grad and hidden.requires_grad, grad and weight.requires_grad, grad and ctx.needs_input_grad[2])
        sums = _GradientSums(hidden, head, wanted)
        penalty = torch.empty_like(out.logprobs) if z_loss else None
        for block in _blocks(hidden, target, head, chunk, out, gradient=any(wanted), log_z=penalty is not None):
            s, d_log_z = block.rows, None
            if penalty is not None and block.log_z is not None:
                penalty[s] = z_loss * block.log_z.square()
                d_log_z = 2 * z_loss * weights[s] * block.log_z
            if any(wanted):
                sums.add(s, _product_gradient(block, -weights[s], d_log_z))
        ctx.gradients = sums.cast()
        loss = -(weights * out.logprobs).sum()
        if penalty is not None:
            loss = loss + (weights * penalty).sum()
        ctx.mark_non_differentiable(*(t for t in (*out, penalty) if t is not None))
        return loss, out.logprobs, out.entropies, out.correct, penalty

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_nll can be differentiated only once. Call it again for a second backward pass.")
        gradients, ctx.gradients = ctx.gradients, None
        # in place, because a copy of the weight's gradient would be the largest tensor of the step
        return (*(None if g is None else g.mul_(grads[0]) for g in gradients), None, None, None)


def _prepare(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    if hidden.dim() != 2 or weight.dim() != 2 or target.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden must be (N, D), weight (V, D) and target (N,); got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)} and {tuple(target.shape)}."
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    device = hidden.device.type
    # Cast here, so that autograd casts the gradient back; inside a Function autocast is off.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    hidden, weight = without_subclass(hidden.to(dtype)), without_subclass(weight.to(dtype))
    return hidden, weight, None if bias is None else without_subclass(bias.to(dtype))


@uncompiled  # the number of its loops depends on the number of tokens
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    chunk: int | None = None,
    part: VocabularySlice | None = None,
) -> ScoredTokens:
    """Computes log-probs of ``target`` under ``softmax(f(hidden @ weight.T + bias) / temperature)``.

    ``f`` multiplies by ``scale`` and, with a ``softcap`` c, maps x to ``c * tanh(x / c)`` (Gemma 2). The result is
    differentiable with respect to ``hidden``, ``weight`` and ``bias``. For a tied weight autograd adds both gradients.

    Args:
        hidden: (N, D) hidden states at the positions that predict the scored tokens.
        weight: (V, D) effective weight of the head, a LoRA delta included.
        target: (N,) ids of the scored tokens.
        bias: (V,) or None.
        temperature: The sampling temperature, by which logits are divided.
        scale: Factor that some model families apply to logits.
        softcap: Bound of soft-capped logits.
        entropy: Also return entropies.
        chunk: Number of logits in memory at once, but at least one row of V. A larger value takes more memory, and
            reads the weight less often. None: :func:`chunk_of` the device.
        part: Under tensor parallelism, the part of the vocabulary that ``weight`` and ``bias`` hold. All ranks of its
            group must call, with the same hidden states and targets; all get the results of the whole vocabulary.

    Returns:
        Log-probs, entropies (or None), and whether each target is the arg max.

    Raises:
        ValueError: Shapes do not fit, or the temperature is not positive.

    Example:
        >>> hidden, weight = torch.eye(2), torch.eye(2)
        >>> linear_logprobs(hidden, weight, torch.tensor([0, 0])).logprobs
        tensor([-0.3133, -1.3133])
    """
    hidden, weight, bias = _prepare(hidden, weight, bias, target, temperature)
    chunk = chunk_of(hidden.device) if chunk is None else chunk
    options = (scale, softcap, temperature, entropy, chunk, part, torch.is_grad_enabled())
    logprobs, entropies, correct = _LinearLogprobs.apply(hidden, weight, bias, target, options)  # type: ignore[no-untyped-call]
    return ScoredTokens(logprobs, entropies, correct)


@uncompiled  # the number of its loops depends on the number of tokens
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    chunk: int | None = None,
    part: VocabularySlice | None = None,
    z_loss: float = 0.0,
) -> ScoredTokens:
    """Computes the weighted negative log-likelihood ``-sum(weights * logprobs)`` and its gradient in one pass.

    A ``z_loss`` c adds ``c * sum(weights * log(Z)^2)``, where Z is the softmax's denominator (Chowdhery et al. 2022,
    PaLM, section 5). Only ``loss`` has a gradient, and can be differentiated once.

    Args:
        hidden: (N, D) hidden states; see :func:`linear_logprobs` for this and the other arguments.
        weight: (V, D) weight of the head.
        target: (N,) ids of the scored tokens.
        weights: (N,) weight of each token in the loss; constants.
        bias: (V,) or None.
        temperature: The sampling temperature.
        scale: Factor on the logits.
        softcap: Bound of soft-capped logits.
        entropy: Also return entropies.
        chunk: Number of logits in memory at once. None: :func:`chunk_of` the device.
        part: The part of a vocabulary that is cut over ranks.
        z_loss: Weight of the z-loss. A larger value keeps Z closer to 1; 0: no z-loss.

    Returns:
        Scored tokens with ``loss``, and with ``z_loss`` if it is not 0.

    Raises:
        ValueError: Shapes do not fit, the temperature is not positive, or ``z_loss`` is negative.
    """
    if z_loss < 0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}.")
    hidden, weight, bias = _prepare(hidden, weight, bias, target, temperature)
    weights = weights.detach().to(torch.promote_types(hidden.dtype, torch.float32))
    chunk = chunk_of(hidden.device) if chunk is None else chunk
    options = (scale, softcap, temperature, entropy, chunk, part, torch.is_grad_enabled(), z_loss)
    out = _LinearNLL.apply(hidden, weight, bias, target, weights, options)  # type: ignore[no-untyped-call]
    loss, logprobs, entropies, correct, penalty = out
    return ScoredTokens(logprobs, entropies, correct, loss, penalty)
