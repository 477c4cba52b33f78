"""The largest micro-batch of a stage, from its settings."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from lightning_rlhf import DPOModule, GRPOModule, KTOModule, PPOModule, Rollout, Sampling, SFTModule, Updates
from lightning_rlhf.plan.fakes import fake_tensors
from lightning_rlhf.plan.shapes import Shape, shape_of


def data(**settings):
    return SimpleNamespace(**{"max_length": 64, "batch_size": 32, "max_tokens": None, **settings})


def lengths(prompts, completions):
    return [0.0 for _ in completions]


def test_rows_of_a_micro_batch(tiny_model_dir):
    sft = SFTModule(tiny_model_dir)
    assert shape_of(sft, data(), 4, 2)[1:6] == (4, 32, 32, 1, 2)
    assert shape_of(sft, data(max_tokens=130), 4, 2).rows == 2
    dpo = shape_of(DPOModule(tiny_model_dir), data(max_length=63), 1, 1)
    assert dpo[1:6] == (32, 31, 32, 2, 1) and dpo.row_tokens == 95 and dpo.batch().pairs.better.tolist()[:2] == [0, 2]
    kto = shape_of(KTOModule(tiny_model_dir), data(), 1, 4).batch()
    assert kto.labels.good.tolist() == [True, False] * 4 and kto.mismatched is not None


def test_a_row_is_as_long_as_the_model_reads_unless_data_say_less(tiny_model_dir):
    sft = SFTModule(tiny_model_dir)
    assert shape_of(sft, data(max_length=None), 1, 1).row_tokens == sft.context_length
    sft.context_length = None
    with pytest.raises(ValueError, match=r"Nothing says how long a row may be: set data\.max_length\."):
        shape_of(sft, data(max_length=None), 1, 1)


@pytest.mark.parametrize(
    "updates, rows, answers, passes",
    [
        (Updates(), 8, 4, 1),
        (Updates(minibatches=2), 4, 4, 1),
        (Updates(micro_batch_tokens=2 * (20 + 4 * 10)), 2, 4, 4),
        (Updates(micro_batch_tokens=41), 1, 2, 16),
    ],
)
def test_micro_batches_of_an_iteration(updates, rows, answers, passes, tiny_model_dir):
    rollout = Rollout(4, Sampling(max_new_tokens=10))
    shape = shape_of(GRPOModule(tiny_model_dir, lengths, rollout=rollout, updates=updates), data(max_length=20), 4, 1)
    assert (shape.rows, shape.answers, shape.passes) == (rows, answers, passes)
    assert (shape.prompt, shape.answer, shape.prompts, shape.completions) == (20, 10, 8, 4)
    assert shape.updates == updates.epochs * updates.minibatches


def test_other_sizes_of_micro_batches_keep_the_step(tiny_model_dir):
    shape = shape_of(PPOModule(tiny_model_dir, lengths), data(max_length=16), 4, 1)
    assert (shape.rows, shape.passes) == (8, 1)
    assert (shape.with_rows(3).rows, shape.with_rows(3).passes) == (3, 3)


def test_a_batch_has_numbers_where_other_tensors_have_none():
    with fake_tensors():
        batch = Shape("instructions", 1, 2, 3, 1, 1).batch()
        assert isinstance(torch.ones(1), FakeTensor) and batch.predictor.tolist() == [1, 2, 3]
