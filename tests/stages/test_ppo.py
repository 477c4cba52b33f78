"""The PPO stage: against a plain padded reference, its invariances, exact resume, and what it refuses."""

import copy
import csv
import json
import math
import re
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from grouping import grouped
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.plugins.precision import MixedPrecision
from reward_models import save_reward_adapter
from runs import assert_equal, assert_same_steps, difference, load_script, quiet, spawn, spawn_killed
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf import LoRA, PPOModule, PromptDataModule, Ptx, Sampling
from lightning_rlhf.data.packed import unpack
from lightning_rlhf.models import load_reward_model
from lightning_rlhf.models.reference import disable_dropout
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.rewards import Reward, Scores, WeightedReward
from lightning_rlhf.rl import Updater
from lightning_rlhf.rollout import CachedEngine
from lightning_rlhf.strategies.gradients import grad_scaler, loss_scale

HERE = Path(__file__).parent


reference, run_ppo = (load_script(HERE / f"{name}.py") for name in ("reference_ppo", "run_ppo"))
run, letters, trained = run_ppo.run, run_ppo.letters, run_ppo.trained
spawn = partial(spawn, HERE / "run_ppo.py")


def logged(out_dir, name):
    """A metric of each iteration."""
    with (out_dir / "log" / "version_0" / "metrics.csv").open() as file:
        return [float(row[f"train/{name}"]) for row in csv.DictReader(file)]


def happy(prompts, completions):
    return [c.count("e") / max(1, len(c)) for c in completions]


# ------------------------------------------------------------------------------------------------- the definition


class Recorded(PPOModule):
    """Keeps what happened, for the reference to do again."""

    def score_experience(self, experience, samples):
        super().score_experience(experience, samples)
        scores = experience.scores.tolist()
        self.iterations = [*getattr(self, "iterations", []), (experience, samples, scores, [], [])]

    def backward_minibatch(self, experience, chosen, ptx):
        found = super().backward_minibatch(experience, chosen, ptx)
        self.iterations[-1][3].append((chosen, found))
        return found

    def update_policy(self, experience, ptx):
        found = super().update_policy(experience, ptx)
        self.iterations[-1][4].append(trained(self))
        return found


def plain_roles(module, start):
    """Policy, reference and critic as plain models, with the parameters of the two that are trained, by name."""
    frozen, kind = copy.deepcopy(start), module.critic_kind
    if kind == "head":
        policy = value = copy.deepcopy(module.policy.model)
        head, names = copy.deepcopy(module.policy.value_head), ("policy.model.", "policy.model.")
    elif kind == "separate":
        policy, value = copy.deepcopy(module.policy.model), copy.deepcopy(module.critic.model)
        head, names = value.score, ("policy.model.", "critic.model.")
    else:
        policy, value = copy.deepcopy(module.policy.model), copy.deepcopy(module.policy.model)
        value.set_adapter("critic")
        head, names = copy.deepcopy(module.policy.value_head), ("policy.model.", "policy.model.")
    for model in (policy, value, frozen):
        for part in model.modules():
            if hasattr(part, "config"):
                part.config._attn_implementation = "eager"

    def critic(ids, mask):
        base = value.get_base_model() if hasattr(value, "get_base_model") else value
        states = base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        if kind == "head":  # a hook is another way to scale a gradient than the policy's
            scale = module.policy.trunk_grad
            if scale == 0:
                states = states.detach()
            elif states.requires_grad:
                states = states.clone()
                states.register_hook(lambda gradient: scale * gradient)
        return head(states.to(head.weight.dtype))[..., 0].double()

    own = {names[0] + k: p for k, p in policy.named_parameters() if p.requires_grad}
    others = {} if kind == "head" else {names[1] + k: p for k, p in value.named_parameters() if p.requires_grad}
    if kind != "separate":
        others |= {f"policy.value_head.{k}": p for k, p in head.named_parameters()}
    return policy, frozen, critic, own, others


VARIANTS = {
    "defaults": (dict(), dict()),
    "k2": (dict(kl_penalty="k2", kl_coef=0.3), dict(kl_penalty="k2", kl_coef=0.3)),
    "all": (
        dict(kl_penalty="k3", entropy_coef=0.05, bootstrap=True, clip_high=0.3, whiten_rewards=True, gamma=0.98,
             clip_scores=1.5, missing_stop_penalty=0.5, loss_mean="sequence", lam=0.9, value_coef=0.7),
        dict(kl_penalty="k3", entropy_coef=0.05, bootstrap=True, clip_high=0.3, whiten_rewards=True, gamma=0.98,
             clip_scores=1.5, missing_stop_penalty=0.5, loss_mean="sequence", lam=0.9, value_coef=0.7),
    ),
    "no clip, no whitening": (
        dict(clip_value=None, whiten_advantages=False, kl_coef=0.5, max_norm=0.1),
        dict(clip_value=None, whiten_advantages=False, kl_coef=0.5, max_norm=0.1),
    ),
}  # fmt: skip


CRITICS = {
    "separate": dict(critic_kind="separate"),
    "adapter": dict(lora=LoRA(r=4)),
    "head": dict(critic_kind="head"),
    "head, lora, a share of its gradient": dict(critic_kind="head", lora=LoRA(r=4), trunk_grad=0.25),
    "head, detached": dict(critic_kind="head", trunk_grad=0.0),
}
PAIRS = [(v, c) for v in VARIANTS for c in CRITICS if c in ("separate", "adapter") or (v, c) == ("defaults", "head")]
PAIRS += [("all", "head, lora, a share of its gradient"), ("no clip, no whitening", "head, detached")]


