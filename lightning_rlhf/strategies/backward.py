"""Backward passes of losses that depend on any parameters of any sharded optimizers.

ColossalAI reduces gradients in buckets that fill up in the order of each rank's own graph. If one rank's loss does not
depend on a parameter of another's, buckets of different parameters would be added up. So ranks first compare which
parameters their losses depend on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rlhf.strategies.gemini import GeminiBoosted
from lightning_rlhf.strategies.sharded import Boosted, ZeroBoosted

#: The node of a checkpointed layer with use_reentrant=True, whose parameters are not in the graph.
_REENTRANT = "CheckpointFunctionBackward"


def find_parameters(loss: Tensor) -> tuple[set[int], bool]:
    """Finds the parameters that a loss depends on.

    Args:
        loss: The loss.

    Returns:
        The ids of all leaves of its graph, and whether parts of the graph are hidden by reentrant checkpoints.
    """
    if loss.grad_fn is None:
        return {id(loss)}, False
    found, hidden, seen, left = set(), False, {loss.grad_fn}, [loss.grad_fn]
    while left:
        node = left.pop()
        variable = getattr(node, "variable", None)  # of nodes that accumulate gradients
        if variable is not None:
            found.add(id(variable))
        hidden |= node.name() == _REENTRANT
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                left.append(following)
    return found, hidden


def digest(numbers: Iterable[int]) -> int:
    """Returns a number of 56 bits that differs, in all likelihood, for other numbers or another order."""
    return int.from_bytes(hashlib.blake2b(repr(list(numbers)).encode(), digest_size=7).digest(), "big")


class Backward:
    """Runs backward passes, and reduces gradients over ranks.

    Args:
        boosted: The sharded optimizers.
        device: The device of collectives.
    """

    def __init__(self, boosted: Sequence[Boosted], device: torch.device) -> None:
        self._boosted, self._device = boosted, device
        self._group = boosted[0].ranks.group  # other ranks of a copy may hold other parameters
        every = (slot.parameter for b in boosted for slot in b.slots)
        self._numbers = {id(p): number for number, p in enumerate(every)}

    def run(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs a backward pass.

        Args:
            loss: The scalar loss, which may depend on parameters of several optimizers.
            args: Further arguments of ``Tensor.backward``.
            kwargs: The same.

        Raises:
            RuntimeError: The loss depends on no trained parameter, or the plugin cannot do what is asked.
        """
        found, hidden = find_parameters(loss) if loss.requires_grad else (set(), False)
        mine = sorted(self._numbers[i] for i in found if i in self._numbers)
        used = [b for b in self._boosted if hidden or any(id(slot.parameter) in found for slot in b.slots)]
        for b in self._boosted:
            b.check_trained()
        alike = True
        if self._synchronizes:
            alike = self._compare(mine, loss.requires_grad, hidden)
        elif not used:
            raise self._nothing()
        if len(used) > 1 and any(b.scale != 1 for b in used):
            raise RuntimeError(
                f"The loss depends on {', '.join(b.label for b in used)}, but with 16-mixed each optimizer scales its "
                "loss by its own factor, so a backward pass may reach one optimizer only. Run the others under "
                "no_grad, or use bf16-mixed."
            )
        with ExitStack() as stack:
            for b in self._boosted:
                stack.enter_context(b.backward_pass())
            if isinstance(self._boosted[0], GeminiBoosted):
                self._run_gemini(loss, used, alike, args, kwargs)
            else:
                self._run_zero(loss, used, alike, args, kwargs)

    def skip(self) -> None:
        """Takes part without a loss: ``training_step`` has returned None on this rank.

        Raises:
            RuntimeError: Other ranks have a loss.
        """
        if self._synchronizes:
            self._compare([], None, False)
        for b in self._boosted:
            b.release()

    @property
    def _synchronizes(self) -> bool:
        return all(b.synchronizes for b in self._boosted)

    def _nothing(self) -> RuntimeError:
        return RuntimeError(
            "The loss does not depend on a trained parameter. Trained by optimizers: "
            f"{', '.join(b.label for b in self._boosted)}."
        )

    def _compare(self, mine: list[int], has_loss: bool | None, hidden: bool) -> bool:
        """Whether all ranks' losses depend on the same parameters.

        Args:
            mine: Numbers of the parameters that this rank's loss depends on.
            has_loss: Whether this rank's loss has a graph. None: it has no loss.
            hidden: Whether parts of the graph are unknown.

        Raises:
            RuntimeError: No rank's loss depends on a parameter, a rank has no loss, or gradients came in another order.
        """
        pending = [self._numbers[id(p)] for b in self._boosted for p in b.pending()]
        state = 0 if has_loss else 1 if has_loss is None else 2
        own = [digest([*mine, -1, *sorted(pending)]), digest(n for b in self._boosted for n in b.order()), state]
        own += [int(bool(mine) or hidden)]
        flat = torch.tensor([*own, *(-v for v in own)], dtype=torch.int64, device=self._device)
        dist.all_reduce(flat, dist.ReduceOp.MAX, group=self._group)
        most, least = flat[: len(own)].tolist(), (-flat[len(own) :]).tolist()
        if least[2] == most[2] == 1:
            return True
        if most[2]:
            what = "training_step returned None" if most[2] == 1 else "the loss has no gradient"
            raise RuntimeError(
                f"On some ranks {what}, but under ColossalAI a rank cannot skip a backward pass, because the others "
                "wait for its gradients. Return a loss of zero that depends on the model, such as 0 * out.sum()."
            )
        if not most[3]:
            raise self._nothing()
        if most[1] != least[1]:
            raise RuntimeError(
                "Ranks ran different layers, or in another order, so ColossalAI exchanged different parameters "
                "together. Run the same layers in the same order on all ranks, or use ddp."
            )
        if hidden:
            return True
        return most[0] == least[0] and not {*pending} - {*mine}

    def _run_zero(
        self, loss: Tensor, used: list[Boosted], alike: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        units = [b for b in self._boosted if isinstance(b, ZeroBoosted)]
        if used and (mixin := getattr(used[0].wrapped, "mixed_precision_mixin", None)) is not None:
            loss = mixin.pre_backward(loss)
        with ExitStack() as stack:
            if not alike:
                for b in units:
                    stack.enter_context(b.wrapped.no_sync())
            loss.backward(*args, **kwargs)
        if not alike:
            parameters = [slot.parameter for b in units for slot in b.slots]
            has = torch.tensor([int(p.grad is not None) for p in parameters], device=self._device)
            dist.all_reduce(has, dist.ReduceOp.MAX, group=self._group)
            wanted = {id(p) for p, there in zip(parameters, has.tolist(), strict=True) if there}
            for b in units:
                b.add_all(wanted)
        for b in units:
            b.flush()

    def _run_gemini(
        self, loss: Tensor, used: list[Boosted], alike: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not alike:
            raise RuntimeError(
                "Losses of different ranks depend on different parameters, which Gemini does not allow. Let all ranks "
                "run the same layers, or use zero2."
            )
        if args or any(kwargs.values()):
            raise RuntimeError(f"Gemini's backward pass takes no arguments but the loss; got {args or kwargs}.")
        units = [b for b in self._boosted if isinstance(b, GeminiBoosted)]
        for b in used:
            loss = b.wrapped.mix_precision_mixin.pre_backward(loss)
        GeminiBoosted.run_backward(units, loss)
