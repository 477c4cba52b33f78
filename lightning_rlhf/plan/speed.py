"""How long a step takes, by a roofline: what is computed, read and exchanged, over what a device does in a second."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_rlhf.plan.layout import Layout
from lightning_rlhf.plan.measure import Found
from lightning_rlhf.plan.shapes import Shape


@dataclass(frozen=True)
class Device:
    """What a device does in a second. The defaults are those of an A100 of 80 GB.

    Args:
        flops: Floating-point operations.
        bandwidth: Bytes read of its memory.
        link: Bytes sent to another device.
        utilization: Share of ``flops`` that training reaches.
    """

    flops: float = 312e12
    bandwidth: float = 2.0e12
    link: float = 300e9
    utilization: float = 0.4


def step_seconds(found: Found, shape: Shape, layout: Layout, device: Device, width: int, layers: int) -> float:
    """Seconds of an optimizer step, or of an iteration after its rollout; nothing overlaps.

    Args:
        found: What a rank takes.
        shape: The micro-batch.
        layout: How ranks share it.
        device: What each of them does.
        width: The model's width.
        layers: Its layers.
    """
    passes = shape.passes * shape.updates
    item = found.trained / found.elements
    exchanged = 0.0
    n, around = layout.replicas, (layout.replicas - 1) / layout.replicas
    if n > 1:
        often = passes if layout.plugin in ("zero2", "gemini") else shape.updates  # gradients, once a step or a pass
        gathers = {"gemini": 2 * passes, "ddp": shape.updates}.get(layout.plugin, shape.updates)  # weights, or sums
        exchanged += around * (found.gradients * often + found.trained * gathers)
    directions = 3 if layout.checkpointing else 2
    if layout.tp > 1:  # two sums of activations a layer in each direction
        sums = 2 * 2 * (layout.tp - 1) / layout.tp * directions * layers / layout.pp
        exchanged += sums * shape.tokens / layout.sp * width * item * passes
    if layout.sp > 1:  # queries, keys, values and outputs of a rank's tokens
        sent = 4 * (layout.sp - 1) / layout.sp * directions * layers / layout.tp
        exchanged += sent * shape.tokens / layout.sp * width * item * passes
    if layout.pp > 1:  # hidden states, and their gradients
        exchanged += 2 * shape.tokens * width * item * passes
    return found.flops(shape) / (device.flops * device.utilization) + exchanged / device.link


def rollout_seconds(
    rows: int, rounds: int, answer: int, cache: int, item: int, found: Found, layout: Layout, device: Device
) -> float:
    """Seconds of a rollout: each token reads all weights and the cache.

    Args:
        rows: Completions that are decoded together.
        rounds: How often.
        answer: Tokens of a completion.
        cache: Bytes of the full cache.
        item: Bytes of a number in a forward pass.
        found: What a rank takes.
        layout: How ranks share it.
        device: What each of them does.
    """
    reads = (found.policy + cache / 2) / device.bandwidth
    computes = 2 * found.policy / item * rows / (device.flops * device.utilization)
    gathers = (found.trained / device.link / answer) if layout.plugin == "gemini" and layout.copies > 1 else 0.0
    return rounds * answer * (max(reads, computes) + gathers)
