"""Shares of a pipeline's stages, from what one process takes."""

from collections import Counter
from dataclasses import replace

import pytest

from lightning_rlhf import SFTModule
from lightning_rlhf.plan.layout import Layout
from lightning_rlhf.plan.measure import Found, Mode, Outer, measure
from lightning_rlhf.plan.meter import Segment
from lightning_rlhf.plan.shapes import Shape
from lightning_rlhf.plan.speed import Device, step_seconds
from lightning_rlhf.plan.stages import stage_of, waiting

HELD = {"weights": 1000, "states": 2000}


def taken(activations, inner):
    """What is held of all rows, and what lives within a place."""
    places = {
        "policy: embeddings": (0, 0),
        "policy: last layer": (activations // 2, 0),
        "policy: head": (activations, 0),
        "policy: last layer, backward": (activations, 100),
        "optimizer step": (0, 1000),
    }
    segments = []
    for name, (held, gradients) in places.items():
        begun = Counter(HELD, activations=held, gradients=gradients)
        peak = begun + Counter(activations=inner, temporary=inner)
        segments.append(Segment(name, peak, 1, begun))
    return Found(
        segments=tuple(segments), trained=1000, elements=250, largest=40, together=250, frozen=0,
        gradients=1000, states=2000, policy=1000, scoring=0, updating=5, front=Outer(200, 50, 0),
        back=Outer(100, 25, 0),
    )  # fmt: skip


def places(first, **settings):
    """Four parts: all rows hold 800, and an operation needs 8 of a part, not 32."""
    found = stage_of(taken(800, 32), taken(200, 8), 4, first, **settings)
    return found, [(s.name, s.peak) for s in found.segments]


def test_the_first_stage_has_no_head():
    found, every = places(first=True)
    assert (found.trained, found.elements, found.gradients, found.states) == (900, 225, 900, 1800)
    assert "policy: head" not in [name for name, _ in every]
    (forward,) = (peak for name, peak in every if name == "policy: last layer")
    assert forward == Counter(weights=900, states=1800, activations=3 * 200 + 100 + 8, temporary=8), "three are through"


def test_the_last_stage_has_no_embeddings():
    found, every = places(first=False)
    assert (found.trained, found.elements, found.gradients, found.states) == (800, 200, 800, 1600)
    assert "policy: embeddings" not in [name for name, _ in every]
    (head,) = (peak for name, peak in every if name == "policy: head")
    assert head == Counter(weights=800, states=1600, activations=800 + 8, temporary=8)
    (summed,) = (peak for name, peak in places(first=False, summed=True)[1] if name == "policy: head")
    assert summed["activations"] == head["activations"] + 3 * 4 * 25, "of each part before, in fp32"


def test_the_backward_pass_of_the_second_part_has_all_gradients():
    _, every = places(first=False)
    one, two = (peak for name, peak in every if name == "policy: last layer, backward")
    assert one["activations"] == 808 and one["gradients"] == 100
    assert two["activations"] == 600 + 8 and two["gradients"] == 800
    alone = stage_of(taken(800, 32), taken(800, 32), 1, first=False)
    assert len([s for s in alone.segments if s.name.endswith("backward")]) == 1


def test_how_long_a_rank_waits():
    assert waiting(2, 8) == pytest.approx(1 / 9) and waiting(2, 1) == 0.5 and waiting(1, 8) == 0


def test_stages_of_a_model_hold_it_together(small_model):
    """Weights of the first and the last stage are those of the model, whose embeddings are no head."""
    shape = Shape("instructions", 2, 10, 10, 1, 1)
    whole = measure(SFTModule(small_model), shape, Mode())
    stages = [
        stage_of(measure(SFTModule(small_model), shape, Mode(), layers), whole, 1, first)
        for layers, first in ((3, True), (2, False))
    ]
    assert sum(stage.elements for stage in stages) == whole.elements
    assert sum(stage.trained for stage in stages) == whole.trained
    assert whole.front.elements > 0 and whole.front.frozen == whole.back.frozen == 0


def test_a_stage_sums_over_slices_in_its_own_layers_alone():
    found, device = replace(taken(0, 0), updating=0), Device(link=1.0)
    shape = Shape("instructions", 4, 10, 10, 1, 1)
    one, two = (
        step_seconds(found, shape, Layout("ddp", 2, 1, False, 4, pp=pp), device, width=8, layers=6) for pp in (1, 2)
    )
    sent = 2 * 80 * 8 * 4  # hidden states of 80 tokens, and their gradients
    assert one == 2 * 2 * 2 / 2 * 6 * 80 * 8 * 4 and two == one / 2 + sent


def test_stretches_exchange_tokens_for_heads():
    found, device = replace(taken(0, 0), updating=0, gradients=0, trained=1, elements=0.25), Device(link=1.0)
    shape = Shape("instructions", 4, 10, 10, 1, 1)
    seconds = step_seconds(found, shape, Layout("ddp", 1, 1, False, 4, sp=2), device, width=8, layers=6)
    # half of four tensors in both directions, of 40 tokens, and a sum over replicas of 1 byte
    assert seconds == 4 / 2 * 2 * 6 * 40 * 8 * 4 + 0.5
