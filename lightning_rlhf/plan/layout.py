"""What a rank of several holds: shares of what one process takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from lightning_rlhf.plan.measure import Found
from lightning_rlhf.plan.meter import KINDS
from lightning_rlhf.strategies.precision import Plugin

#: Parts of a rank's memory. The last one is in the host's.
PARTS = (*KINDS, "rollout cache", "offloaded")
#: Elements by which Gemini's search may enlarge a chunk.
_SEARCHED = 32 * 2**20


@dataclass(frozen=True)
class Layout:
    """How ranks share a run.

    Args:
        plugin: What is sharded between copies of the model.
        tp: Ranks that hold each layer of a copy together.
        copies: Copies, with different data.
        checkpointing: Activations are computed again in the backward pass.
        rows: Rows of a micro-batch.
        masters: ZeRO and Gemini: the optimizer updates fp32 copies of 16-bit weights.
        overlaps: ZeRO: gradients are exchanged during the backward pass.
        bucket: ZeRO: elements of an exchange.
        chunk: Gemini: elements of the smallest chunk.
        offload_states: Share of the states in the host's memory.
        offload_weights: Gemini: share of the weights in the host's memory.
        pp: Stages of a copy.
        sp: Ranks that run each row of a copy together, with whole weights.
        micro_batches: Most parts of a micro-batch that stages work on at the same time.
    """

    plugin: Plugin
    tp: int
    copies: int
    checkpointing: bool
    rows: int
    masters: bool = False
    overlaps: bool = True
    bucket: int = 12 * 2**20
    chunk: int = 2**20
    offload_states: float = 0.0
    offload_weights: float = 0.0
    pp: int = 1
    sp: int = 1
    micro_batches: int = 8

    @property
    def each(self) -> int:
        """Ranks of a copy."""
        return self.tp * self.pp * self.sp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, between which plugins act."""
        return self.copies * self.sp

    @property
    def parts(self) -> int:
        """Parts of a micro-batch."""
        return min(self.micro_batches, self.rows) if self.pp > 1 else 1


class Moment(NamedTuple):
    """What a rank holds at a place of a step.

    Attributes:
        name: The place.
        parts: Bytes by :data:`PARTS`.
    """

    name: str
    parts: Counter[str]

    @property
    def on_device(self) -> int:
        """Bytes on the device."""
        return sum(size for part, size in self.parts.items() if part != "offloaded")


def moments(found: Found, layout: Layout, manual: bool = False) -> list[Moment]:
    """Tells what a rank holds at all places of a step.

    Args:
        found: What one process takes, or a rank that holds a slice of the layers.
        layout: How ranks share it.
        manual: The stage exchanges gradients by itself, as those of reinforcement learning do.
    """
    if layout.plugin == "ddp":
        return _replicated(found, layout, manual)
    return _sharded(found, layout)


def _replicated(found: Found, layout: Layout, manual: bool) -> list[Moment]:
    """DDP: between replicas, buckets of all gradients beside them."""
    places = []
    for segment in found.segments:
        parts = segment.peak.copy()
        if layout.replicas > 1:
            parts["temporary"] += round(found.gradients)
            if manual and segment.name == "optimizer step":  # one exchange of all gradients
                parts["temporary"] += round(found.gradients)
        places.append(Moment(segment.name, parts))
    return places


def _sharded(found: Found, layout: Layout) -> list[Moment]:
    """ZeRO and Gemini: states and fp32 weights by shares; from ZeRO-2 on gradients, and under Gemini weights too."""
    n, item = layout.replicas, found.trained / found.elements
    if layout.plugin == "gemini" and found.together < layout.chunk:  # less than a chunk stays whole on each rank
        n = 1
    fp32 = 4 * found.elements / n
    states = found.states / item * 4 / n + (fp32 if layout.masters else 0)
    kept = found.gradients if layout.plugin == "zero1" else found.gradients / n
    weights, whole = found.trained, 0.0
    if layout.plugin == "gemini":
        whole = min(found.together, max(found.largest, layout.chunk + _SEARCHED)) * item if n > 1 else 0.0
        weights = found.trained / n
    held = Counter(
        {
            "weights": round(found.frozen + weights * (1 - layout.offload_weights)),
            "states": round(states * (1 - layout.offload_states)),
            "offloaded": round(states * layout.offload_states + weights * layout.offload_weights),
        }
    )
    bucket = min(found.together, max(found.largest, layout.bucket)) * item
    fills = found.together > layout.bucket
    places = []
    for segment in found.segments:
        parts, seen = segment.peak + held, segment.peak["gradients"]
        parts["weights"], parts["states"] = held["weights"], held["states"]
        stepping, backward = segment.name == "optimizer step", segment.name.endswith("backward")
        if stepping:  # on shares, in fp32
            parts["temporary"] = round(
                (segment.peak["temporary"] / item * 4 + (layout.masters and found.elements * 4)) / n
            )
        elif layout.plugin == "gemini":  # a chunk of weights, and one of gradients
            parts["temporary"] += round(2 * whole if backward else whole)
        elif n > 1 and backward and (layout.overlaps or (layout.plugin == "zero2" and fills)):
            parts["temporary"] += round(2 * min(seen, bucket))
        if layout.plugin != "zero1":  # those of passes before are reduced
            reduced = kept - whole / n if layout.plugin == "gemini" else kept + min(seen, bucket)
            parts["gradients"] = round(min(seen, reduced) if backward else seen / n)
        places.append(Moment(segment.name, parts))
    if layout.plugin != "gemini":
        places += _exchanges(found, layout, held, kept, item)
    return places


def _exchanges(found: Found, layout: Layout, held: Counter[str], kept: float, item: float) -> list[Moment]:
    """ZeRO's reduction of the last bucket, which holds no more than there is, and its gathering of new weights."""
    n = layout.replicas
    last = min(found.together, max(found.largest, layout.bucket)) * item
    reduced = kept if layout.plugin == "zero1" else kept + last
    pieces = min(layout.bucket * item, found.trained / n)
    return [
        Moment("gradients' exchange", held + Counter(gradients=round(reduced), temporary=round(2 * last))),
        Moment("weights' exchange", held + Counter(gradients=round(kept), temporary=round(pieces * (n + 1)))),
    ]


def peak(places: list[Moment]) -> Moment:
    """The moment when most of the device's memory is taken."""
    return max(places, key=lambda place: place.on_device)
