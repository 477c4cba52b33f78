"""A child module and its optimizer under a ColossalAI plugin, with this rank's shards of them.

Each ColossalAI plugin shards the flattened weights of a child in its own way. This module gives both ways one
interface: a :class:`Slot` is a trained parameter, and a :class:`LocalShard` is this rank's part of it. So clipping,
checkpoints and export are written once.

ColossalAI has no public methods for the reduced gradients of a ZeRO optimizer and of Gemini's chunks, and for the
position of a parameter in a chunk. These are read from its objects. ``tests/strategies`` compares each of them with a
single process, and fails if a new version of ColossalAI changes them.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from lightning_rlhf.strategies.parallel import Cuts
from lightning_rlhf.utils.collectives import replica_ranks


class Slot(NamedTuple):
    """A trained parameter.

    Attributes:
        name: Name in the child.
        number: Index among all parameters of the optimizer, which is its key in torch's optimizer states.
        group: Index of its parameter group.
        parameter: The child's parameter, which forward passes read.
        shape: Shape of the parameter, or of this rank's slice of it (tensor parallelism).
        dtype: Original data type, which exports keep.
    """

    name: str
    number: int
    group: int
    parameter: nn.Parameter
    shape: torch.Size
    dtype: torch.dtype


class LocalShard(NamedTuple):
    """This rank's part of a slot.

    Attributes:
        start: First element of the flattened parameter.
        size: Number of elements. Further elements of the tensors are padding.
        weight: (size or more,) weights that the optimizer updates.
        key: Key in the optimizer's ``state``.
        replicated: Whether every rank holds the same elements.
    """

    start: int
    size: int
    weight: Tensor
    key: Tensor
    replicated: bool = False


class _Holder(nn.Module):
    """What a plugin wraps: the parameters. Passes run the child itself."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child


