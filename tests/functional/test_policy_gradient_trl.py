"""The losses of the GRPO family are TRL's, by TRL's own code on log-probs that are drawn here: values and gradients.

It runs where the extra ``bench`` is installed. Where TRL differs from a paper, ``docs/grpo.md`` says how.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lightning_rlhf.functional import (
    ALGORITHMS,
    Algorithm,
    importance_weights,
    k3,
    loss_weights,
    off_policy_mask,
    top_entropy_threshold,
)

trl = pytest.importorskip("trl", reason="TRL isn't installed: pip install lightning_rlhf[bench]")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"TRL is {trl.__version__}, and these tests read the code of 1.16", allow_module_level=True)
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402

LENGTHS, LONGEST = [5, 2, 1, 7, 3, 3], 8
ADVANTAGES = torch.tensor([1.3, -0.7, 0.0, -1.1, 0.4, 0.9], dtype=torch.float64)
SEQUENCE = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])


class Alone:
    """An accelerator of one process."""

    num_processes, process_index, device, sync_gradients = 1, 0, torch.device("cpu"), True

    def gather(self, values):
        return values

    gather_for_metrics = gather

    def pad_across_processes(self, values, **_):
        return values

    def reduce(self, values, reduction="sum"):
        return values


@pytest.fixture(autouse=True)
def float64():
    """TRL makes some constants of Python's numbers, in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def drawn():
    """Log-probs of the policy, the old policy, the reference and an engine, and entropies: (N,) in float64."""
    draw = torch.Generator().manual_seed(3)

    def near(values, by):
        return values + by * torch.randn(values.shape, generator=draw, dtype=torch.float64)

    old = -torch.rand(sum(LENGTHS), generator=draw, dtype=torch.float64) * 3
    found = dict(policy=near(old, 0.3), old=old, reference=near(old, 0.2), rollout=near(old, 0.5))
    entropies = torch.rand(sum(LENGTHS), generator=draw).double()  # TRL compares them in fp32
    return SimpleNamespace(**found, entropies=entropies)


def padded(flat):
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(LENGTHS)), batch_first=True)


def theirs(drawn, kind=GRPOTrainer, loss_type="grpo", level="token", low=0.2, high=0.2, beta=0.0, off=None, top=1.0,
           correction=None, left_out=(), **args):  # fmt: skip
    """TRL's loss and its gradient by token."""
    policy = drawn.policy.clone().requires_grad_()
    mask = padded(torch.ones(sum(LENGTHS))).long()
    mask[list(left_out)] = 0
    settings = dict(use_bias_correction_kl=False, delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Alone(),
        aux_loss_enabled=False,
        top_entropy_quantile=top,
        off_policy_mask_threshold=off,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=correction is not None,
        vllm_importance_sampling_correction=correction is not None,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(steps_per_generation=1, **{**settings, **args}),
        _metrics=defaultdict(lambda: defaultdict(list)),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_high_entropy_mask=lambda *given: GRPOTrainer.get_high_entropy_mask(trainer, *given),
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(policy), padded(drawn.entropies), None),
    )
    old, rollout, one = padded(drawn.old), padded(drawn.rollout), torch.ones(len(LENGTHS), 1, dtype=torch.long)
    inputs = dict(
        prompt_ids=one, prompt_mask=one, completion_ids=mask, completion_mask=mask, advantages=ADVANTAGES,
        old_per_token_logps=old, ref_per_token_logps=padded(drawn.reference), num_items_in_batch=mask.sum().double(),
        sampling_per_token_logps=rollout, old_logps=(old * mask).sum(1),
    )  # fmt: skip
    if correction is not None:
        log_ratio = (old - rollout) * mask
        ratio = (log_ratio.sum(1, keepdim=True) if correction.startswith("sequence") else log_ratio).exp()
        cut = ratio.clamp(max=1.3) if correction.endswith("truncate") else ratio.masked_fill(ratio > 1.3, 0.0)
        inputs["importance_sampling_ratio"] = cut
    loss = kind._compute_loss(trainer, None, inputs)
    return loss, torch.autograd.grad(loss, policy)[0]


def ours(drawn, algorithm, beta=0.0, off=None, top=1.0, correction="none", left_out=()):
    """The same of this package, as GRPOModule puts it together."""
    policy, advantages = drawn.policy.clone().requires_grad_(), ADVANTAGES[SEQUENCE]
    counts = torch.ones_like(policy).masked_fill(torch.isin(SEQUENCE, torch.tensor(left_out)), 0.0).detach()
    weight, share = loss_weights(algorithm.mean, counts, SEQUENCE, GROUP, LONGEST)
    loss = algorithm.policy_loss(policy, drawn.old, advantages, SEQUENCE).loss
    loss = loss * importance_weights(drawn.old, drawn.rollout, SEQUENCE, correction, 1.3)
    if off is not None:
        loss = loss * off_policy_mask(policy, drawn.rollout, advantages, SEQUENCE, off)
    if top < 1:
        loss = loss * (drawn.entropies >= top_entropy_threshold(drawn.entropies[counts > 0], top))
    loss = loss + beta * k3(policy - drawn.reference)
    loss = (weight * loss).sum() / share.sum()
    return loss, torch.autograd.grad(loss, policy)[0]


def assert_same(found, want):
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grpo", dict()),
        ("dapo", dict(loss_type="dapo", high=0.28)),
        ("dapo", dict(loss_type="bnpo", high=0.28)),
        ("dr_grpo", dict(loss_type="dr_grpo")),
        ("gspo", dict(level="sequence", low=3e-4, high=4e-4)),
        ("cispo", dict(loss_type="cispo", high=5.0)),
        ("sapo", dict(loss_type="sapo")),
    ],
    ids=str,
)
def test_algorithms(drawn, name, settings):
    assert_same(ours(drawn, ALGORITHMS[name]), theirs(drawn, **settings))


def test_gmpo(drawn):
    from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer

    assert_same(ours(drawn, ALGORITHMS["gmpo"]), theirs(drawn, GMPOTrainer, low=0.4, high=0.4))


def test_one_ratio_for_the_whole_completion(drawn):
    from trl.trainer.rloo_trainer import RLOOTrainer

    assert_same(ours(drawn, Algorithm(ratio="completion")), theirs(drawn, RLOOTrainer))


def test_dual_clip(drawn):
    """TRL's bound is for advantages above 0 too; there it changes nothing if it is above the clip's."""
    assert_same(ours(drawn, replace(ALGORITHMS["dapo"], dual_clip=1.3)),
                theirs(drawn, loss_type="dapo", high=0.28, delta=1.3))  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        dict(beta=0.3),
        dict(off=0.1),
        dict(top=0.3),
        dict(top=0.3, left_out=(0, 4)),
        dict(left_out=(0, 4)),
        *(dict(correction=f"{level}_{how}") for level in ("token", "sequence") for how in ("truncate", "mask")),
    ],
    ids=str,
)
def test_what_is_beside_the_algorithm(drawn, options):
    assert_same(ours(drawn, ALGORITHMS["dapo"], **options), theirs(drawn, loss_type="dapo", high=0.28, **options))
