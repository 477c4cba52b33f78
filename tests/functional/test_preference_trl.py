"""The losses over pairs and of single answers are TRL's, by TRL's own code on log-probs that are drawn here.

It runs where the extra ``bench`` is installed. Where TRL differs from a paper, ``docs/dpo.md`` says how, and the check
values of ``test_preference.py`` hold instead.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from lightning_rlhf.functional import (
    LOSSES,
    apo_zero_unpaired_loss,
    kto_loss,
    kto_reference_point,
    pair_logprobs,
)

trl = pytest.importorskip("trl", reason="TRL isn't installed: pip install lightning_rlhf[bench]")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"TRL is {trl.__version__}, and these tests read the code of 1.16", allow_module_level=True)

LENGTHS = [5, 2, 1, 7, 3, 3, 4, 1]  # better answers, then worse ones
N = len(LENGTHS) // 2


class Alone:
    """An accelerator of one process."""

    num_processes, process_index, device, sync_gradients = 1, 0, torch.device("cpu"), True

    def gather(self, values):
        return values

    gather_for_metrics = gather

    def reduce(self, values, reduction="sum"):
        return values


@pytest.fixture
def drawn():
    """Log-probs of the answers' tokens under policy and reference."""
    generator = torch.Generator().manual_seed(4)
    return tuple(-3 * torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.fixture(autouse=True)
def double():
    """TRL makes zeros of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def padded(flat):
    return torch.nn.utils.rnn.pad_sequence(flat.split(LENGTHS), batch_first=True)


def mask():
    """(2P, 1 + T) of completions behind a prompt of one token."""
    inside = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.cat([torch.zeros(len(LENGTHS), 1), inside], 1).long()


def forward(logprobs):
    """What TRL's patched forward returns."""
    nothing = torch.zeros_like(logprobs)
    found = SimpleNamespace(
        log_probs=logprobs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), log_sum_sq_probs=nothing
    )
    return lambda **_: found


def trl_pairs(policy, reference, names, weights, beta, label_smoothing=0.0, ld_alpha=None, f="reverse_kl"):
    from trl.trainer.dpo_trainer import DPOTrainer

    weight = torch.ones(len(LENGTHS), max(LENGTHS))
    if ld_alpha is not None:  # of reference log-probs, which are given as sums
        shorter = torch.minimum(torch.tensor(LENGTHS[:N]), torch.tensor(LENGTHS[N:])).repeat(2)
        weight = torch.where(torch.arange(max(LENGTHS)) < shorter[:, None], 1.0, ld_alpha)
    sums = (padded(reference) * weight).sum(1)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Alone(),
        args=SimpleNamespace(discopop_tau=0.05),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        ld_alpha=ld_alpha,
        f_divergence_type=f,
        f_alpha_divergence_coef=0.5,
        loss_types=names,
        loss_weights=weights,
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask()),
        "attention_mask": torch.ones_like(mask()),
        "completion_mask": mask(),
        "ref_chosen_logps": sums[:N],
        "ref_rejected_logps": sums[N:],
    }
    return DPOTrainer._compute_loss(trainer, forward(padded(policy)), inputs, False)


def own_pairs(policy, reference, **shaping):
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    return pair_logprobs(policy, reference, sequence, 2 * N, torch.arange(N), torch.arange(N, 2 * N), **shaping)