@pytest.mark.parametrize(("variant", "critic"), PAIRS)
def test_five_iterations_equal_a_plain_padded_reference(tiny_model_dir, tiny_tokenizer, tmp_path, variant, critic):
    options, settings = VARIANTS[variant]
    options = options | CRITICS[critic]
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir).double()
    torch.manual_seed(0)
    module = Recorded(
        copy.deepcopy(start),
        letters,
        **grouped(
            tokenizer=tiny_tokenizer,
            sampling=Sampling(max_new_tokens=10, temperature=0.7, stop_strings=["e", "o"]),
            samples_per_prompt=2,
            optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3, eps=1e-5, weight_decay=0.0),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0),
            epochs=2,
            minibatches=2,
            micro_batch_tokens=110,
            **options,
        ),
    )
    module.configure_model()
    policy, frozen, critic, own, others = plain_roles(module, start)
    head = module.critic_kind == "head"
    trainer = quiet(tmp_path, max_steps=5)
    trainer.fit(module, PromptDataModule(run_ppo.prompts(), batch_size=4, val_fraction=0.0))
    settings = reference.Settings(temperature=0.7, **settings)
    optimizers = [torch.optim.AdamW(p.values(), lr=3e-3, eps=1e-5, weight_decay=0.0) for p in (own, others)]
    kinds = set()
    for experience, samples, scores, updates, after in module.iterations:
        places = [(tree, branch) for tree in experience.trees for branch in tree.branches]
        rows = zip(places, scores, samples.truncated, strict=True)
        plain = [reference.Sample(t.prompt, b.input_ids, score, cut) for (t, b), score, cut in rows]
        kinds |= set(samples.truncated)
        reference.judge(policy, frozen, critic, plain, settings)
        for name, column in (("old", "old_logprobs"), ("ref", "reference_logprobs"), ("values", "values"),
                             ("returns", "returns"), ("advantages", "advantages")):  # fmt: skip
            want = torch.cat([s.numbers[name] for s in plain])
            torch.testing.assert_close(getattr(experience, column).double(), want, rtol=1e-4, atol=1e-5)
        assert len(updates) == 4
        for chosen, found in updates:
            mine = [s for i in chosen for s in plain[2 * i : 2 * i + 2]]
            groups = [list(own.values()), list(others.values())]
            groups = [groups[0] + groups[1]] if head else groups  # which shares weights, so one norm clips both
            policy_loss, value_loss, loss = reference.update(policy, critic, mine, settings, groups, optimizers)
            assert found["policy_loss"] == pytest.approx(policy_loss, rel=1e-4, abs=1e-6)
            assert found["value_loss"] == pytest.approx(value_loss, rel=1e-4)
            assert found["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert difference(after[0], own | others) < 1e-4
        for name, weight in (own | others).items():
            torch.testing.assert_close(after[0][name], weight.detach(), rtol=1e-3, atol=1e-4)
    assert kinds == {True, False}  # both ends were seen


def first_update(module):
    """What the first update saw."""
    return module.iterations[0][3][0][1]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_ratios_start_at_one(tiny_model_dir, tmp_path, lora):
    """With dropout in the config and in the adapters, at a temperature, packed in micro-batches."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attention_dropout=0.3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    module = Recorded(
        model,
        letters,
        **grouped(
            tokenizer=tokenizer,
            lora=LoRA(r=4, dropout=0.5) if lora else None,
            sampling=Sampling(max_new_tokens=10, temperature=0.7),
            optimizer=lambda p: torch.optim.AdamW(p, lr=3e-2),
            epochs=2,
            micro_batch_tokens=60,
        ),
    )
    quiet(tmp_path, max_steps=3).fit(module, PromptDataModule(run_ppo.prompts(), batch_size=6, val_fraction=0.0))
    for *_, updates, _ in module.iterations:
        first, second = (found for _, found in updates)
        assert first["ratio_error"] < 1e-5
        assert first["clip_fraction"] == 0
        assert abs(first["approx_kl"]) < 1e-9
        assert second["ratio_error"] > 1e-3  # by then the policy has moved


def test_recomputed_log_probs_are_those_of_the_engine(tiny_model_dir, tmp_path):
    _, module = run(tiny_model_dir, tmp_path, max_steps=2)
    assert module.trainer.callback_metrics["train/rollout_error"] < 1e-4
    _, module = run(tiny_model_dir, tmp_path / "rollout", max_steps=2, old_logprobs="rollout")
    assert module.trainer.callback_metrics["train/first_ratio_error"] < 1e-3


# ------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_micro_batches_and_layout_do_not_change_the_result(tiny_model_dir, tmp_path, lora):
    options = dict(lora=lora, max_steps=2, samples_per_prompt=2)
    _, whole = run(tiny_model_dir, tmp_path / "a", micro_batch_tokens=None, **options)
    _, parts = run(tiny_model_dir, tmp_path / "b", micro_batch_tokens=60, **options)
    _, padded = run(tiny_model_dir, tmp_path / "c", micro_batch_tokens=60, layout="padded", **options)
    assert difference(trained(parts), trained(whole)) < 1e-5
    assert difference(trained(padded), trained(whole)) < 1e-5


class Gradients(PPOModule):
    """Keeps what the first update was made of."""

    def backward_minibatch(self, experience, chosen, ptx):
        found = super().backward_minibatch(experience, chosen, ptx)
        if not hasattr(self, "first"):
            gradients = {k: p.grad.clone() for k, p in self.named_parameters() if p.grad is not None}
            names = ("old_logprobs", "reference_logprobs", "values", "returns", "advantages", "weight")
            self.first = gradients, found["loss"], {name: getattr(experience, name) for name in names}
        return found


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_a_tree_over_the_budget_is_cut_between_its_completions(tiny_model_dir, tmp_path, monkeypatch, lora, layout):
    """With the prompt repeated; it ended the run in its middle."""
    monkeypatch.setattr(run_ppo, "PPOModule", Gradients)
    options = dict(lora=lora, layout=layout, max_steps=1, samples_per_prompt=5, minibatches=1, bootstrap=True,
                   entropy_coef=0.01)  # fmt: skip
    _, whole = run(tiny_model_dir, tmp_path / "whole", micro_batch_tokens=None, **options)
    longest = whole.trainer.datamodule.longest("train")
    trees = []
    monkeypatch.setattr(Gradients, "micro_batches", lambda self, experience, chosen=None: (
        trees.append(part.batch.num_tokens) or part for part in PPOModule.micro_batches(self, experience, chosen)
    ))  # fmt: skip
    _, cut = run(tiny_model_dir, tmp_path / "cut", micro_batch_tokens=longest + 15, **options)
    assert max(trees) <= longest + 15 < longest + 5 * 10 and len(trees) > 3 * 4
    for a, b in zip(whole.first, cut.first, strict=True):
        if isinstance(a, dict):
            assert difference(b, a) < 1e-6
        else:
            assert b == pytest.approx(a, rel=1e-6)
    assert difference(trained(cut), trained(whole)) < 1e-5


class Played(PPOModule):
    """Counts passes of policy and critic by their role and whether they made a graph."""

    def configure_model(self):
        super().configure_model()
        if not hasattr(self, "passes"):
            self.passes, forward = Counter(), self.actors.forward

            def counted(role, batch, **options):
                self.passes[role, torch.is_grad_enabled()] += 1
                return forward(role, batch, **options)

            self.actors.forward = counted


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(lora=True, entropy_coef=0.05, kl_penalty="k3", kl_coef=0.3, samples_per_prompt=2),
        dict(lora=True, precision="bf16-mixed"),
        dict(lora=True, critic_kind="separate", epochs=1, ptx=True, old_logprobs="rollout"),
        dict(critic_kind="head"),
    ],
    ids=["separate", "shared", "bf16", "one epoch, ptx", "head"],
)
def test_the_first_update_goes_back_through_the_passes_that_scored(tiny_model_dir, tmp_path, monkeypatch, options):
    monkeypatch.setattr(run_ppo, "PPOModule", Played)
    options = dict(minibatches=1, micro_batch_tokens=None, max_steps=3) | options
    epochs = options.get("epochs", 2)
    _, reused = run(tiny_model_dir, tmp_path / "reused", **options)
    _, anew = run(tiny_model_dir, tmp_path / "anew", reuse_passes=False, **options)
    assert difference(trained(reused), trained(anew)) < (1e-2 if "precision" in options else 1e-6)
    ptx = 3 if options.get("ptx") else 0
    for module, without, graphs in ((reused, 0, 3 * epochs), (anew, 3, 3 * epochs)):
        assert (module.passes["policy", False], module.passes["policy", True]) == (without, graphs + ptx)
        critic = (0, 0) if module.critic_kind == "head" else (without, graphs)  # a head shares the policy's pass
        assert (module.passes["critic", False], module.passes["critic", True]) == critic
        assert module.passes["reference", False] == 3 and not module.passes["reference", True]


@pytest.mark.parametrize(
    "options",
    [
        dict(minibatches=2, micro_batch_tokens=None),
        dict(minibatches=1),
        dict(gradient_checkpointing=True, minibatches=1, micro_batch_tokens=None),
    ],
    ids=["minibatches", "micro-batches", "checkpointing"],
)
def test_passes_that_an_update_does_not_make_again_are_not_kept(tiny_model_dir, tmp_path, monkeypatch, options):
    monkeypatch.setattr(run_ppo, "PPOModule", Played)
    _, module = run(tiny_model_dir, tmp_path, lora=True, max_steps=1, **options)
    assert module.passes["policy", False] and module.passes["critic", False]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            dict(lora=True, kl_target=0.01, kl_horizon=50, scale_scores=True, whiten_rewards=True),
            marks=pytest.mark.exhaustive,
        ),
        dict(
            lora=True,
            critic_kind="separate",
            batch_size=5,
            loss_mean="sequence",
            minibatches=1,
            micro_batch_tokens=None,
        ),
        dict(ptx=True, kl_penalty="k3", target_kl=1e-3, critic_kind="head"),
    ],
    ids=["shared", "separate, odd batch", "head, ptx, early stop"],
)
def test_two_processes_equal_one(tiny_model_dir, tmp_path, options):
    options = {"lr": 1e-3, "max_steps": 3, **options}
    two = spawn(tiny_model_dir, tmp_path / "two", devices=2, **options)
    one = spawn(tiny_model_dir, tmp_path / "one", **options)
    assert difference(two, one) < 1e-5
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one"))
    for name in a.keys() - {"train/tokens_per_second", "train/first_ratio_error", "train/rollout_error"}:
        if "seconds" not in name:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_a_rank_without_prompts_goes_along(tiny_model_dir, tmp_path):
    two = spawn(tiny_model_dir, tmp_path / "two", devices=2, batch_size=1, lora=True, max_steps=2, minibatches=1)
    one = spawn(tiny_model_dir, tmp_path / "one", batch_size=1, lora=True, max_steps=2, minibatches=1)
    assert difference(two, one) < 1e-5


# ------------------------------------------------------------------------------------------------- resume

RESUMED = {
    "shared": dict(lora=True, dropout=0.2, kl_target=0.01, kl_horizon=50, scale_scores=True),
    "separate": dict(lora=True, critic_kind="separate", ptx=True),
    "full": dict(ptx=True, batch_size=6),
    "head": dict(critic_kind="head", trunk_grad=0.5),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_model_dir, tmp_path, name):
    """At every iteration, the middle and the end of epochs among them, and in a new process's state."""
    options = RESUMED[name]
    trainer, whole = run(tiny_model_dir, tmp_path / "whole", max_steps=8, save_every=1, **options)
    for step in (1, 4, 5):
        out = tmp_path / f"from{step}"
        again, module = run(
            tiny_model_dir, out, max_steps=8, ckpt=tmp_path / "whole" / f"step{step}.ckpt", seed=7, **options
        )
        assert again.global_step == 8 and module.iteration == 8
        assert_equal(trained(module), trained(whole))
        assert module.kl_coef == whole.kl_coef
        assert module.running_scores.state_dict() == whole.running_scores.state_dict()
        for key, value in trainer.callback_metrics.items():
            if "second" not in key:
                assert torch.equal(again.callback_metrics[key], value) or value.isnan(), key


def test_a_resumed_policy_is_not_its_own_reference(tiny_model_dir, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tiny_model_dir, tmp_path, max_steps=2, save_every=2, lr=1e-2)
    assert not [w for w in caught if "ModelCheckpoint" in str(w.message)], "advice that is wrong here"
    _, module = run(tiny_model_dir, tmp_path / "on", max_steps=2, ckpt=tmp_path / "step2.ckpt", lr=1e-2)
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert_equal(dict(module.reference.model.named_parameters()), dict(start.named_parameters()))
    assert difference(dict(module.policy.model.named_parameters()), dict(start.named_parameters())) > 1e-3


def test_checkpoints_hold_no_frozen_weights(tiny_model_dir, tmp_path):
    _, module = run(tiny_model_dir, tmp_path, max_steps=1, save_every=1, lora=True)
    saved = torch.load(tmp_path / "step1.ckpt", weights_only=True)["state_dict"]
    assert {k for k in saved if "metric" not in k and not k.startswith("val_")} == set(trained(module))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_killed_at_random_moments_it_ends_the_same(tiny_model_dir, tmp_path, kills):
    """kill -9, resumed from the last checkpoint each time."""
    options = dict(lora=True, max_steps=3 * kills + 3, save_every=1, kl_target=0.01, kl_horizon=50)
    whole = spawn(tiny_model_dir, tmp_path / "whole", **options)
    killed = spawn_killed("run_ppo", tiny_model_dir, tmp_path / "killed", kills, **options)
    assert_same_steps(tmp_path / "killed", tmp_path / "whole")  # tells where they part
    assert_equal(killed, whole)


# ------------------------------------------------------------------------------------------------- updates


class Broken(PPOModule):
    """Has losses that are not finite in chosen updates."""

    broken = ()
    count = 0

    def backward_minibatch(self, experience, chosen, ptx):
        found = super().backward_minibatch(experience, chosen, ptx)
        if self.count in self.broken:
            for parameters in self.trainable_parameters().values():
                for p in parameters:
                    p.grad = None if p.grad is None else p.grad * math.nan
            found["loss"] = math.nan
        self.count += 1
        return found


def broken(model_dir, tmp_path, which, max_steps, **options):
    module = Broken(model_dir, letters, **grouped(
        lora=LoRA(r=4), sampling=Sampling(max_new_tokens=6), minibatches=2, epochs=1, **options
    ))  # fmt: skip
    module.broken = which
    trainer = quiet(tmp_path, max_steps=max_steps)
    data = PromptDataModule(run_ppo.prompts(), batch_size=4, val_fraction=0.0)
    return trainer, module, data


def test_an_update_that_is_not_finite_is_dropped_and_counted(tiny_model_dir, tmp_path):
    trainer, module, data = broken(tiny_model_dir, tmp_path, (0, 2, 3), 3)
    trainer.fit(module, data)
    assert trainer.global_step == module.iteration == 3  # the second iteration took no update, and counts
    assert all(p.isfinite().all() for p in trained(module).values())
    assert module.skipped == 0


def test_too_many_dropped_updates_end_the_run(tiny_model_dir, tmp_path):
    trainer, module, data = broken(tiny_model_dir, tmp_path, range(100), 5, max_dropped=3)
    with pytest.raises(RuntimeError, match="3 iterations in a row were skipped"):
        trainer.fit(module, data)
    start = Broken(tiny_model_dir, letters, lora=LoRA(r=4))
    start.configure_model()
    after = {k: v for k, v in trained(module).items() if "lora_B" in k}
    assert after and not any(v.any() for v in after.values())  # as they began


def test_what_is_dropped_is_counted_in_iterations(tiny_model_dir, tmp_path):
    """One bad iteration has many bad updates: it is one, and a good one after it starts the count again."""
    trainer, module, data = broken(tiny_model_dir, tmp_path, [*range(8), *range(12, 16)], 4, max_dropped=3)
    module.updates = replace(module.updates, epochs=2, minibatches=2)
    counts = []
    module.on_train_batch_end = lambda *_: counts.append(module.skipped)
    trainer.fit(module, data)
    assert counts == [1, 2, 0, 1] and trainer.global_step == 4


# ------------------------------------------------------------------------------------------------- bad scores


class Constant(Reward):
    """A reward of one's own, that checks nothing."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, samples):
        scores = torch.arange(float(len(samples.completions)))
        scores[1] = self.value
        return Scores(scores)


def reward_of(value):
    """One bad score among good ones, whatever is asked."""
    return lambda prompts, completions: [value if i == 1 else float(i) for i in range(len(completions))]


def test_a_reward_that_does_not_apply_to_a_completion_leaves_it_out(tiny_model_dir, tmp_path):
    """None is no bad score: the run goes on, and the completion is counted."""
    module = PPOModule(tiny_model_dir, reward_of(None), **grouped(lora=LoRA(r=2), sampling=Sampling(max_new_tokens=3)))
    data = PromptDataModule(run_ppo.prompts(), batch_size=4, val_fraction=0.0, cache_dir=tmp_path / "cache")
    trainer = quiet(tmp_path, max_steps=1)
    trainer.fit(module, data)
    assert trainer.callback_metrics["train/dropped_samples"] == 1 and module.trainer.global_step == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39])
def test_a_bad_score_stops_the_run_and_names_its_sample(tiny_model_dir, tmp_path, value):
    own = value != 1e39
    for reward in (reward_of(value), *([Constant(value)] if own else []), [WeightedReward(reward_of(value))]):
        module = PPOModule(tiny_model_dir, reward, **grouped(lora=LoRA(r=2), sampling=Sampling(max_new_tokens=3)))
        data = PromptDataModule(run_ppo.prompts(), batch_size=4, val_fraction=0.0, cache_dir=tmp_path / "cache")
        with pytest.raises(ValueError, match=r"completion 1 \(row \d+ of the prompts\).*Prompt: .*bad_scores to drop"):
            quiet(tmp_path, max_steps=1).fit(module, data)
        assert module.trainer.global_step == 0


class Without(PPOModule):
    """Never has the prompts that want an a."""

    def run_rollout(self, prompts, iteration):
        keep = [i for i, wanted in enumerate(prompts.columns["wanted"]) if wanted != "a"]
        pick = lambda values: [values[i] for i in keep]  # noqa: E731
        columns = {name: pick(values) for name, values in prompts.columns.items()}
        fewer = replace(prompts, prompts=pick(prompts.prompts), messages=pick(prompts.messages),
                        rows=tuple(pick(prompts.rows)), columns=columns)  # fmt: skip
        return super().run_rollout(fewer, iteration)


@pytest.mark.parametrize(
    "options",
    [
        dict(scale_scores=True, whiten_rewards=True),
        dict(loss_mean="sequence", whiten_advantages=False, clip_scores=2.0, samples_per_prompt=2),
        dict(reward=[WeightedReward(run_ppo.patchy, 1.0), WeightedReward(happy, 0.5)], critic_kind="separate"),
    ],
    ids=["scaled, whitened", "sequence mean", "weighted list"],
)
def test_a_dropped_sample_teaches_nothing(tiny_model_dir, tmp_path, monkeypatch, options):
    """As if its prompt had not been there: in whitening, in running moments, in means and in gradients."""
    options = dict(lora=True, max_steps=4, minibatches=1, reward=run_ppo.patchy, batch_size=5) | options
    with pytest.warns(UserWarning, match=r"left out: .*returned nan for completion \d"):
        trainer, dropped = run(tiny_model_dir, tmp_path / "dropped", bad_scores="drop", **options)
    monkeypatch.setattr(run_ppo, "PPOModule", Without)
    other, without = run(tiny_model_dir, tmp_path / "without", **options)
    assert difference(trained(dropped), trained(without)) < 1e-5
    assert dropped.running_scores.state_dict() == pytest.approx(without.running_scores.state_dict())
    found, want = trainer.callback_metrics, other.callback_metrics
    counts = [sum(logged(tmp_path / name, "dropped_samples")) for name in ("dropped", "without")]
    assert counts == [4 * options.get("samples_per_prompt", 1), 0]  # 4 of the epoch's 20 prompts
    for name in ("score", "score_std", "score_min", "reward_mean", "advantage_mean", "advantage_std", "loss",
                 "explained_variance", "value_loss"):  # fmt: skip
        assert found[f"train/{name}"] == pytest.approx(want[f"train/{name}"].item(), rel=1e-3, abs=1e-5), name
    for name in (k for k in want if k.startswith("train/score/")):
        assert found[name] == pytest.approx(want[name].item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_drop_alike(tiny_model_dir, tmp_path):
    options = dict(lora=True, max_steps=4, reward="run_ppo.patchy", bad_scores="drop", scale_scores=True, batch_size=5)
    two = spawn(tiny_model_dir, tmp_path / "two", devices=2, **options)
    one = spawn(tiny_model_dir, tmp_path / "one", **options)
    assert difference(two, one) < 1e-5
    assert sum(logged(tmp_path / "two", "dropped_samples")) == 4


def test_a_reward_that_never_scores_ends_the_run(tiny_model_dir, tmp_path):
    options = dict(lora=True, max_steps=9, bad_scores="drop", reward=lambda prompts, completions: [math.nan] * 4)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(RuntimeError, match="2 iterations in a row"):
        run(tiny_model_dir, tmp_path, max_dropped=2, **options)


def test_validation_and_prediction_go_on_without_it(tiny_model_dir, tmp_path):
    module = PPOModule(
        tiny_model_dir, run_ppo.patchy, **grouped(bad_scores="drop", sampling=Sampling(max_new_tokens=3))
    )
    data = PromptDataModule(run_ppo.prompts(5), val=run_ppo.prompts(5), cache_dir=tmp_path / "cache")
    with pytest.warns(UserWarning, match="left out"):
        found = quiet(tmp_path).validate(module, data, verbose=False)[0]
        records = [record for batch in quiet(tmp_path).predict(module, data) for record in batch]
    scores = [record["score"] for record in records]
    assert scores[0] is None and None not in scores[1:]
    assert found["val/score"] == pytest.approx(sum(scores[1:]) / 4, rel=1e-5)


# ------------------------------------------------------------------------------------------------- fp16


class ScalesOnly(MixedPrecision):
    """fp16's loss scaling without its autocast, so that results can be compared with fp32's."""

    def __init__(self, **options):
        super().__init__("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", **options))

    def forward_context(self):
        return nullcontext()


class Watched(Updater):
    """Notes what an update changed."""

    def step(self, parameters, *args, **kwargs):
        before = {name: [p.detach().clone() for p in group] for name, group in parameters.items()}
        found = super().step(parameters, *args, **kwargs)
        moved = [
            any(not torch.equal(p, b) for p, b in zip(group, before[name], strict=True))
            for name, group in parameters.items()
        ]
        scale = loss_scale(self.trainer) if grad_scaler(self.trainer) is not None else None
        self.module.seen.append((found.outcome == "taken", *moved, scale))
        return found


class Scales(PPOModule):
    """Keeps the scale after each update, and overflows the critic's gradients in chosen ones."""

    overflows = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.updater = [], Watched(self)

    def backward_minibatch(self, experience, chosen, ptx):
        found = super().backward_minibatch(experience, chosen, ptx)
        if len(self.seen) in self.overflows:
            self.trainable_parameters()["value"][0].grad.view(-1)[0] = math.inf
        return found


def scaled(model_dir, tmp_path, plugin, max_steps=2, overflows=(), shared=False, **options):
    torch.manual_seed(0)
    module = Scales(model_dir, letters, **grouped(
        lora=LoRA(r=4), critic_kind="adapter" if shared else "separate", epochs=2, minibatches=1,
        sampling=Sampling(max_new_tokens=6),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0), reuse_passes=False, **options,
    ))  # fmt: skip
    module.overflows = overflows
    trainer = quiet(tmp_path, max_steps=max_steps, plugins=[plugin] if plugin else None)
    trainer.fit(module, PromptDataModule(run_ppo.prompts(), batch_size=4, val_fraction=0.0))
    return trainer, module