class Boosted(ABC):
    """An optimizer and the child of the LightningModule that it trains, sharded by a plugin.

    The child keeps its class and its names. Hooks cast the inputs of its calls, and of direct calls of its submodules.
    :meth:`unboost` undoes everything.

    Args:
        path: Path of the child in the LightningModule. Empty: the child is a container, as :func:`container` makes it.
        child: The child.
        optimizer: An optimizer of the child's parameters.
        plugin: A ColossalAI plugin.
        dtype: Data type to which the plugin casts weights. None: weights are not cast.
        master_weights: Whether the optimizer updates fp32 copies of the weights.
        cuts: What the ranks of a copy hold of its models. None: each holds all.
    """

    def __init__(
        self,
        path: str,
        child: nn.Module,
        optimizer: Optimizer,
        plugin: Any,
        dtype: torch.dtype | None = None,
        master_weights: bool = False,
        cuts: Cuts | None = None,
    ) -> None:
        from colossalai.booster import Booster

        self.ranks, self.cuts = replica_ranks(), cuts
        self.path, self.child, self.master_weights = path, child, master_weights
        self.parts: dict[str, nn.Module | nn.Parameter] = {path: child} if path else vars(child)["placed"]
        self._dtype, self._in_backward, self._depth = dtype, False, 0
        self._outermost: nn.Module | None = None  # what is called now
        self._called: set[int] = set()  # ids of modules that were called directly
        self._fired: list[int] = []  # numbers of parameters with new gradients, in their order
        self.original = optimizer
        self.bypass = False  # whether calls are left alone
        self.has_gradients = False  # whether there are gradients for the next step
        names = {id(p): name for name, p in child.named_parameters()}
        every = [(g, p) for g, group in enumerate(optimizer.param_groups) for p in group["params"]]
        self.slots = [
            Slot(names[id(p)], i, g, p, p.shape, p.dtype) for i, (g, p) in enumerate(every) if p.requires_grad
        ]
        absent = cuts.is_absent if cuts is not None else lambda p: False
        self._trainable = {id(p): p.requires_grad or absent(p) for p in child.parameters()}
        edges = itertools.accumulate((len(group["params"]) for group in optimizer.param_groups), initial=0)
        # ColossalAI replaces these lists' parameters in the groups
        self.group_parameters = [list(group["params"]) for group in optimizer.param_groups]
        self.indices = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
        constants = _constant_buffers(child) if dtype is not None else {}
        # the plugins cast the whole child; these are only references, because the plugins make new tensors
        self._buffer_dtypes = [(module, name, buffer.dtype) for module, name, buffer in named_buffers(child)]
        self._original_data = {id(p): p.data for p in child.parameters()}
        self._guards: list[Any] = [
            slot.parameter.register_post_accumulate_grad_hook(partial(self._note_gradient, i))
            for i, slot in enumerate(self.slots)
        ]
        self.booster = Booster(plugin=plugin)
        self.model, self.wrapped, *_ = self.booster.boost(_Holder(child), self.prepare(optimizer))
        self.attach()
        for (module, name), buffer in constants.items():
            module._buffers[name] = buffer.to(module._buffers[name].device)  # type: ignore[union-attr]
        for slot in self.slots:
            given = self._original_data.pop(id(slot.parameter))
            if master_weights:  # ColossalAI makes master weights from the 16-bit weights
                self.set_shard(slot, partial(given.reshape(-1).narrow, 0))
        cast = {id(p) for p in child.parameters() if p.dtype != self._original_data.get(id(p), p).dtype}
        self._original_data = {i: weight for i, weight in self._original_data.items() if i in cast}
        if dtype is not None:
            self._watch_calls()

    def _watch_calls(self) -> None:
        """Lets calls of the child, and direct calls of its submodules, cast their inputs."""
        for top in self.parts.values():
            if not isinstance(top, nn.Module):
                continue
            casts = bool(getattr(top, "cast_inputs", True))
            for part in top.modules():
                if any(True for _ in part.parameters()):
                    # functions instead of methods, so that a copy of the module does not copy self
                    before = lambda part, args, kwargs, casts=casts: self._before(part, args, kwargs, casts)  # noqa: E731
                    after = lambda part, args, output: self._after(part)  # noqa: E731
                    self._guards.append(part.register_forward_pre_hook(before, with_kwargs=True))
                    self._guards.append(part.register_forward_hook(after, always_call=True))

    def _before(self, part: nn.Module, args: Any, kwargs: Any, casts: bool) -> tuple[Any, Any] | None:
        if self.bypass:
            return None
        if self._outermost is not None:
            self._depth += part is self._outermost
            return None
        if self._in_backward and id(part) not in self._called:
            return None  # a checkpointed layer, which runs again as a part of a call
        self.begin(part)
        self._outermost, self._depth = part, 1
        self._called.add(id(part))
        if not casts:
            return None
        cast = lambda t: t.to(self._dtype) if t.is_floating_point() else t  # noqa: E731
        cast_args, cast_kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return cast_args, cast_kwargs

    def _after(self, part: nn.Module) -> None:
        if part is not self._outermost:
            return
        self._depth -= 1
        if self._depth == 0:
            self._outermost = None
            self.end()

    def begin(self, part: nn.Module) -> None:
        """Prepares a call.

        Raises:
            RuntimeError: The plugin does not support it.
        """
        return

    def end(self) -> None:
        """Ends a call."""
        return

    def release(self) -> None:
        """Releases what a pass that has no backward pass has gathered."""
        return

    def pending(self) -> list[nn.Parameter]:
        """Returns parameters with gradients of former passes that were not reduced yet."""
        return []

    def order(self) -> list[int]:
        """Returns what was exchanged since the last call, which must be the same on all ranks."""
        found, self._fired = self._fired, []
        return found

    @property
    def synchronizes(self) -> bool:
        """Whether the next backward pass exchanges gradients."""
        return True

    @property
    def label(self) -> str:
        """The names of what the optimizer trains, for messages."""
        names = list(self.parts)
        return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")

    def full_name(self, name: str) -> str:
        """Returns the name in the LightningModule of a parameter of the child."""
        return f"{self.path}.{name}" if self.path else name

    def _note_gradient(self, number: int, parameter: Tensor) -> None:
        """Notes that a parameter has got a gradient.

        Raises:
            RuntimeError: Its gradient is sparse, or the strategy does not know of the backward pass.
        """
        name = self.full_name(self.slots[number].name)
        if not self._in_backward:
            raise RuntimeError(
                f"{name} got a gradient outside of a backward pass of the strategy. Call self.manual_backward(loss) "
                "instead of loss.backward()."
            )
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise RuntimeError(
                f"{name} has a sparse gradient, which ColossalAI cannot shard. Set sparse=False in its nn.Embedding."
            )
        self.note_gradient(number)

    @abstractmethod
    def note_gradient(self, number: int) -> None:
        """Notes that a slot, by its number, has got a gradient."""

    def prepare(self, optimizer: Optimizer) -> Optimizer:
        """Returns an optimizer that the plugin supports."""
        return optimizer

    def attach(self) -> None:
        """Notes the objects that the plugin has made."""
        return

    def check_trained(self) -> None:
        """Checks before a backward pass that no parameter is trained that was frozen at the start of ``fit``.

        Raises:
            RuntimeError: There is such a parameter.
        """
        named = self.child.named_parameters()
        changed = [name for name, p in named if p.requires_grad and not self._trainable.get(id(p), False)]
        if changed:
            raise RuntimeError(
                f"{self.full_name(changed[0])} is trained now, but was frozen at the start of fit, when ColossalAI "
                f"shards parameters ({len(changed)} such parameters). Set requires_grad before fit, or use ddp."
            )

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Within it, gradients may come, and checkpointed layers run again."""
        former, self._in_backward = self._in_backward, True
        try:
            yield
        finally:
            self._in_backward = former

    def sync_master_weights(self) -> None:
        """Copies changes of the weights since the last step, such as averages or bounds, to the fp32 weights.

        Unchanged weights are the rounded fp32 weights.
        """
        for slot in self.slots if self.master_weights else ():
            shard = self.local_shard(slot)
            if shard is not None and shard.size:
                stepped = shard.weight[: shard.size]
                stepped.copy_(_keep_digits(stepped, self.working_weight(slot, shard)))

    def frozen(self) -> dict[str, Tensor]:
        """Returns cast parameters that are not trained, in their original data type, by all their names."""
        named = self.child.named_parameters(remove_duplicate=False)
        given = self._original_data
        return {name: _keep_digits(given[id(p)], p.data).cpu() for name, p in named if id(p) in given}

    @property
    def device(self) -> torch.device:
        """The device of collectives."""
        device = next(self.child.parameters()).device
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else device

    # ------------------------------------------------------------------------------------------------- training

    def no_sync(self) -> AbstractContextManager[None]:
        """Within it, backward passes do not reduce gradients, if the plugin allows it."""
        return cast(AbstractContextManager[None], self.booster.no_sync(self.model, self.wrapped))

    def step(self) -> None:
        """Steps the optimizer, unless there was no backward pass."""
        if self.has_gradients:
            self.sync_master_weights()
            self.wrapped.step()
        self.has_gradients = False

    def zero_grad(self) -> None:
        """Clears gradients."""
        self.wrapped.zero_grad()
        self.has_gradients = False

    # ------------------------------------------------------------------------------------------------- shards

    @abstractmethod
    def local_shard(self, slot: Slot) -> LocalShard | None:
        """Returns this rank's part of a slot, or None."""

    @abstractmethod
    def gradient(self, slot: Slot, shard: LocalShard) -> Tensor | None:
        """Returns the shard's (size or more,) reduced gradient, multiplied by :attr:`scale`, or None."""

    @abstractmethod
    def working_weight(self, slot: Slot, shard: LocalShard) -> Tensor:
        """Returns a view of the weights that forward passes read, for the shard's elements."""

    @property
    def scale(self) -> float:
        """Factor of gradients, against underflow in fp16."""
        mixin = getattr(self.wrapped, "mixed_precision_mixin", getattr(self.wrapped, "mix_precision_mixin", None))
        return float(getattr(mixin, "loss_scale", 1.0))

    def gradients(
        self, parameters: Collection[nn.Parameter] | None = None
    ) -> Iterator[tuple[Slot, LocalShard, Tensor]]:
        """Yields this rank's shards with their slots and gradients, for some parameters or for all."""
        wanted = None if parameters is None else {id(p) for p in parameters}
        for slot in self.slots:
            if wanted is None or id(slot.parameter) in wanted:
                shard = self.local_shard(slot)
                gradient = None if shard is None else self.gradient(slot, shard)
                if shard is not None and gradient is not None:
                    yield slot, shard, gradient

    def grad_squares(self, parameters: Collection[nn.Parameter] | None = None) -> Tensor:
        """Returns the (1,) sum of squared gradients over all ranks, in fp64."""
        total = torch.zeros(2, 3, dtype=torch.float64, device=self.device)
        for slot, shard, gradient in self.gradients(parameters):  # summed on the device, to wait for it only once
            kind = 0 if self.cuts is None else self.cuts.kind(slot.parameter)
            total[int(shard.replicated), kind] += gradient.float().norm().double().to(self.device) ** 2
        dist.all_reduce(total[0], group=self.ranks.group)
        squares = total.sum(0)
        squares = squares.sum() if self.cuts is None else self.cuts.sum_squares(squares)
        return squares[None].cpu() / self.scale**2

    def state(self, key: Tensor) -> dict[str, Any]:
        """Returns the optimizer's state of a shard."""
        found: dict[str, Any] = self.wrapped.optim.state.get(key, {})
        return found

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, to which schedulers write."""
        groups: list[dict[str, Any]] = self.wrapped.optim.param_groups
        return groups

    def set_value(self, slot: Slot, read: Callable[[int, int], Tensor]) -> None:
        """Sets a parameter on this rank, with its fp32 weights.

        Args:
            slot: The parameter.
            read: ``read(start, size)`` returns this part of the flattened new value.
        """
        slot.parameter.data.copy_(read(0, slot.shape.numel()).view(slot.shape))
        self.set_shard(slot, read)

    def set_shard(self, slot: Slot, read: Callable[[int, int], Tensor]) -> None:
        """Sets this rank's shard of a parameter; see :meth:`set_value`."""
        shard = self.local_shard(slot)
        if shard is not None and shard.size:
            shard.weight[: shard.size].copy_(read(shard.start, shard.size))
            self.working_weight(slot, shard).copy_(shard.weight[: shard.size])

    # ------------------------------------------------------------------------------------------------- whole tensors

    def gather(self, slot: Slot, select: Callable[[LocalShard], Tensor], everywhere: bool = False) -> Tensor | None:
        """Gathers a tensor from the shards of all ranks with the same weights, in at least fp32.

        Where tensor parallelism cuts the parameter, it is this rank's slice.

        Args:
            slot: The parameter.
            select: Returns a shard's (size or more,) tensor, such as the weight or a state.
            everywhere: Gather on every rank. Otherwise only the first rank gets the tensor, and the others get None.
        """
        shard = self.local_shard(slot)
        flat = torch.zeros(slot.shape.numel(), dtype=torch.promote_types(slot.dtype, torch.float32))
        if shard is not None and (self.ranks.place == 0 or not shard.replicated):
            flat[shard.start : shard.start + shard.size] = select(shard)[: shard.size].to(flat)
        flat = flat.to(self.device)
        if everywhere:
            dist.all_reduce(flat, group=self.ranks.group)
        else:
            dist.reduce(flat, self.ranks.members[0], group=self.ranks.group)
        return flat.view(slot.shape).cpu() if everywhere or self.ranks.place == 0 else None

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it, each rank can call the child alone, with whole weights. All ranks must enter and leave."""
        former, self.bypass = self.bypass, True
        try:
            with torch.no_grad():
                yield
        finally:
            self.bypass = former

    def unboost(self, weights: bool) -> None:
        """Makes the child an ordinary module again, whole on every rank.

        Args:
            weights: Gather the weights from all ranks. False if a rank may be lost; the weights are then lost too.
        """
        for guard in self._guards:
            guard.remove()
        self.detach()
        if weights:
            self.sync_master_weights()
            for slot in self.slots:
                value = self.gather(slot, lambda shard: shard.weight, everywhere=True)
                slot.parameter.data = value.to(slot.dtype)  # type: ignore[union-attr]
                slot.parameter.grad = None
        for p in self.child.parameters():
            if id(p) in self._original_data:
                p.data = _keep_digits(self._original_data[id(p)], p.data)
        for module, name, dtype in self._buffer_dtypes:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.dtype != dtype:
                module._buffers[name] = buffer.to(dtype)

    @abstractmethod
    def detach(self) -> None:
        """Removes the plugin's hooks from the child."""