def assert_same(theirs, ours, policy):
    """Value and gradient."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(loss, policy, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("theirs", "ours", "settings"),
    [
        ("sigmoid", "sigmoid", dict(beta=0.3)),
        ("robust", "robust", dict(beta=0.3, label_smoothing=0.2)),
        ("ipo", "ipo", dict(beta=0.3)),
        ("hinge", "hinge", dict(beta=0.3)),
        ("sigmoid_norm", "sigmoid_norm", dict(beta=1.5)),
        ("apo_zero", "apo_zero", dict(beta=0.3)),
        ("apo_down", "apo_down", dict(beta=0.3)),
        ("sppo_hard", "sppo", dict(beta=0.3)),
        ("nca_pair", "nca", dict(beta=0.3)),
        ("exo_pair", "exo", dict(beta=0.3, label_smoothing=0.01)),
        ("bco_pair", "bco", dict(beta=0.3)),  # its delta is 0
        ("discopop", "discopop", dict(beta=0.3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_losses_over_pairs(theirs, ours, settings, drawn):
    policy, reference = drawn
    policy.requires_grad_()
    want = trl_pairs(policy, reference, [theirs], [1.0], **settings)
    assert_same(want, LOSSES[ours].function(own_pairs(policy, reference), **settings).mean(), policy)


def test_sums_of_losses(drawn):
    policy, reference = drawn
    policy.requires_grad_()
    want = trl_pairs(policy, reference, ["sigmoid", "hinge"], [0.8, 0.3], 0.3)
    pairs = own_pairs(policy, reference)
    found = 0.8 * LOSSES["sigmoid"].function(pairs, 0.3) + 0.3 * LOSSES["hinge"].function(pairs, 0.3)
    assert_same(want, found.mean(), policy)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (dict(ld_alpha=0.4), dict(ld_alpha=0.4)),
        (dict(f="forward_kl"), dict(f_divergence="forward_kl")),
        (dict(f="js_divergence"), dict(f_divergence="js_divergence")),
    ],
    ids=str,
)
def test_shaping(theirs, ours, drawn):
    policy, reference = drawn
    policy.requires_grad_()
    want = trl_pairs(policy, reference, ["sigmoid"], [1.0], 0.3, **theirs)
    assert_same(want, LOSSES["sigmoid"].function(own_pairs(policy, reference, **ours), 0.3).mean(), policy)


@pytest.mark.parametrize("name", ["simpo", "alphapo", "cpo"])
def test_losses_without_a_reference(name, drawn):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    policy, _ = drawn
    policy.requires_grad_()
    sums = torch.stack([part.sum() for part in policy.split(LENGTHS)])
    settings = dict(beta=1.5, gamma=0.7) | ({"alpha": 0.25} if name == "alphapo" else {})
    trainer = SimpleNamespace(
        alpha=settings.get("alpha", 0.0),
        loss_type="sigmoid" if name == "cpo" else "simpo",
        simpo_gamma=0.7,
        beta=1.5,
        label_smoothing=0.0,
        accelerator=Alone(),
    )
    given = sums if name == "cpo" else sums / torch.tensor(LENGTHS)
    want = CPOTrainer.cpo_loss(trainer, given[:N], given[N:])[0].mean()
    settings = dict(beta=1.5, sft_weight=0.0) if name == "cpo" else settings
    assert_same(want, LOSSES[name].function(own_pairs(policy, None), **settings).mean(), policy)


class TwoRanks(Alone):
    """An accelerator of two processes, of which the other gathers 5 nats wherever this one gathers a number."""

    def gather_for_metrics(self, values):
        return torch.cat([values.reshape(-1), torch.tensor([5.0])])


@pytest.mark.parametrize("moved", [2.0, -2.0], ids=["z0 above 0", "z0 below 0"])
@pytest.mark.parametrize("ranks", [Alone, TwoRanks])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_losses_of_single_answers(name, ranks, moved, drawn):
    from trl.trainer.kto_trainer import KTOTrainer

    policy, reference = drawn
    policy.requires_grad_()
    desirable = torch.tensor([True, False, True, True, False, False, True, False])
    own, base = ([part.sum() for part in flat.split(LENGTHS)] for flat in (policy, reference))
    ratio = torch.stack(own) - torch.stack(base)
    mismatched, of_reference = torch.tensor([-3.0, -2.0, -4.0]), torch.tensor([-3.5, -2.5, -3.0])
    weights = dict(desirable_weight=1.3, undesirable_weight=0.6) if name == "kto" else {}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ranks(),
        aux_loss_enabled=False,
        calculate_KL=name == "kto",
        _compute_kl_logps=lambda model, inputs: mismatched + moved,
        precompute_ref_logps=True,
        beta=0.3,
        loss_type=name,
        desirable_weight=weights.get("desirable_weight", 1.0),
        undesirable_weight=weights.get("undesirable_weight", 1.0),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask()),
        "attention_mask": torch.ones_like(mask()),
        "completion_mask": mask(),
        "label": desirable,
        "ref_logps": torch.stack(base),
        "ref_KL_logps": of_reference,
    }
    want = KTOTrainer._compute_loss(trainer, forward(padded(policy)), inputs, False)
    total = (mismatched + moved - of_reference).sum()
    point = kto_reference_point(*((total, 3) if ranks is Alone else (total + 3 * 5.0, 6)))  # the mean over all ranks'
    assert (point > 0) == (moved > 0 or ranks is TwoRanks)
    assert name != "kto" or trainer._metrics["train"]["kl"] == [pytest.approx(point.item(), abs=1e-9)]
    ours = kto_loss(ratio, desirable, point, 0.3, **weights) if name == "kto" else None
    assert_same(want, (apo_zero_unpaired_loss(ratio, desirable, 0.3) if ours is None else ours).mean(), policy)


def test_orpo_but_for_its_fine_tuning(drawn):
    """Theirs is in fp32, and has its mean over the tokens of prompts and completions of the micro-batch."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    policy, _ = drawn
    means = torch.stack([part.mean() for part in policy.split(LENGTHS)])
    trainer = SimpleNamespace(beta=0.3, accelerator=Alone())
    odds = ORPOTrainer.odds_ratio_loss(trainer, means[:N], means[N:])[0].double()
    ours = LOSSES["orpo"].function(own_pairs(policy, None), odds_weight=0.3)
    torch.testing.assert_close(ours, -means[:N] - odds, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own settings
def test_what_single_answers_are_mismatched_with(tiny_model_dir, tmp_path):
    """``docs/dpo.md`` says so: the batch's answers moved on by one in file order, once, also to their own prompt."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": prompt, "completion": f" {answer}", "label": answer in "ace"}
        for prompt, answer in zip(["Why?"] * 3 + ["Who?"] * 3, "abcdef", strict=True)
    ]

    def trainer(**settings):
        settings = dict(use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=3, **settings)
        config = KTOConfig(str(tmp_path), desirable_weight=1.3, **settings)
        return KTOTrainer(str(tiny_model_dir), args=config, train_dataset=Dataset.from_list(rows))

    made = trainer(train_sampling_strategy="sequential")
    answers, mismatched = made.train_dataset["completion_ids"], made.train_dataset["KL_completion_ids"]
    assert mismatched == [answers[i] for i in (2, 0, 1, 5, 3, 4)]  # each to its own prompt again
    assert isinstance(made._get_train_sampler(), SequentialSampler)
    made.model.train()
    three = next(iter(made.get_train_dataloader()))
    with torch.no_grad():  # an answer counts as one in its own micro-batch's mean, good ones 1.3 times; R and z0 are 0
        loss = made.compute_loss(made.model, three)
    assert loss.item() == pytest.approx((1.3 + 1 + 1.3) / 3 / 2, abs=1e-6)
    with pytest.raises(ValueError, match="requires `train_sampling_strategy='sequential'`"):
        trainer(train_sampling_strategy="random")
