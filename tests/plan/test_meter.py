"""Numbers and shapes that fake tensors do not have, and what is counted."""

import contextlib

import pytest
import torch

from lightning_rlhf.functional import linear_logprobs, linear_nll
from lightning_rlhf.plan.fakes import fake_tensors
from lightning_rlhf.plan.meter import Meter, few_blocks


def test_unknown_numbers_are_finite_and_small():
    with fake_tensors(), Meter(7):
        found = torch.rand(3) - 1
        assert 0 < found.sum().item() < 1e-6 and bool(found.isfinite().all()) and int(found.argmax()) == 1


def test_a_mask_leaves_nothing_out():
    with fake_tensors(), Meter(7):
        found = torch.rand(3, 5)
        assert found[found > 0].shape == (15,)
        assert found[torch.ones(3, dtype=torch.bool)].shape == (3, 5)
        assert found.masked_select(found > 0).shape == (15,) and found.nonzero().shape == (15, 2)


def test_storages_count_once_by_kind_while_they_live():
    with fake_tensors(), Meter(7) as meter:
        weight = torch.zeros(10, 7)
        meter.mark([weight, weight[2:]], "weights")
        kept = (weight.requires_grad_() * 2).view(-1)
        with torch.no_grad():
            torch.zeros(100)
        meter.begin("next")
        del kept
        meter.begin("last")
    first, second = meter.segments
    assert (first.peak["weights"], first.peak["logits"], first.peak["temporary"]) == (280, 280, 400)
    assert second.peak["logits"] == 280 and second.peak["temporary"] == 0 and meter.now["logits"] == 0


def test_products_and_attention_are_counted():
    with fake_tensors(), Meter(7) as meter:
        torch.zeros(4, 3) @ torch.zeros(3, 5)
        meter.begin("attention")
        q = torch.zeros(1, 2, 8, 4)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        meter.begin("end")
    assert [s.flops for s in meter.segments] == [2 * 4 * 3 * 5, 2 * 2 * (2 * 8 * 8 * 4)]


def test_modules_are_moved_and_cast_and_stay_tied():
    with fake_tensors():
        module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        module[1].weight = module[0].weight
        module.to("cpu").bfloat16()
    assert module[0].weight.dtype == torch.bfloat16 and module[1].weight is module[0].weight


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 12, 30, 32])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_few_blocks_of_logits_stand_for_all(rows, frozen, summed):
    """Blocks of four rows: peak, what is left and operations are those of all blocks, which are more operations."""
    found = []
    for few in (True, False):
        with fake_tensors(), Meter(7) as meter, few_blocks(meter) if few else contextlib.nullcontext():
            hidden = torch.zeros(rows, 3, requires_grad=True)
            weight = torch.zeros(7, 3, requires_grad=not frozen)
            target = torch.zeros(rows, dtype=torch.long)
            meter.begin("forward")
            if summed:
                out = linear_nll(hidden, weight, target, torch.ones(rows), chunk=28)
            else:
                out = linear_logprobs(hidden, weight, target, entropy=True, chunk=28)
            meter.begin("backward")
            (out.loss if summed else out.logprobs.sum() + out.entropies.sum()).backward()
            meter.begin("end")
            assert meter.repeats == 1
        found.append((meter.segments, +meter.now))
    assert found[0] == found[1] and found[0][0][1].flops > 0