class ZeroBoosted(Boosted):
    """A child under ZeRO-1 or ZeRO-2: each parameter is flattened, padded, and split into one shard per rank."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Has no effect under ZeRO-2, which reduces after each backward pass."""
        return nullcontext() if self.booster.plugin.stage == 2 else super().no_sync()

    @property
    def synchronizes(self) -> bool:
        """Whether the next backward pass exchanges gradients."""
        return bool(self.wrapped.require_grad_sync)

    def pending(self) -> list[nn.Parameter]:
        """Returns parameters with gradients of former passes that were not reduced yet."""
        return [slot.parameter for slot in self.slots if slot.parameter.grad is not None]

    def note_gradient(self, number: int) -> None:
        """Notes the order in which ColossalAI puts gradients into buckets."""
        self.has_gradients = True
        if self.wrapped.grad_handles and self.wrapped.require_grad_sync:
            self._fired.append(number)

    def add_all(self, wanted: Collection[int]) -> None:
        """Reduces gradients in one order on all ranks, of the parameters with these ids; zero where there are none."""
        for slot in self.slots:
            p = slot.parameter
            if id(p) in wanted:
                self.has_gradients = True
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                if self.wrapped.grad_handles:
                    self.wrapped._add_to_bucket(p, slot.group)

    def flush(self) -> None:
        """Reduces gradients that a backward pass left in buckets.

        ColossalAI's ``backward`` does this for one optimizer, but a graph may reach several.
        """
        if self.wrapped.require_grad_sync:
            self.wrapped._reduce_grad(self.wrapped._partition_grads)

    def local_shard(self, slot: Slot) -> LocalShard | None:
        """Returns this rank's part of the flattened parameter."""
        master = self.wrapped.get_working_to_master_map().get(id(slot.parameter))
        if master is None:
            return None
        start = self.ranks.place * master.numel()
        return LocalShard(start, max(0, min(master.numel(), slot.shape.numel() - start)), master, master)

    def gradient(self, slot: Slot, shard: LocalShard) -> Tensor | None:
        """Returns this rank's part of the reduced gradient."""
        store = self.wrapped.pid_to_grad_store[id(slot.parameter)]
        found = store.get_partitioned_gradients_by_param_id(slot.group, id(slot.parameter))
        if not found:
            return None
        index = 0 if self.booster.plugin.stage == 2 else store.local_rank
        gradient: Tensor = found[index]
        return gradient

    def working_weight(self, slot: Slot, shard: LocalShard) -> Tensor:
        """Returns this rank's part of the parameter, which is whole on every rank."""
        return slot.parameter.data.view(-1)[shard.start : shard.start + shard.size]

    def detach(self) -> None:
        """Removes the hooks that reduce gradients."""
        for handle in self.wrapped.grad_handles:
            handle.remove()