@pytest.mark.parametrize("shared", [False, True], ids=["two optimizers", "one"])
def test_a_scale_that_moves_leaves_the_steps_as_they_are(tiny_model_dir, tmp_path, shared):
    """It doubled between two optimizers: the critic's gradients were then half of what they are."""
    plugin = ScalesOnly(init_scale=4.0, growth_interval=1)
    trainer, module = scaled(tiny_model_dir, tmp_path, plugin, shared=shared)
    plain_trainer, plain = scaled(tiny_model_dir, tmp_path, None, shared=shared)
    assert [scale for *_, scale in module.seen] == [8, 16, 32, 64]  # once an update
    assert difference(trained(module), trained(plain)) < 1e-6
    for name in ("policy_grad_norm", "value_grad_norm"):
        want = plain_trainer.callback_metrics[f"train/{name}"].item()
        assert trainer.callback_metrics[f"train/{name}"] == pytest.approx(want, rel=1e-4)
    assert trainer.global_step == 2


def test_an_overflow_of_one_optimizer_drops_the_step_of_both(tiny_model_dir, tmp_path):
    plugin = ScalesOnly(init_scale=2.0**16)
    trainer, module = scaled(tiny_model_dir, tmp_path, plugin, 3, overflows=(0, 2, 3), max_dropped=1)
    half = 2.0**15
    assert module.seen == [
        (False, False, False, half),
        (True, True, True, half),
        (False, False, False, half / 2),  # an iteration without an update: counted, and no divergence
        (False, False, False, half / 4),
        (True, True, True, half / 4),
        (True, True, True, half / 4),
    ]
    assert trainer.global_step == module.iteration == 3 and module.skipped == 0
    assert trainer.callback_metrics["train/skipped_updates"] == 0


