"""Computes what a stage of a pipeline holds, from runs of its layers in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_rlhf.plan.measure import Found
from lightning_rlhf.plan.meter import Segment


def stage_of(whole: Found, part: Found, parts: int, first: bool, summed: bool = False) -> Found:
    """Tells what the first or the last stage takes. Those in between take less than the first.

    The backward pass begins when all parts are through the forward pass. So what it reads is held of the whole
    micro-batch, while what lives within an operation or a layer is of one part.

    Args:
        whole: What a process takes with the stage's layers between embeddings and head.
        part: The same for a part of the micro-batch.
        parts: Number of parts.
        first: It is the first stage, which has no head. False: the last one, which has no embeddings.
        summed: The head's gradient is summed in the forward pass, as in SFT, so that each part holds one in fp32.
    """
    away, other = (whole.back, ": head") if first else (whole.front, ": embeddings")
    kept = 1 - away.elements / whole.elements
    gradients = whole.gradients - away.trained
    segments = []
    for i, (all_rows, some) in enumerate(zip(whole.segments, part.segments, strict=True)):
        if all_rows.name.endswith(other):
            continue
        peak, backward = some.peak.copy(), all_rows.name.endswith("backward")
        peak["weights"] -= round(away.trained + away.frozen)
        peak["states"] = round(peak["states"] * kept)
        seen = all_rows.peak["gradients"]
        peak["gradients"] = round(max(0, seen - away.trained) if first else min(seen, gradients))
        own = some.peak["activations"] - some.held["activations"]
        held = all_rows.held["activations"]
        passed = held if backward else _held_behind(whole.segments[i:], held)  # of a part that is through
        peak["activations"] = max(0, round((held + (parts - 1) * passed) / parts) + own)
        if summed and all_rows.name.endswith(": head"):
            peak["activations"] += round((parts - 1) * 4 * whole.back.elements)
        if all_rows.name == "optimizer step":
            peak["temporary"] = round(peak["temporary"] * kept)
        segments.append(Segment(all_rows.name, peak, all_rows.flops, all_rows.held))
        if parts > 1 and backward:  # of the second part: all gradients are there, and the first one's activations gone
            later = peak.copy()
            later["gradients"] = round(gradients)
            later["activations"] = max(0, round(held * (parts - 1) / parts) + own)
            segments.append(Segment(all_rows.name, later, 0, all_rows.held))
    return replace(
        whole,
        segments=tuple(segments),
        trained=whole.trained - away.trained,
        elements=whole.elements - away.elements,
        together=whole.together * kept,
        frozen=whole.frozen - away.frozen,
        gradients=gradients,
        states=whole.states * kept,
    )


def _held_behind(segments: Sequence[Segment], own: int) -> int:
    """Activations that a model holds behind its layers: when the head of the pass begins that the first segment is in.

    Args:
        segments: From that segment on.
        own: What is held in it, which is returned for one outside of models.
    """
    model = segments[0].name.rpartition(": ")[0]
    return next((s.held["activations"] for s in segments if model and s.name == f"{model}: head"), own)


def waiting(stages: int, parts: int) -> float:
    """Share of the time in which a rank waits for others."""
    return (stages - 1) / (parts + stages - 1)
