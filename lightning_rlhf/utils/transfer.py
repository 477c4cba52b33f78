"""Copies to a device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Returns a tensor on a device.

    To a GPU the copy is from page-locked memory, so that it is queued behind the device's work and the host goes on;
    from other memory each copy would wait until that work is done.

    Args:
        tensor: On any device.
        device: Where it goes.
    """
    pinned = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=pinned)