def test_overflow_at_a_scale_of_one_is_divergence(tiny_model_dir, tmp_path):
    plugin = ScalesOnly(init_scale=4.0)
    with pytest.raises(RuntimeError, match="2 iterations in a row were skipped"):
        scaled(tiny_model_dir, tmp_path, plugin, 9, overflows=range(99), max_dropped=2)


def test_fp16_with_two_optimizers_runs(tiny_model_dir, tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8))
    trainer, module = scaled(tiny_model_dir, tmp_path, plugin, 2)
    assert trainer.global_step == 2 and all(p.isfinite().all() for p in trained(module).values())
    assert trainer.callback_metrics["train/updates"] == 2


# ------------------------------------------------------------------------------------------------- schedules


def plateau(monitor=None, **options):
    """torch's own, or Lightning's, which knows its metric."""
    if monitor is None:
        return lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    return lambda optimizer: ReduceLROnPlateau(optimizer, monitor, **options)


class Stepped(L.Callback):
    """What plateau schedules were stepped by, and what was logged then."""

    def on_train_start(self, trainer, pl_module):
        self.values = []
        for config in trainer.lr_scheduler_configs:
            step = config.scheduler.step
            config.scheduler.step = lambda value, step=step: (self.values.append(value), step(value))[1]


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        (plateau(), "train/loss"),
        (plateau(mode="max"), "train/score"),
        (plateau("train/kl"), "train/kl"),
        (plateau("val/score", mode="max"), "val/score"),
    ],
)
def test_a_plateau_schedule_steps_on_a_metric_that_is_logged(tiny_model_dir, tmp_path, schedule, name):
    values, stepped = [], Stepped()

    class Logged(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            values.append(trainer.callback_metrics.get("train/" + name.split("/")[1]))

        def on_validation_end(self, trainer, *_):
            if not trainer.sanity_checking and name.startswith("val/"):
                values[-1] = trainer.callback_metrics[name]

    validates = dict(val_fraction=0.3) if name.startswith("val/") else {}
    run(tiny_model_dir, tmp_path, lora=True, max_steps=3, callbacks=[stepped, Logged()], lr_scheduler=schedule,
        critic_kind="separate", batch_size=20, **validates)  # fmt: skip
    assert len(stepped.values) == 2 * 3  # policy's and critic's
    assert stepped.values[::2] == stepped.values[1::2] == pytest.approx([value.item() for value in values])


def test_a_plateau_lowers_the_rate(tiny_model_dir, tmp_path):
    options = dict(reward=lambda prompts, completions: [1.0] * 4, lr_scheduler=plateau("train/score", mode="max",
                   patience=1, factor=0.5))  # fmt: skip
    trainer, _ = run(tiny_model_dir, tmp_path, lora=True, max_steps=5, lr=1e-3, **options)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3 * 0.5**2  # best at the first, 2 x 2 bad ones


def test_a_metric_that_is_not_logged_is_refused_with_those_that_are(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"follows 'train/socre', which is not logged.*one of: .*train/score, "):
        run(tiny_model_dir, tmp_path, lora=True, max_steps=3, lr_scheduler=plateau("train/socre"))
    with pytest.raises(ValueError, match=r"follows 'val/loss', .*one of: .*val/length, val/score"):
        run(tiny_model_dir, tmp_path, lora=True, max_steps=9, val_fraction=0.3, lr_scheduler=plateau("val/loss"))


def test_an_iteration_stopped_early_counts_once(tiny_model_dir, tmp_path):
    trainer, module = run(tiny_model_dir, tmp_path, max_steps=3, target_kl=1e-12, epochs=4, minibatches=1, lr=1e-2)
    assert trainer.global_step == module.iteration == 3
    assert trainer.callback_metrics["train/updates"] == 1


def test_schedules_run_by_iterations(tiny_model_dir, tmp_path):
    trainer, _module = run(tiny_model_dir, tmp_path, max_steps=4)
    assert {c.scheduler.last_epoch for c in trainer.lr_scheduler_configs} == {4}
    assert all(c.scheduler.total_steps == 4 for c in trainer.lr_scheduler_configs)


class Order(L.Callback):
    """Norms of the gradients that a callback's hook sees, and those that the optimizers then step by."""

    def __init__(self, module, factor=1.0):
        self.module, self.factor, self.seen, self.stepped = module, factor, [], []

    def groups(self, optimizer):
        """The groups of an optimizer that have gradients, each with its norm."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, group in self.module.trainable_parameters().items():
            if any(id(p) in own and p.grad is not None for p in group):
                yield name, torch.stack([p.grad.norm() for p in group]).norm().item()

    def on_train_start(self, trainer, module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda optimizer, *_: self.stepped.extend(self.groups(optimizer)))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen += self.groups(optimizer)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None if p.grad is None else p.grad * self.factor


@pytest.mark.parametrize("plugin", [None, {"init_scale": 64.0}], ids=["fp32", "fp16's scaler"])
@pytest.mark.parametrize("shared", [True, False], ids=["one optimizer", "two"])
def test_hooks_see_gradients_before_they_are_clipped(tiny_model_dir, tmp_path, shared, plugin):
    """As in all of Lightning; the norms of policy and critic are bounded apart, whatever hooks made of them."""
    for factor in (1.0, 1e-7):
        options = dict(lora=LoRA(r=4), critic_kind="adapter" if shared else "separate", max_norm=1e-3,
                       sampling=Sampling(max_new_tokens=6))  # fmt: skip
        module = PPOModule(tiny_model_dir, letters, **grouped(**options, epochs=1))
        order = Order(module, factor)
        trainer = quiet(tmp_path, max_steps=1, callbacks=[order], plugins=[ScalesOnly(**plugin)] if plugin else None)
        trainer.fit(module, PromptDataModule(run_ppo.prompts(), batch_size=4, val_fraction=0.0))
        assert [name for name, _ in order.seen] == [name for name, _ in order.stepped] == ["policy", "value"]
        for (name, seen), (_, stepped) in zip(order.seen, order.stepped, strict=True):
            assert seen > 1e-3 and seen == pytest.approx(trainer.callback_metrics[f"train/{name}_grad_norm"].item())
            assert stepped == pytest.approx(min(1e-3, factor * seen), rel=1e-3)


def test_a_hook_that_keeps_gradients_from_being_clipped_is_refused(tiny_model_dir, tmp_path):
    class Own(PPOModule):
        def on_before_optimizer_step(self, optimizer):
            pass

    module = Own(tiny_model_dir, letters, **grouped(lora=LoRA(r=4), sampling=Sampling(max_new_tokens=6)))
    data = PromptDataModule(run_ppo.prompts(), batch_size=4, val_fraction=0.0)
    with pytest.raises(RuntimeError, match=r"Own.on_before_optimizer_step does not call super\(\), which clips"):
        quiet(tmp_path, max_steps=1).fit(module, data)


# ------------------------------------------------------------------------------------------------- known beforehand


class Sampled(CachedEngine):
    """Counts rollouts."""

    count = 0

    def generate(self, *args):
        self.count += 1
        return super().generate(*args)


@pytest.fixture(scope="module")
def short_reward_dir(tiny_model_dir, tmp_path_factory):
    """A reward model of the policy's tokenizer whose context is 48 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = load_reward_model(tiny_model_dir, pad_token_id=tokenizer.pad_token_id)
    model.config.max_position_embeddings = 48
    return str(save_pretrained(model, tokenizer, tmp_path_factory.mktemp("short") / "rm"))


LONG = [{"prompt": "Say fox dog " * n} for n in (1, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reward="short"), r"over 48: the context of the reward model .*max_new_tokens to at most \d+, or "),
        (dict(reward=[WeightedReward("short"), WeightedReward(happy)]), "over 48: the context of the reward model"),
        (dict(critic="short"), "over 48: the context of the critic"),
        (dict(micro_batch_tokens=45), r"over 45: updates.* updates.micro_batch_tokens to at least (\d+)"),
        (dict(sampling=Sampling(max_new_tokens=300)), r"no room .* context of 256 tokens. Set it to at most 255"),
        (dict(kl_target=1.0, kl_horizon=1.0), "A KL horizon of 1.0 is too short for 8 samples"),
        (dict(ptx_coef=0.1), r"ptx_coef=0.1 .* the data have none. Give data.ptx.source"),
        (dict(ptx_coef=0.1, ptx=[{"text": "fox " * 99}], micro_batch_tokens=80), r"A text of data.ptx has \d+ tokens"),
    ],
    ids=["reward model", "a part's", "critic", "micro-batch", "completion", "horizon", "no ptx", "long ptx"],
)
def test_what_would_end_the_run_in_its_middle_is_refused_before_it_samples(
    tiny_model_dir, short_reward_dir, tmp_path, options, message
):
    ptx, engine = options.get("ptx"), Sampled()
    settings = {"reward": happy, "sampling": Sampling(max_new_tokens=16), **options}
    settings.pop("ptx", None)
    for name in ("reward", "critic"):
        if settings.get(name) == "short":
            settings[name] = short_reward_dir
        if isinstance(settings.get(name), list):
            settings[name] = [WeightedReward(short_reward_dir), settings[name][1]]
    data = PromptDataModule(LONG, val=LONG, batch_size=4, ptx=Ptx(ptx), cache_dir=tmp_path / "cache")
    module = PPOModule(tiny_model_dir, **grouped(samples_per_prompt=2, engine=engine, **settings))
    with pytest.raises(ValueError, match=message):
        quiet(tmp_path, max_steps=1, num_sanity_val_steps=2).fit(module, data)
    assert engine.count == 0


