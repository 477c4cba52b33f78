"""The GRPO stage: against a plain padded reference, its invariances, groups, exact resume, and what it refuses."""

import copy
import csv
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import assert_equal, assert_same_steps, difference, load_script, quiet, spawn, spawn_killed
from transformers import AutoModelForCausalLM

from lightning_rlhf import (
    KL,
    Algorithm,
    GroupLoss,
    Groups,
    GRPOModule,
    PromptDataModule,
    Rollout,
    Sampling,
    Shaping,
)
from lightning_rlhf.data.errors import DataError
from lightning_rlhf.rewards import WeightedReward

HERE = Path(__file__).parent
reference, run_grpo = (load_script(HERE / f"{name}.py") for name in ("reference_grpo", "run_grpo"))
run, letters, has, trained = run_grpo.run, run_grpo.letters, run_grpo.has, run_grpo.trained
Recorded = run_grpo.Recorded
spawn = partial(spawn, HERE / "run_grpo.py")
ONE_UPDATE = dict(epochs=1, minibatches=1, micro_batch_tokens=None)


def logged(out_dir, name):
    """A metric of each iteration."""
    with (Path(out_dir) / "log" / "version_0" / "metrics.csv").open() as file:
        return [float(row[f"train/{name}"]) for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------------------------- the definition

VARIANTS = {
    "dapo": (
        dict(algorithm="dapo", groups=dict(flat_groups="drop"), shaping=dict(overlong_cache=4), reward="has"),
        dict(mean="token", high=0.28, drop=True, cache=4),
    ),
    "gspo": (
        dict(algorithm="gspo", kl=dict(coef=0.2, where="loss"), loss=dict(entropy_coef=0.05)),
        dict(ratio="sequence", low=3e-4, high=4e-4, kl_coef=0.2, entropy_coef=0.05),
    ),
    "rloo": (
        dict(algorithm="rloo", kl=dict(coef=0.3), shaping=dict(mask_truncated=True)),
        dict(baseline="leave_one_out", std=False, ratio="none", mean="constant", kl_coef=0.3, kl_where="reward",
             mask=True),
    ),
    "reinforce++": (
        dict(algorithm="reinforce++", kl=dict(coef=0.3), shaping=dict(missing_eos_penalty=0.5)),
        dict(baseline="none", whiten=True, mean="token", kl_coef=0.3, kl_where="reward", penalty=0.5),
    ),
    "grpo": (dict(), dict()),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_five_iterations_equal_a_plain_padded_reference(tiny_model_dir, tmp_path, variant):
    options, settings = VARIANTS[variant]
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir).double()
    policy, frozen = copy.deepcopy(start), copy.deepcopy(start)
    _, module = run(copy.deepcopy(start), tmp_path, kind=Recorded, max_steps=5, batch_size=4, samples=4,
                    updates=dict(micro_batch_tokens=110), tokenizer=tiny_model_dir,
                    lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0), **options)  # fmt: skip
    s = reference.Settings(temperature=0.7, longest=10, **settings)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() > 1]}, {"params": [p for p in parameters if p.dim() <= 1],
                                                            "weight_decay": 0.0}], lr=3e-3, eps=1e-5)  # fmt: skip
    ends, learned = set(), 0
    for experience, updates, after, _ in module.iterations:
        rows = zip(experience.scores.tolist(), experience.truncated.tolist(), strict=True)
        groups = [[reference.Sample(tree.prompt, branch.input_ids, *next(rows)) for branch in tree.branches]
                  for tree in experience.trees]  # fmt: skip
        ends |= set(experience.truncated.tolist())
        reference.judge(policy, frozen, groups, s)
        want = torch.cat([x.advantages for group in groups for x in group])
        torch.testing.assert_close(experience.advantages.double(), want.double(), rtol=1e-4, atol=1e-5)
        for chosen, found in updates:
            mine = [groups[i] for i in chosen]
            if not any(x.counts for group in mine for x in group):
                assert found == {}
                continue
            policy_loss, loss = reference.update(policy, mine, s, parameters, optimizer)
            learned += 1
            assert found["policy_loss"] == pytest.approx(policy_loss, rel=1e-4, abs=1e-6)
            assert found["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
        own = {"policy.model." + k: p for k, p in policy.named_parameters()}
        assert difference(after[0], {k: own[k] for k in after[0]}) < 1e-4
    assert ends == {True, False} and learned > 10


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "gmpo", "rloo"])
def test_ratios_start_at_one(tiny_model_dir, tmp_path, algorithm, lora):
    """With dropout in the config and in the adapters, at a temperature, packed in micro-batches."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attention_dropout=0.3)
    _, module = run(model, tmp_path, kind=Recorded, algorithm=algorithm, lora=lora, dropout=0.5,
                    tokenizer=tiny_model_dir, lr=3e-2, updates=dict(minibatches=1, micro_batch_tokens=60))  # fmt: skip
    for _, updates, *_ in module.iterations:
        first, second = (found for _, found in updates)
        assert first["ratio_error"] < 1e-5
        assert first["clip_fraction"] == 0
        assert abs(first["approx_kl"]) < 1e-9
        assert second["ratio_error"] > 1e-4  # by then the policy has moved


def test_without_kl_no_reference_is_loaded(tiny_model_dir, tmp_path):
    _, module = run(tiny_model_dir, tmp_path, max_steps=1)
    assert module.actors.reference is None and "train/kl" not in module.trainer.callback_metrics
    prompts = next(iter(module.trainer.datamodule.train_dataloader()))
    completions = module.sample_completions(prompts, 0, [0] * 4)
    assert module.score_completions(prompts, completions).keys() == {"score"}
    _, module = run(tiny_model_dir, tmp_path / "kl", max_steps=1, kl=dict(coef=0.1))
    assert module.actors.reference is not None and "train/kl" in module.trainer.callback_metrics
    assert module.score_completions(prompts, completions).keys() == {"score", "kl"}


# ------------------------------------------------------------------------------------------------- invariances


def gradient(model_dir, out_dir, **options):
    """The gradient of the first update."""
    return run(model_dir, out_dir, kind=Recorded, max_steps=1, **{"updates": ONE_UPDATE, **options})[1].gradient


@pytest.mark.parametrize("algorithm", ["dapo", "gspo", "dr_grpo", "reinforce++", Algorithm(mean="prompt")], ids=str)
def test_the_gradient_depends_neither_on_micro_batches_nor_on_order(tiny_model_dir, tmp_path, algorithm):
    """A group over the budget is cut between its completions."""
    options = dict(algorithm=algorithm, samples=5, loss=dict(entropy_coef=0.01), rows=run_grpo.prompts(4))
    _, module = run(tiny_model_dir, tmp_path / "a", kind=Recorded, max_steps=1, updates=ONE_UPDATE, **options)
    budget = module.trainer.datamodule.longest("train") + 15
    assert max(tree.num_tokens for tree in module.iterations[0][0].trees) > budget
    cut = gradient(tiny_model_dir, tmp_path / "b", **options, updates={**ONE_UPDATE, "micro_batch_tokens": budget})
    assert difference(cut, module.gradient) < 2e-6


def test_the_loss_of_uncertain_tokens_alone(tiny_model_dir, tmp_path):
    """Against a brute-force choice over the whole minibatch, of which a micro-batch has a part."""

    class Picked(Recorded):
        def _pick_tokens(self, experience, chosen):
            picked = super()._pick_tokens(experience, chosen)
            ends = torch.tensor([0, *(tree.num_scored for tree in experience.trees)]).cumsum(0).tolist()
            own = [token for i in chosen for token in range(ends[i], ends[i + 1])]
            entropies, counted = experience.entropies[own], experience.weight[own] > 0
            edge = np.quantile(entropies[counted].double().numpy(), 0.7)
            want = entropies.double() >= edge - 1e-7
            assert picked.factor[own].bool().equal(want) and 0.2 < want[counted].double().mean() < 0.4
            self.picks = getattr(self, "picks", 0) + 1
            return picked

    options = dict(algorithm="dapo", loss=dict(top_entropy=0.3), shaping=dict(mask_truncated=True))
    whole, parts = (
        run(tiny_model_dir, tmp_path / str(tokens), kind=Picked, max_steps=1, **options,
            updates={**ONE_UPDATE, "micro_batch_tokens": tokens})[1]
        for tokens in (None, 60)
    )  # fmt: skip
    assert difference(parts.gradient, whole.gradient) < 2e-6
    plain = gradient(tiny_model_dir, tmp_path / "c", **{**options, "loss": {}})
    assert difference(whole.gradient, plain) > 1e-2
    _, dealt = run(tiny_model_dir, tmp_path / "d", kind=Picked, max_steps=2, **options)
    assert (whole.picks, dealt.picks) == (1, 8)


def test_the_gradient_does_not_depend_on_the_order_of_rows(tiny_model_dir, tmp_path):
    class Reversed(Recorded):
        def run_rollout(self, prompts, iteration):
            return super().run_rollout(prompts.select(range(len(prompts.rows))[::-1]), iteration)

    for algorithm in ("dapo", "reinforce++"):
        whole = gradient(tiny_model_dir, tmp_path / f"a{algorithm}", algorithm=algorithm)
        _, other = run(tiny_model_dir, tmp_path / f"b{algorithm}", kind=Reversed, max_steps=1, algorithm=algorithm,
                       updates=ONE_UPDATE)  # fmt: skip
        assert difference(other.gradient, whole) < 2e-6


def flat_for(prompts, completions, wanted):
    """Prompts that want a vowel beyond i have one score for all."""
    return [7.5 if w in "ou" else s for w, s in zip(wanted, letters(prompts, completions, wanted), strict=True)]


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "dr_grpo", "reinforce++baseline", Algorithm(scale="batch")],
                         ids=str)  # fmt: skip
def test_flat_groups_beside_it_change_nothing_once_dropped(tiny_model_dir, tmp_path, algorithm):
    rows = run_grpo.prompts(5)
    options = dict(algorithm=algorithm, reward=flat_for, samples=4)
    alone = gradient(tiny_model_dir, tmp_path / "alone", rows=rows[:3], batch_size=3, **options)
    drop = dict(flat_groups="drop")
    beside = gradient(tiny_model_dir, tmp_path / "beside", rows=rows, batch_size=5, groups=drop, **options)
    assert difference(beside, alone) < 2e-6
    kept = gradient(tiny_model_dir, tmp_path / "kept", rows=rows, batch_size=5, **options)
    assert difference(kept, alone) > 1e-2
    assert logged(tmp_path / "beside", "flat_groups") == [pytest.approx(0.4)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [
        dict(
            algorithm="dapo",
            reward="has",
            batch_size=8,
            rows=run_grpo.prompts(12),
            max_steps=4,
            groups=dict(flat_groups="refill", spare=2, rounds=2, rest_after=1, rest_for=2, pass_score=0.0),
        ),
        dict(algorithm="reinforce++", lora=True, kl=dict(coef=0.1), batch_size=5),
    ],
    ids=["refill", "reinforce++, lora, odd batch"],
)
def test_two_processes_equal_one(tiny_model_dir, tmp_path, options):
    two = spawn(tiny_model_dir, tmp_path / "two", devices=2, lr=1e-3, **options)
    one = spawn(tiny_model_dir, tmp_path / "one", lr=1e-3, **options)
    assert difference(two, one) < 1e-5
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one"))
    assert a.keys() == b.keys()
    if "groups" in options:
        assert sum(logged(tmp_path / "one", "resting")) > 0
    for name in a.keys() - {"train/tokens_per_second", "train/first_ratio_error", "train/rollout_error"}:
        if "seconds" not in name:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


@pytest.mark.distributed
def test_a_rank_without_prompts_goes_along(tiny_model_dir, tmp_path):
    """Three prompts on one rank, none on the other."""
    options = dict(batch_size=3, max_steps=2, updates=ONE_UPDATE, lr=1e-4, loss=dict(top_entropy=0.5))
    two, one = (spawn(tiny_model_dir, tmp_path / str(n), devices=n, uneven=n == 2, **options) for n in (2, 1))
    assert difference(two, one) < 2e-6


# ------------------------------------------------------------------------------------------------- groups


def test_a_refill_samples_further_prompts_until_enough_groups_differ(tiny_model_dir, tmp_path):
    """Twelve prompts a batch, six wanted; the first prompts in the order that are not flat are learned from."""
    rows = [{"prompt": f"Say {i}", "wanted": "ou"[i % 2] if i % 3 else "a"} for i in range(12)]
    options = dict(rows=rows, batch_size=12, reward=flat_for, samples=3, kind=Recorded, max_steps=3, algorithm="dapo")
    refill = dict(flat_groups="refill", spare=3, rounds=2)
    _, module = run(tiny_model_dir, tmp_path / "refill", groups=refill, **options)
    rounds, left, flat = (logged(tmp_path / "refill", name) for name in ("rounds", "left_over", "flat_groups"))
    for (experience, *_), r in zip(module.iterations, rounds, strict=True):
        assert all(rows[row]["wanted"] == "a" for row in experience.rows)
        assert experience.scored.total.tolist() == experience.scores.tolist()
        assert len(experience.rows) == 4 and r == 2  # a third of the prompts is all there is
    assert left == [0, 0, 0] and flat == [pytest.approx(8 / 12)] * 3
    easy = dict(options, reward="letters")
    _, module = run(tiny_model_dir, tmp_path / "easy", groups=refill, **easy)
    assert logged(tmp_path / "easy", "rounds")[0] == 0 and logged(tmp_path / "easy", "left_over")[0] == 6
    assert len(module.iterations[0][0].rows) == 6


def test_scores_of_a_refill_are_those_of_its_completions(tiny_model_dir, tmp_path):
    reward = [WeightedReward(letters, 1.0, "letters"), WeightedReward(has, 0.5, "has")]
    _, module = run(tiny_model_dir, tmp_path, reward=reward, kind=Recorded, batch_size=8,
                    groups=dict(flat_groups="refill", spare=2), max_steps=1)  # fmt: skip
    experience = module.iterations[0][0]
    texts = [module.tokenizer.decode(b.input_ids) for tree in experience.trees for b in tree.branches]
    wanted = [run_grpo.prompts()[row]["wanted"] for row in experience.rows for _ in range(3)]
    parts = experience.scored.parts
    torch.testing.assert_close(experience.scores, parts["letters"] + 0.5 * parts["has"])
    for text, letter, found in zip(texts, wanted, parts["has"].tolist(), strict=True):
        assert found <= float(letter in text)  # the text that is scored lacks the stop string


def test_prompts_that_are_solved_rest(tiny_model_dir, tmp_path):
    """Eight prompts, four an iteration: one that is solved in two epochs in a row is left out of the next two."""

    def easy(prompts, completions, wanted):
        return [1.0 if w in "ae" else len(c) / 1000 for c, w in zip(completions, wanted, strict=True)]

    easy_rows = {i for i, row in enumerate(run_grpo.prompts(8)) if row["wanted"] in "ae"}
    options = dict(rows=run_grpo.prompts(8), reward=easy, kind=Recorded, max_steps=10, samples=2,
                   groups=dict(rest_after=2, rest_for=4))  # fmt: skip
    _, module = run(tiny_model_dir, tmp_path / "a", **options)
    sampled = [set(experience.rows) for experience, *_ in module.iterations]
    epochs = [a | b for a, b in zip(sampled[::2], sampled[1::2], strict=True)]
    every = set(range(8))
    assert epochs[0] == epochs[1] == every and epochs[4] >= every - easy_rows
    resting = [every - epoch for epoch in epochs]
    assert resting[2] == easy_rows
    assert logged(tmp_path / "a", "resting") == [4 - len(rows) for rows in sampled]
    with pytest.warns(UserWarning, match="groups.rest_for=1 is less than an epoch, which has 2 iterations"):
        run(tiny_model_dir, tmp_path / "b", **{**options, "max_steps": 1, "groups": dict(rest_after=1, rest_for=1)})


def test_validation_has_pass_at_k_and_the_mean_score(tiny_model_dir, tmp_path):
    trainer, module = run(tiny_model_dir, tmp_path, reward="has", val_fraction=0.5, max_steps=1)
    found = trainer.validate(module, trainer.datamodule, verbose=False)[0]
    records = [r for batch in trainer.predict(module, module.trainer.datamodule.val_dataloader()) for r in batch]
    by_row = {}
    for record in records:
        by_row.setdefault(record["row"], []).append(record["score"])
    assert len(by_row) > 5 and {len(scores) for scores in by_row.values()} == {3}
    assert found["val/pass@3"] == pytest.approx(sum(1.0 in s for s in by_row.values()) / len(by_row))
    assert found["val/score"] == pytest.approx(sum(r["score"] for r in records) / len(records))
    assert 0 < found["val/score"] < found["val/pass@3"] <= 1


def test_what_is_logged_of_updates_lengths_and_seconds(tiny_model_dir, tmp_path):
    def slow(prompts, completions, wanted):
        time.sleep(0.2)
        return letters(prompts, completions, wanted)

    _, module = run(tiny_model_dir, tmp_path, reward=slow, kind=Recorded, lr=3e-2, max_steps=1, batch_size=8,
                    updates=dict(epochs=3, minibatches=1))  # fmt: skip
    [(experience, updates, *_)] = module.iterations
    names = ("clip_fraction", "clip_fraction_low", "clip_fraction_high", "ratio_min", "ratio_mean", "ratio_max")
    fraction, low, high, *ratios = (logged(tmp_path, name)[0] for name in names)
    assert fraction == pytest.approx(low + high) and low > 0 and high > 0
    assert ratios == sorted(ratios) and 0 < ratios[0] < 0.8 and ratios[2] > 1.2
    assert ratios[0] == pytest.approx(min(found["ratio_min"] for _, found in updates))
    lengths = torch.tensor(experience.lengths).double()
    for name, own in (("stopped", ~experience.truncated), ("truncated", experience.truncated)):
        assert logged(tmp_path, f"length_{name}") == [pytest.approx(lengths[own].mean().item())]
    assert logged(tmp_path, "reward_seconds")[0] > 0.19 and logged(tmp_path, "scoring_seconds")[0] > 0


def test_what_is_counted_of_groups(tiny_model_dir, tmp_path):
    def by_row(prompts, completions, wanted):
        fixed = {"a": 1.0, "e": 0.0, "i": 0.5}
        return [fixed.get(w, float(len(c) % 2)) for c, w in zip(completions, wanted, strict=True)]

    run(tiny_model_dir, tmp_path, reward=by_row, rows=run_grpo.prompts(5), batch_size=5, samples=6, max_steps=1)
    assert logged(tmp_path, "flat_groups") == [pytest.approx(0.6)]
    assert logged(tmp_path, "solved") == [pytest.approx(0.2)] and logged(tmp_path, "failed") == [pytest.approx(0.4)]


# ------------------------------------------------------------------------------------------------- resume

RESUMED = {
    "dapo": dict(
        algorithm="dapo",
        reward="has",
        batch_size=6,
        rows=run_grpo.prompts(12),
        groups=dict(flat_groups="refill", spare=1, rounds=2, rest_after=1, rest_for=3, pass_score=0.0),
    ),
    "reinforce++": dict(algorithm="reinforce++", lora=True, dropout=0.2, kl=dict(coef=0.1, target=0.01, horizon=50)),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_model_dir, tmp_path, name):
    options = RESUMED[name]
    trainer, whole = run(tiny_model_dir, tmp_path / "whole", max_steps=6, save_every=1, **options)
    for step in (1, 4):
        again, module = run(tiny_model_dir, tmp_path / f"from{step}", max_steps=6, seed=7,
                            ckpt=tmp_path / "whole" / f"step{step}.ckpt", **options)  # fmt: skip
        assert again.global_step == 6 and module.iteration == 6
        assert_equal(trained(module), trained(whole))
        for key, value in trainer.callback_metrics.items():
            if "second" not in key:
                assert torch.equal(again.callback_metrics[key], value), key


def test_a_resumed_run_has_the_kl_coefficient_of_its_own_settings(tiny_model_dir, tmp_path):
    run(tiny_model_dir, tmp_path / "first", max_steps=1, save_every=1, kl=dict(coef=0.0))
    trainer, module = run(tiny_model_dir, tmp_path / "again", max_steps=2, kl=dict(coef=0.5),
                          ckpt=tmp_path / "first" / "step1.ckpt")  # fmt: skip
    assert module.kl_coef == 0.5 and trainer.callback_metrics["train/kl_coef"] == 0.5


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_killed_at_random_moments_it_ends_the_same(tiny_model_dir, tmp_path, kills):
    """kill -9, with a refill, a sorted plan and prompts that rest."""
    groups = dict(flat_groups="refill", spare=1, rounds=2, rest_after=1, rest_for=3, pass_score=0.0)
    rows = [{**row, "level": i % 3} for i, row in enumerate(run_grpo.prompts(12))]  # ties cross batches
    options = dict(max_steps=2 * kills + 5, save_every=1, algorithm="dapo", reward="has", batch_size=6, samples=2)
    options |= dict(groups=groups, rows=rows, data=dict(order_by="level"))
    whole = spawn(tiny_model_dir, tmp_path / "whole", **options)
    killed = spawn_killed("run_grpo", tiny_model_dir, tmp_path / "killed", kills, **options)
    assert_same_steps(tmp_path / "killed", tmp_path / "whole")  # tells where they part
    assert_equal(killed, whole)


# ------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(algorithm="grppo"), "algorithm 'grppo' is unknown; did you mean grpo?"),
        (dict(algorithm=None), "algorithm is None: give a name (grpo, "),
        (dict(rollout=Rollout(1)), "rollout.samples_per_prompt is 1: set it to 2 or more, or choose algorithm reinf"),
        (dict(algorithm="reinforce++", groups=Groups("drop")), "flat_groups drop is for algorithms that compare"),
        (dict(shaping=Shaping(whiten=True)), "shaping.whiten is for a critic"),
        (dict(algorithm="gdpo"), "give reward as a list, or choose grpo"),
        (dict(loss=KL()), "loss is KL"),
        (dict(shaping=Shaping(overlong_cache=200)), "counts back from rollout.sampling.max_new_tokens=128"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(tiny_model_dir, options, message):
    with pytest.raises(ValueError) as error:
        GRPOModule(tiny_model_dir, has, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_groups_of_settings_check_themselves():
    with pytest.raises(ValueError, match="refill samples so many further prompts"):
        Groups("refill")
    with pytest.raises(ValueError, match=r"groups\.spare is 2 with flat_groups keep"):
        Groups(spare=2)
    with pytest.raises(ValueError, match=r"set it to recompute, or correction to none"):
        GroupLoss(correction="token_mask", old_logprobs="rollout")
    with pytest.raises(ValueError, match=r"shaping\.overlong_cache must be at least 1"):
        Shaping(overlong_cache=0)
    with pytest.raises(ValueError, match="greedy completions teach nothing"):
        Rollout(2, Sampling(temperature=0.0))


def test_what_is_over_the_context_is_refused_or_counted(tiny_model_dir, tmp_path):
    rows = [{"prompt": "Say fox dog " * n} for n in (1, 2, 90)]

    def fit(new=16, **options):
        module = GRPOModule(tiny_model_dir, shortness, rollout=Rollout(2, Sampling(max_new_tokens=new)))
        data = PromptDataModule(rows, batch_size=2, val_fraction=0.0, cache_dir=tmp_path / "cache", **options)
        quiet(tmp_path, max_steps=1).fit(module, data)
        return data

    with pytest.raises(
        ValueError, match=r"^sampling.max_new_tokens=300 leaves no room .* 256 tokens\. Set it to at most"
    ):
        fit(new=300)
    with pytest.raises(DataError, match=r"^list\[2\]: the prompt's 731 tokens are over the 240 that") as error:
        fit()
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=r"1 .*too long"):
        assert sum(bad.total for bad in fit(on_bad_row="skip").bad_rows["train"]) == 1


def test_a_refill_of_a_whole_batch_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"holds back 4 prompts of a batch of 4, so none is left"):
        run(tiny_model_dir, tmp_path, groups=dict(flat_groups="refill", spare=2, rounds=2))


def constant(prompts, completions):
    return [0.25] * len(completions)


@pytest.mark.parametrize("flat_groups", ["keep", "drop"])
def test_a_reward_that_says_nothing_ends_the_run_and_is_named(tiny_model_dir, tmp_path, flat_groups):
    with pytest.raises(ValueError, match=r"last 3 iterations are flat.*: constant is 0\.25 for all\. Look at"):
        run(tiny_model_dir, tmp_path, reward=[WeightedReward(constant)], max_steps=5,
            groups=dict(flat_groups=flat_groups, max_flat=3))  # fmt: skip
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    groups = dict(flat_groups=flat_groups, max_flat=None)
    trainer, module = run(tiny_model_dir, tmp_path / "on", reward=constant, max_steps=7, groups=groups)
    assert trainer.global_step == 7 and module.skipped == 0
    if flat_groups == "drop":  # no update at all, weight decay neither
        assert_equal(dict(module.policy.model.named_parameters()), dict(start.named_parameters()))


def test_a_run_that_ends_says_if_the_limit_cut_every_completion(tiny_model_dir, tmp_path):
    for longest, cut in ((1, True), (40, False)):
        sampling = dict(max_new_tokens=longest)
        with pytest.raises(ValueError, match="are flat") as told:
            run(tiny_model_dir, tmp_path / str(longest), reward=constant, sampling=sampling, groups=dict(max_flat=1))
        assert ("The length limit cut all completions of the last one." in str(told.value)) == cut


def test_a_reward_that_never_applies_ends_the_run_and_says_so(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"last 2 iterations are flat.*: no completion had a score, because the"):
        run(tiny_model_dir, tmp_path, reward=lambda prompts, completions: [None] * len(completions), max_steps=5,
            groups=dict(max_flat=2))  # fmt: skip


def shortness(prompts, completions):
    return [-len(c) / 10 for c in completions]


def test_completions_to_which_no_reward_applies_teach_nothing(tiny_model_dir, tmp_path):
    """They are counted, and their group is compared without them."""

    def some(prompts, completions, wanted):
        scores = letters(prompts, completions, wanted)
        return [None if len(c) % 3 == 0 else s for c, s in zip(completions, scores, strict=True)]

    _, module = run(tiny_model_dir, tmp_path, reward=some, kind=Recorded, max_steps=1, samples=6)
    experience = module.iterations[0][0]
    absent = experience.scores.isnan()
    assert 0 < absent.sum() < len(absent) and logged(tmp_path, "dropped_samples") == [absent.sum()]
    first = experience.sum_by_sequence(experience.advantages) / torch.tensor(experience.lengths)
    assert first[absent].eq(0).all() and experience.sum_by_sequence(experience.weight)[absent].eq(0).all()
    scores, own = experience.scores[experience.group == 0], first[experience.group == 0]
    known = scores.isfinite()
    want = (scores[known] - scores[known].mean()) / (scores[known].std() + 1e-4)
    torch.testing.assert_close(own[known], want, rtol=1e-4, atol=1e-5)


def test_gdpo_normalizes_each_reward(tiny_model_dir, tmp_path):
    """A reward a thousand times as large has no more influence than the other."""

    def large(prompts, completions):
        return [1000 * s for s in shortness(prompts, completions)]

    for algorithm in ("gdpo", "grpo"):
        found = [
            gradient(tiny_model_dir, tmp_path / f"{algorithm}{i}", algorithm=algorithm,
                     reward=[WeightedReward(r), WeightedReward(letters)])
            for i, r in enumerate((shortness, large))
        ]  # fmt: skip
        assert (difference(*found) < 1e-2) == (algorithm == "gdpo")


def test_corrections_for_another_engine(tiny_model_dir, tmp_path):
    """The engine here agrees, so that weights are 1, unless the bound is far below."""
    plain = gradient(tiny_model_dir, tmp_path / "a")
    near = gradient(tiny_model_dir, tmp_path / "b", loss=dict(correction="token_truncate"))
    assert difference(near, plain) < 1e-4
    weights = [logged(tmp_path / "b", f"importance_weight_{name}")[0] for name in ("min", "mean", "max")]
    assert weights == sorted(weights) and weights == pytest.approx([1, 1, 1], abs=1e-4)
    half = gradient(tiny_model_dir, tmp_path / "c", loss=dict(correction="sequence_truncate", correction_max=0.5))
    assert difference({k: 2 * g for k, g in half.items()}, plain) < 1e-4
    far = gradient(tiny_model_dir, tmp_path / "d", loss=dict(off_policy_threshold=5.0))
    assert difference(far, plain) < 1e-6


def test_lora_trains_adapters_only(tiny_model_dir, tmp_path):
    _, module = run(tiny_model_dir, tmp_path, lora=True, max_steps=1, kl=dict(coef=0.1))
    assert all("lora" in name for name in trained(module))