def container(parts: Mapping[str, nn.Module | nn.Parameter]) -> nn.Module:
    """Makes a module that holds children and parameters of a LightningModule under their own names.

    Args:
        parts: Children and parameters by their paths in the LightningModule.
    """
    root = nn.Module()
    for path, part in parts.items():
        *above, name = path.split(".")
        place = root
        for step in above:
            if step not in place._modules:
                place.add_module(step, nn.Module())
            place = place.get_submodule(step)
        if isinstance(part, nn.Parameter):
            place.register_parameter(name, part)
        else:
            place.add_module(name, part)
    vars(root)["placed"] = dict(parts)
    return root


def named_buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yields each buffer with its module and its name in that module."""
    for part in module.modules():
        yield from ((part, name, buffer) for name, buffer in part._buffers.items() if buffer is not None)


def is_persistent(module: nn.Module, name: str) -> bool:
    """Whether a checkpoint holds a module's buffer."""
    return name not in module._non_persistent_buffers_set


def _constant_buffers(child: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """Copies buffers that are not in checkpoints: constants such as rotary frequencies, which must not be cast."""
    return {
        (module, name): buffer.clone()
        for module, name, buffer in named_buffers(child)
        if buffer.is_floating_point() and not is_persistent(module, name)
    }


def _keep_digits(exact: Tensor, rounded: Tensor) -> Tensor:
    """Returns ``exact`` where ``rounded`` is unchanged, and ``rounded`` where it was written to."""
    exact = exact.to(rounded.device)
    return torch.where(rounded == exact.to(rounded.dtype), exact, rounded.to(exact.dtype))