def test_the_numbers_that_a_refusal_names_would_do(tiny_model_dir, short_reward_dir, tmp_path):
    def fit(new=16, max_length=None, **options):
        module = PPOModule(
            tiny_model_dir, **grouped(lora=LoRA(r=2), epochs=1, sampling=Sampling(max_new_tokens=new), **options)
        )
        data = PromptDataModule(LONG, batch_size=4, val_fraction=0.0, max_length=max_length, on_bad_row="skip",
                                cache_dir=tmp_path / "cache")  # fmt: skip
        quiet(tmp_path, max_steps=1).fit(module, data)

    for options in (dict(reward=short_reward_dir), dict(reward=happy, micro_batch_tokens=45)):
        with pytest.raises(ValueError, match="max_new_tokens to at most") as error:
            fit(**options)
        named = r"(max_new_tokens|max_length|micro_batch_tokens)(?: \(of prompts\))? to at (?:most|least) (\d+)"
        numbers = dict(re.findall(named, str(error.value)))
        fit(new=int(numbers["max_new_tokens"]), **options)
        fit(max_length=int(numbers["max_length"]), **options)
        if "micro_batch_tokens" in options:
            fit(**{**options, "micro_batch_tokens": int(numbers["micro_batch_tokens"])})


def test_texts_that_nothing_weighs_are_said(tiny_model_dir, tmp_path):
    module = PPOModule(tiny_model_dir, happy, **grouped(lora=LoRA(r=2), epochs=1, sampling=Sampling(max_new_tokens=2)))
    data = PromptDataModule(LONG, batch_size=2, val_fraction=0.0, ptx=Ptx(run_ppo.TEXTS), cache_dir=tmp_path / "cache")
    with pytest.warns(UserWarning, match="not learned from: model.loss.ptx_coef is 0"):
        quiet(tmp_path, max_steps=1).fit(module, data)


