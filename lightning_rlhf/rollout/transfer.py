"""Copies between Python and the model's device. Each wait for a GPU would let it run dry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.utils.transfer import send


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Makes a tensor of numbers.

    Args:
        values: Lists of numbers, or an array.
        device: Where it goes. A GPU goes on working meanwhile.
        dtype: Its type.
    """
    return send(torch.tensor(values, dtype=dtype), device)


def to_lists(ids: Tensor, values: Tensor) -> tuple[list[int], list[float]]:
    """Returns token ids and a number for each in one copy, for which a device is waited once.

    Args:
        ids: (N,), below 2^24, so that fp32 holds them exactly.
        values: (N,), of fp32 or fp64.
    """
    numbers, found = torch.stack([ids.to(values.dtype), values]).tolist()
    return [int(i) for i in numbers], found


def take_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns some rows: a view, which copies nothing, if they are consecutive."""
    first = rows[0] if rows else 0
    if list(rows) == list(range(first, first + len(rows))):
        return tensor[first : first + len(rows)]
    return tensor.index_select(0, to_device(rows, tensor.device))


class Coming:
    """Numbers on their way from a device, which goes on working meanwhile.

    Args:
        numbers: They may change once this is made.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._numbers.copy_(numbers, non_blocking=True)
        self._copied = torch.cuda.Event() if numbers.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(numbers.device))

    def tolist(self) -> Any:
        """Waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()
