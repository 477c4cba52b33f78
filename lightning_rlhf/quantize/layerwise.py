"""Runs a model's decoder layers one after another, each on the outputs of those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.quantize.grid import blocks_of

BATCH = 8
"""Calibration rows of the same length that run together."""


class Call(NamedTuple):
    """What a decoder layer is called with besides hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stop(Exception):
    """Ends a forward pass that has shown what it was run for."""


class LayerwiseRun:
    """Calibration rows on their way through the decoder layers. Layers compute in fp32 on the given device.

    Args:
        model: The model on the CPU. Only the layer that runs is moved and cast; see :meth:`layer`.
        rows: Calibration rows, each a one-dimensional tensor of token ids.
        device: The device to compute on.

    Attributes:
        blocks: The decoder layers.
        hidden: (B, T, D) hidden states before the current layer, a tensor for each batch, on the CPU.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Tensor], device: torch.device) -> None:
        self.device = device
        self.blocks = blocks_of(model)[1]
        self.hidden: list[Tensor] = []
        self._calls: list[list[Call]] = []
        with _in_fp32(model.base_model, self.blocks, device):
            for ids in _batches(rows):
                states, calls = self._record(model.base_model, ids.to(device))
                self.hidden.append(states.cpu())
                self._calls.append(calls)

    @contextmanager
    def layer(self, i: int) -> Iterator[nn.Module]:
        """Within it, a layer is on the device and in fp32. Afterwards it has its former data type, on the CPU."""
        block = self.blocks[i]
        dtype = next(block.parameters()).dtype
        yield block.to(self.device, torch.float32)
        block.to("cpu", dtype)

    def calls(self, i: int) -> Iterator[tuple[Tensor, Call]]:
        """Yields (B, T, D) hidden states on the device, and what else the layer is called with, for each batch."""
        for states, calls in zip(self.hidden, self._calls, strict=True):
            yield states.to(self.device), calls[i]

    @torch.no_grad()
    def advance(self, i: int) -> None:
        """Runs a layer on all batches and keeps its outputs as the next layer's inputs."""
        for number, (states, call) in enumerate(self.calls(i)):
            found = self.blocks[i](states, *call.args, **call.kwargs)
            self.hidden[number] = (found[0] if isinstance(found, tuple) else found).cpu()

    def inputs_of(
        self, i: int, names: Sequence[str], read: Callable[[str, Tensor], None], batches: int | None = None
    ) -> None:
        """Runs a layer on all batches to read the inputs of some of its linear layers.

        Args:
            i: Number of the layer.
            names: Names of linear layers in it. The pass ends when the last of them was called.
            read: Called with a name and its (B, T, D_in) or (N, D_in) inputs.
            batches: Number of batches to run. Default: all.
        """

        def hook(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            read(name, args[0].detach())
            left.discard(name)
            if not left:
                raise _Stop

        handles = [self.blocks[i].get_submodule(n).register_forward_pre_hook(partial(hook, n)) for n in names]
        try:
            for states, call in islice(self.calls(i), batches):
                left = set(names)
                with torch.no_grad(), suppress(_Stop):
                    self.blocks[i](states, *call.args, **call.kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, decoder: nn.Module, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """Runs a decoder whose layers do nothing, and returns the first hidden states and each layer's call."""
        for as_tuple in (False, True):
            recorder = _Recorder(len(self.blocks), as_tuple)
            try:
                for block in self.blocks:
                    block.forward = recorder
                with torch.no_grad(), suppress(_Stop):
                    decoder(input_ids=ids, use_cache=False)
            finally:
                for block in self.blocks:
                    del block.forward
            if recorder.first is not None and len(recorder.calls) == len(self.blocks):
                return recorder.first, recorder.calls
        raise ValueError(f"{type(decoder).__name__} does not call its decoder layers one after another.")


class _Recorder:
    """Stands for every decoder layer: notes its call and returns its hidden states.

    What a layer returns, the states or a tuple of them, depends on the family and on transformers' version. With the
    wrong choice the next layer gets something of another shape, and the pass ends.
    """

    def __init__(self, count: int, as_tuple: bool) -> None:
        self.count, self.as_tuple = count, as_tuple
        self.first: Tensor | None = None
        self.calls: list[Call] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs.pop("hidden_states")
        self.first = states if self.first is None else self.first
        if getattr(states, "shape", None) != self.first.shape:
            raise _Stop
        self.calls.append(Call(args[1:], kwargs))
        if len(self.calls) == self.count:
            raise _Stop
        return (states,) if self.as_tuple else states


def _batches(rows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Stacks rows of the same length, so that nothing is padded."""
    lengths = sorted({len(row) for row in rows})
    for length in lengths:
        same = [row for row in rows if len(row) == length]
        for start in range(0, len(same), BATCH):
            yield torch.stack(same[start : start + BATCH])


@contextmanager
def _in_fp32(decoder: nn.Module, blocks: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, all of a decoder but its layers is in fp32 on a device: embeddings, norms, rotary frequencies."""
    own = {id(p) for p in blocks.parameters()}
    others = [p for p in decoder.parameters() if id(p) not in own]
    dtypes = [p.dtype for p in others]
    buffers = [(m, n, b) for m in decoder.modules() for n, b in m.named_buffers(recurse=False)]
    for parameter in others:
        parameter.data = parameter.data.to(device, torch.float32)
    for module, name, buffer in buffers:
        setattr(module, name, buffer.to(device))
    try:
        yield
    finally:
        for parameter, dtype in zip(others, dtypes, strict=True):
            parameter.data = parameter.data.to("cpu", dtype)
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