def test_loaders_of_ones_own_without_texts_are_refused_too(tiny_model_dir, tmp_path):
    engine = Sampled()
    module = PPOModule(tiny_model_dir, happy, **grouped(ptx_coef=0.1, engine=engine))
    data = PromptDataModule(
        LONG, batch_size=2, val_fraction=0.0, cache_dir=tmp_path / "cache", tokenizer=module.tokenizer
    )
    data.setup("fit")
    with pytest.raises(ValueError, match="the data have none"):
        quiet(tmp_path, max_steps=1).fit(module, data.train_dataloader())
    assert engine.count == 0


# ------------------------------------------------------------------------------------------------- what it learns


LEARNS = dict(
    max_steps=20, batch_size=10, samples_per_prompt=4, lr=1e-2, epochs=2, minibatches=1, micro_batch_tokens=None,
    sampling={"max_new_tokens": 8}, kl_coef=0.0,
)  # fmt: skip


def test_the_score_rises(tiny_model_dir, tmp_path):
    run(tiny_model_dir, tmp_path, reward=happy, **LEARNS)
    found = logged(tmp_path, "score")
    assert sum(found[-5:]) / 5 > sum(found[:5]) / 5 + 0.15


@pytest.mark.parametrize("control", ["large kl_coef", "constant reward"])
def test_controls_stay_where_they_were(tiny_model_dir, tmp_path, control):
    options = {**LEARNS, "kl_coef": 20.0 if control == "large kl_coef" else 0.05}
    reward = happy if control == "large kl_coef" else (lambda prompts, completions: [1.0] * len(completions))
    trainer, _ = run(tiny_model_dir, tmp_path, reward=reward, **options)
    learnt, _ = run(tiny_model_dir, tmp_path / "learnt", reward=happy, **LEARNS)
    assert trainer.callback_metrics["train/kl"] < 0.1 * learnt.callback_metrics["train/kl"]


