"""Shares of ranks, from what one process takes."""

from collections import Counter
from dataclasses import replace

import pytest

from lightning_rlhf.plan.layout import Layout, moments, peak
from lightning_rlhf.plan.measure import Found, Outer
from lightning_rlhf.plan.meter import Segment

#: 1,000 trained numbers in 16 bits, 500 bytes that are frozen.
FOUND = Found(
    segments=(
        Segment("policy: head", Counter(weights=2500, gradients=2000, states=4000, activations=700), 10, Counter()),
        Segment(
            "policy: last layer, backward",
            Counter(weights=2500, gradients=600, states=4000, activations=700),
            10,
            Counter(),
        ),
        Segment("optimizer step", Counter(weights=2500, gradients=2000, states=4000, temporary=80), 0, Counter()),
    ),
    trained=2000, elements=1000, largest=100, together=1000, frozen=500, gradients=2000, states=4000, policy=2000,
    scoring=0, updating=20, front=Outer(0, 0, 0), back=Outer(0, 0, 0),
)  # fmt: skip


def places(plugin, copies=4, manual=False, **settings):
    layout = Layout(plugin, 1, copies, False, 1, masters=plugin != "ddp", bucket=50, chunk=50, **settings)
    return {place.name: place.parts for place in moments(FOUND, layout, manual)}


def test_ddp_holds_everything_and_buckets_of_gradients():
    assert places("ddp", 1)["policy: head"] == FOUND.segments[0].peak
    assert places("ddp")["policy: head"]["temporary"] == 2000
    [one_copy, *_] = moments(FOUND, Layout("ddp", 2, 1, False, 1), manual=True)
    assert one_copy.parts["temporary"] == 0, "nobody reads other data"
    assert places("ddp", manual=True)["optimizer step"]["temporary"] == 80 + 2000 + 2000


def test_ranks_with_stretches_of_the_same_rows_share_as_copies_do():
    for plugin in ("ddp", "zero1", "zero2"):
        one = places(plugin)
        layout = Layout(plugin, 1, 2, False, 1, masters=plugin != "ddp", bucket=50, chunk=50, sp=2)
        assert {place.name: place.parts for place in moments(FOUND, layout)} == one


@pytest.mark.parametrize("plugin, kept", [("zero1", 2000), ("zero2", 500)])
def test_zero_shares_states_and_from_the_second_on_gradients(plugin, kept):
    found = places(plugin)
    head, step = found["policy: head"], found["optimizer step"]
    assert head["weights"] == 2500 and head["gradients"] == kept and head["activations"] == 700
    assert head["states"] == (8000 + 4000) // 4, "moments and weights in fp32"
    assert step["temporary"] == (80 * 2 + 4000) // 4, "of the share, in fp32, and its gradient in fp32"
    backward = found["policy: last layer, backward"]
    assert backward["temporary"] == 2 * 200, "a bucket of the largest tensor, twice"
    assert backward["gradients"] == (600 if plugin == "zero1" else min(600, 500 + 200))
    assert found["gradients' exchange"]["gradients"] == (2000 if plugin == "zero1" else 500 + 200)
    assert found["weights' exchange"]["temporary"] == 100 * 5


def test_a_bucket_holds_no_more_than_there_is():
    layout = Layout("zero1", 1, 2, False, 1, masters=True)
    found = {place.name: place.parts for place in moments(FOUND, layout)}
    assert found["policy: last layer, backward"]["temporary"] == 2 * 600
    assert found["gradients' exchange"]["temporary"] == 2 * 2000


def test_zero_without_overlap_exchanges_after_the_backward_pass():
    assert places("zero1", overlaps=False)["policy: last layer, backward"]["temporary"] == 0
    assert places("zero2", overlaps=False)["policy: last layer, backward"]["temporary"] == 400


def test_gemini_shares_trained_weights_alone():
    found = places("gemini")
    head, backward = found["policy: head"], found["policy: last layer, backward"]
    assert head["weights"] == 500 + 2000 // 4 and head["gradients"] == 2000 // 4
    assert head["temporary"] == 2000, "a chunk may hold the whole of a small model"
    assert backward["temporary"] == 2 * 2000 and backward["gradients"] == 0, "a chunk holds its gradients"


def test_gemini_leaves_less_than_a_chunk_whole():
    found = {p.name: p.parts for p in moments(FOUND, Layout("gemini", 1, 4, False, 1, masters=True))}
    head, backward = found["policy: head"], found["policy: last layer, backward"]
    assert head["weights"] == 2500 and head["gradients"] == 2000 and head["states"] == 8000 + 4000
    assert head["temporary"] == backward["temporary"] == 0


def test_models_of_several_optimizers_are_exchanged_apart():
    half = replace(FOUND, together=500)
    found = {p.name: p.parts for p in moments(half, Layout("gemini", 1, 4, False, 1, masters=True, chunk=50))}
    backward = found["policy: last layer, backward"]
    assert backward["temporary"] == 2 * 1000 and backward["gradients"] == 2000 // 4 - 1000 // 4
    zero = {p.name: p.parts for p in moments(half, Layout("zero2", 1, 4, False, 1, overlaps=False))}
    assert zero["gradients' exchange"]["temporary"] == 2 * 1000
    assert zero["policy: last layer, backward"]["temporary"] == 0, "no bucket is full before the end"


def test_what_is_offloaded_is_not_on_the_device():
    whole = peak(moments(FOUND, Layout("zero2", 1, 4, False, 1, masters=True)))
    less = peak(moments(FOUND, Layout("zero2", 1, 4, False, 1, masters=True, offload_states=1.0)))
    assert less.parts["offloaded"] == 3000 and less.on_device == whole.on_device - 3000
    weights = Layout("gemini", 1, 4, False, 1, masters=True, chunk=50, offload_states=1.0, offload_weights=1.0)
    assert moments(FOUND, weights)[0].parts["weights"] == 500
    assert moments(FOUND, weights)[0].parts["offloaded"] == 3000 + 500