# ------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("score", "options"),
    [
        (-1.0, dict()),
        (0.1, dict(samples_per_prompt=3)),  # not exact in fp32: the mean of many is off by rounding
        (1e4 / 3, dict(clip_scores=5.0)),
        (0.0, dict()),
        (0.7, dict(batch_size=1, minibatches=1)),
    ],
    ids=["negative", "inexact", "clipped", "zero", "one sample"],
)
def test_equal_scores_are_not_scaled_up(tiny_model_dir, tmp_path, score, options):
    """They were divided by 1e-8."""
    trainer, module = run(tiny_model_dir, tmp_path, lora=True, max_steps=2, scale_scores=True, kl_coef=0.0, lr=1e-4,
                          reward=lambda prompts, completions: [score] * len(completions), **options)  # fmt: skip
    found = trainer.callback_metrics
    want = min(score, options.get("clip_scores", score))
    assert found["train/reward_mean"] == pytest.approx(want, rel=1e-5, abs=1e-7)
    assert (
        found["train/score"] == pytest.approx(score, rel=1e-5) and found["train/score_std"] < 1e-6 * abs(score) + 1e-9
    )
    assert found["train/value_loss"] < 2 * want**2 + 1e-6
    assert module.running_scores.scale == 1
    assert all(v.isfinite() for k, v in found.items() if k != "train/explained_variance")


def test_scores_that_begin_to_differ_are_scaled_from_then_on(tiny_model_dir, tmp_path):
    seen = []

    def later(prompts, completions):
        seen.extend([2.0 + (len(seen) >= 4) * i for i in range(len(completions))])
        return seen[-len(completions) :]

    trainer, module = run(tiny_model_dir, tmp_path, lora=True, max_steps=2, scale_scores=True, kl_coef=0.0,
                          reward=later)  # fmt: skip
    std = torch.tensor(seen).std(correction=0).item()
    assert len(seen) == 8 and module.running_scores.scale == pytest.approx(std)
    assert trainer.callback_metrics["train/reward_mean"] == pytest.approx(sum(seen[4:]) / 4 / std, rel=1e-5)


def test_ptx_adds_the_language_models_gradient(tiny_model_dir, tmp_path):
    """The difference that ptx makes to a step of SGD is its own gradient, from plain transformers."""
    found = {}
    for name, coefficient in (("with", 0.5), ("without", 0.0)):
        module = PPOModule(
            tiny_model_dir,
            letters,
            **grouped(
                sampling=Sampling(max_new_tokens=6),
                optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
                lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0),
                epochs=1,
                max_norm=None,
                ptx_coef=coefficient,
                micro_batch_tokens=60,
            ),
        )
        data = PromptDataModule(run_ppo.prompts(), batch_size=4, val_fraction=0.0, ptx=Ptx(run_ppo.TEXTS, 3))
        trainer = quiet(tmp_path, max_steps=1)
        trainer.fit(module, data)
        found[name] = {k: v.detach().clone() for k, v in module.policy.model.named_parameters()}
    batch = next(iter(data.train_dataloader()))["ptx"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    total = 0
    for tree in unpack(batch):
        ids = torch.tensor([[*tree.prompt, *tree.branches[0].input_ids]])
        scored = tree.branches[0].scored or [True] * len(tree.branches[0].input_ids)
        logp = model(ids).logits[0, len(tree.prompt) - 1 : -1].log_softmax(-1)
        picked = logp.gather(1, ids[0, len(tree.prompt) :, None])[:, 0]
        total = total - picked[torch.tensor(scored)].sum()
    (0.5 * total / batch.num_scored).backward()
    moved = {k: found["without"][k] - found["with"][k] for k in found["with"]}
    assert difference(moved, {k: p.grad for k, p in model.named_parameters()}) < 1e-3
    assert trainer.callback_metrics["train/ptx_loss"] == 0  # of the last run, which had none


def test_dropout_is_off_whatever_its_name():
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    for model in (
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50)),
        OPTForCausalLM(OPTConfig(num_hidden_layers=1, hidden_size=16, ffn_dim=16, num_attention_heads=2, vocab_size=50,
                                 word_embed_proj_dim=16)),
    ):  # fmt: skip
        disable_dropout(model)
        model.train()
        ids = torch.arange(20)[None]
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_validation_repeats_its_samples(tiny_model_dir, tmp_path):
    """By keys of their own: two validations of the same weights agree, and training's samples don't change."""
    trainer, module = run(tiny_model_dir, tmp_path, max_steps=2, val_fraction=0.3)
    data = trainer.datamodule
    first, second = (quiet(tmp_path).validate(module, data, verbose=False)[0] for _ in range(2))
    assert first == second and first["val/length"] > 0
    records = [r for batch in quiet(tmp_path).predict(module, data) for r in batch]
    assert {"row", "completion", "score", "truncated"} == set(records[0])
    assert sum(r["score"] for r in records) / len(records) == pytest.approx(first["val/score"], abs=1e-5)


def test_what_is_refused(tiny_model_dir):
    with pytest.raises(ValueError, match=r"rollout\.sampling\.temperature .*greedy completions teach nothing"):
        PPOModule(tiny_model_dir, letters, **grouped(sampling=Sampling(temperature=0.0)))
    with pytest.raises(ValueError, match="k1 cannot be a loss"):
        PPOModule(tiny_model_dir, letters, **grouped(kl_penalty="k1"))
    with pytest.raises(ValueError, match=r"critic\.pretrained is a Linear"):
        PPOModule(tiny_model_dir, letters, **grouped(critic=torch.nn.Linear(2, 1)))
    with pytest.raises(ValueError, match=r"set critic\.pretrained to null"):
        PPOModule(tiny_model_dir, letters, **grouped(critic="a reward model", critic_kind="head"))
    with pytest.raises(ValueError, match=r"critic\.trunk_grad=0 is for critic\.kind: head"):
        PPOModule(tiny_model_dir, letters, **grouped(trunk_grad=0))
    with pytest.raises(ValueError, match=r"critic\.kind: adapter needs adapters: set lora"):
        PPOModule(tiny_model_dir, letters, **grouped(critic_kind="adapter"))
    with pytest.raises(ValueError, match="reward: an object of type int is none"):
        PPOModule(tiny_model_dir, 3)
    with pytest.raises(ValueError, match=r"pretrained is a Linear: .*merge_and_unload\(\)"):
        PPOModule(torch.nn.Linear(2, 1), letters, tokenizer=tiny_model_dir)


@pytest.mark.parametrize(
    ("sampling", "said"),
    [({"top_p": 0.9}, "sampling.top_p=0.9: completions"), ({"top_k": 5, "min_new_tokens": 2}, "top_k=5, sampling.min"),
     ({"temperature": 0.7}, None)],
)  # fmt: skip
def test_samples_from_another_distribution_are_warned_of_once(tiny_model_dir, tmp_path, recwarn, sampling, said):
    """Log-probs are of the whole distribution, samples of its top."""
    run(tiny_model_dir, tmp_path, lora=True, max_steps=2, sampling={"max_new_tokens": 4, **sampling})
    found = [str(w.message) for w in recwarn if "gradients and KL are biased" in str(w.message)]
    assert len(found) == (said is not None) and all(said in message for message in found)


def test_a_reward_adapter_of_the_same_weights_shares_the_backbone(tiny_model_dir, tiny_tokenizer, tmp_path):
    """It gives what a reward model of its own gives, without the memory of one."""
    found = {}
    for only, reward in save_reward_adapter(tiny_model_dir, tiny_tokenizer, tmp_path).items():
        _, module = run(tiny_model_dir, tmp_path / f"run {only}", lora=True, max_steps=2, reward=reward)
        assert (module.reward.shared is module.policy) == only
        assert bool(list(module.reward.parameters())) != only
        found[only] = trained(module)
    assert difference(found[True], found[False]) < 1e-4


class Length(Reward):
    """A score by the tokens of a completion; the last of two also spoils what it read."""

    def __init__(self, spoils):
        super().__init__()
        self.spoils = spoils

    def forward(self, samples):
        scores = samples.batch.input_ids[samples.batch.last].float() / samples.batch.lengths
        if self.spoils:
            for values in (samples.batch.input_ids, samples.batch.target, samples.batch.weight, samples.batch.last):
                values.zero_()
            samples.completions.clear()
        return Scores(scores)


def test_a_reward_that_writes_into_its_batch_changes_nothing(tiny_model_dir, tmp_path):
    found = {}
    for spoils in (False, True):
        out = tmp_path / str(spoils)
        _, module = run(tiny_model_dir, out, reward=Length(spoils), lora=True, max_steps=2)
        prompts = PromptDataModule(run_ppo.prompts(3), val_fraction=0.0, predict=run_ppo.prompts(3))
        found[spoils] = trained(module), quiet(out).predict(module, prompts)
    assert_equal(found[True][0], found[False][0])
    assert found[True][1] == found[False][1]


def test_weighted_rewards_are_logged_apart(tiny_model_dir, tmp_path):
    def ones(prompts, completions):
        return [1.0] * len(completions)

    reward = [WeightedReward(letters, 2.0), WeightedReward(ones, -1.0)]
    trainer, _ = run(tiny_model_dir, tmp_path, lora=True, max_steps=1, reward=reward)
    metrics = trainer.callback_metrics
    assert metrics["train/score/ones"] == 1
    assert metrics["train/score"] == pytest.approx(2 * metrics["train/score/letters"].item() - 1, abs=1e-5)
