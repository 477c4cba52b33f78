"""Online DPO: against brute force in fp64, invariance to every split, exact resume, what is counted and refused."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import assert_equal, difference, load_script, quiet, spawn
from transformers import AutoModelForCausalLM

from lightning_rlhf import (
    DataPairs,
    OnlineDPOModule,
    OnlinePairShaping,
    PairShaping,
    PromptDataModule,
    Rollout,
    Sampling,
    Updates,
    WeightedLoss,
)

SCRIPT = Path(__file__).with_name("run_online_dpo.py")
script = load_script(SCRIPT)
run, trained, letters = script.run, script.trained, script.letters
spawn = partial(spawn, SCRIPT)
LOSSES = [
    {"name": "sigmoid", "weight": 0.8, "settings": {"label_smoothing": 0.1}},
    {"name": "sft", "weight": 0.2},
]


# ------------------------------------------------------------------------------------------------- the definition


def logprobs(model, tree, temperature):
    """The summed log-prob and the length of each completion; all of them padded on the right."""
    rows = [[*tree.prompt, *branch.input_ids] for branch in tree.branches]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    found = (model(input_ids=ids, attention_mask=mask).logits / temperature).log_softmax(-1)
    tokens = found[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    start = len(tree.prompt) - 1
    return [tokens[i, start : len(row) - 1].sum() for i, row in enumerate(rows)], [len(r) - start - 1 for r in rows]


def combined(c, r, cp, _rp, cn, _rn):
    x = 0.3 * (c - r)
    return 0.8 * (-0.9 * F.logsigmoid(x) - 0.1 * F.logsigmoid(-x)) - 0.2 * cp / cn


FORMULAS = {
    "sigmoid": (dict(beta=0.3), lambda c, r, *_: -F.logsigmoid(0.3 * (c - r))),
    "simpo": (dict(loss="simpo"), lambda _c, _r, cp, rp, cn, rn: -F.logsigmoid(2 * (cp / cn - rp / rn) - 1)),
    "sum": (dict(loss=[WeightedLoss(**one) for one in LOSSES], beta=0.3), combined),
}


def by_hand(path, trees, weights, formula, temperature, share=1.0):
    """The gradient of the mean loss over the pairs of trees, of the weights as they were, in fp64."""
    policy, start = (
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float64) for _ in range(2)
    )
    policy.load_state_dict({k.removeprefix("model."): v.double() for k, v in weights.items()}, strict=False)
    count, total = sum(len(tree.pairs) for tree in trees), 0.0
    for tree in trees:
        own, sizes = logprobs(policy, tree, temperature)
        with torch.no_grad():
            base, _ = logprobs(start, tree, temperature)
        for pair in tree.pairs:
            (c, cn), (r, rn) = ((own[i], sizes[i]) for i in (pair.better, pair.worse))
            loss = formula(c - base[pair.better], r - base[pair.worse], c, r, cn, rn)
            total += share * loss / count
    total.backward()
    return {f"model.{k}": p.grad for k, p in policy.named_parameters() if p.grad is not None}, total.item()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sigmoid", dict()),
        ("sigmoid", dict(samples=4, pairs="all", margin=0.15, micro_batch_tokens=60, temperature=0.7)),
        ("sigmoid", dict(samples=4, layout="padded", micro_batch_tokens=None)),
        ("simpo", dict(samples=3, pairs="all")),
        ("sum", dict(samples=3, temperature=0.7)),
    ],
    ids=str,
)
def test_the_gradient_is_that_of_the_same_pairs_by_brute_force(name, options, tiny_model_dir, tmp_path):
    """2e-6 relative to a padded model in fp64, in the second iteration, where policy and reference differ."""
    settings, formula = FORMULAS[name]
    _, module = run(tiny_model_dir, tmp_path, **settings, **options)
    experience, chosen, _, weights, found = module.updates_seen[-1]
    trees = [experience.trees[i] for i in chosen]
    assert len(module.updates_seen) == 2 and sum(len(tree.pairs) for tree in trees) >= 2
    want, loss = by_hand(tiny_model_dir, trees, weights, formula, options.get("temperature", 1.0))
    assert difference(module.gradients, want) < 2e-6
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert hasattr(module, "reference") == (name != "simpo")


def test_pairs_of_the_data_have_their_share(tiny_model_dir, tmp_path):
    settings, formula = FORMULAS["sigmoid"]
    _, module = run(tiny_model_dir, tmp_path, data_pairs=True, mixture=0.25, **settings)
    experience, chosen, beside, weights, found = module.updates_seen[-1]
    parts = [
        by_hand(tiny_model_dir, trees, weights, formula, 1.0, share)
        for trees, share in (([experience.trees[i] for i in chosen], 0.75), (beside.trees, 0.25))
    ]
    want = {k: parts[0][0][k] + parts[1][0][k] for k in parts[0][0]}
    assert len(beside.trees) == 2
    assert difference(module.gradients, want) < 2e-6
    assert found["loss"] == pytest.approx(parts[0][1] + parts[1][1], rel=1e-5)
    assert found["data_loss"] == pytest.approx(4 * parts[1][1], rel=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(lora=True), dict(layout="padded", samples=3, pairs="all")], ids=str)
def test_at_the_start_nothing_is_preferred(options, tiny_model_dir, tmp_path):
    trainer, _ = run(tiny_model_dir, tmp_path, max_steps=1, **options)
    found = {k: v.item() for k, v in trainer.callback_metrics.items()}
    assert found["train/loss"] == torch.tensor(2.0).double().log().float().item()
    assert found["train/accuracy"] == 0.5
    for name in ("margin", "chosen_reward", "rejected_reward", "kl"):
        assert found[f"train/{name}"] == 0.0
    assert abs(found["train/approx_kl"]) < 1e-6  # between the engine's log-probs and the packed ones


# ------------------------------------------------------------------------------------------------- invariances

SPLITS = dict(samples=5, pairs="all", minibatches=1, lr=1e-3, data_pairs=True, mixture=0.3)


def test_the_result_does_not_depend_on_the_split(tiny_model_dir, tmp_path):
    """At 50 tokens trees are cut, so that a completion is computed several times; prompts come in any order."""
    _, whole = run(tiny_model_dir, tmp_path / "whole", micro_batch_tokens=None, **SPLITS)
    assert max(tree.num_tokens for tree in whole.updates_seen[-1][0].trees) > 50
    for name, options in {"cut": dict(micro_batch_tokens=50), "order": dict(order=3), "lot": dict(order=5)}.items():
        _, other = run(tiny_model_dir, tmp_path / name, **{"micro_batch_tokens": None, **SPLITS, **options})
        for (*_, a), (*_, b) in zip(whole.updates_seen, other.updates_seen, strict=True):
            assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
        assert difference(other.gradients, whole.gradients) < 5e-6


@pytest.mark.distributed
@pytest.mark.parametrize("options", [dict(epochs=2, minibatches=2), dict(rows=3, batch_size=3)], ids=str)
def test_two_processes_train_as_one(options, tiny_model_dir, tmp_path):
    """Also with fewer prompts than ranks can share alike."""
    options = {**SPLITS, "max_steps": 2, **options}
    two = spawn(tiny_model_dir, tmp_path / "two", devices=2, **options)
    _, one = run(tiny_model_dir, tmp_path / "one", **options)
    assert difference(two, trained(one)) < 1e-5
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert a.keys() == b.keys() and a["train/pairs"] > 2
    for name in a:
        if "second" not in name:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name


@pytest.mark.distributed
def test_a_rank_without_prompts_goes_along(tiny_model_dir, tmp_path):
    options = {**SPLITS, "batch_size": 1, "max_steps": 2}
    two = spawn(tiny_model_dir, tmp_path / "two", devices=2, **options)
    _, one = run(tiny_model_dir, tmp_path / "one", **options)
    assert difference(two, trained(one)) < 1e-5


# ------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "options",
    [dict(loss="bco", data_pairs=True, mixture=0.5), dict(lora=True, samples=3, pairs="all", batch_size=6)],
    ids=["bco, mixture", "lora, all"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(options, tiny_model_dir, tmp_path):
    options = dict(options, max_steps=6, epochs=2)
    trainer, whole = run(tiny_model_dir, tmp_path / "a", save_every=1, **options)
    for step in (1, 3):
        ckpt = tmp_path / "a" / f"step{step}.ckpt"
        again, module = run(tiny_model_dir, tmp_path / f"b{step}", ckpt=ckpt, seed=7, **options)
        assert_equal(dict(module.named_parameters()), dict(whole.named_parameters()))  # and the reference
        assert module._delta == whole._delta != 0.0
        for key, value in trainer.callback_metrics.items():
            if "second" not in key:
                assert torch.equal(again.callback_metrics[key], value), key


def test_a_checkpoint_loads_by_itself(tiny_model_dir, tmp_path):
    run(tiny_model_dir, tmp_path, max_steps=1, save_every=1, margin=0.2, shaping=dict(ld_alpha=0.5), mixture=0.0)
    again = OnlineDPOModule.load_from_checkpoint(
        tmp_path / "step1.ckpt",
        reward=letters,
        optimizer=torch.optim.AdamW,
        lr_scheduler=torch.optim.lr_scheduler.StepLR,
    )
    assert again.margin == 0.2 and again.pair_shaping == OnlinePairShaping(ld_alpha=0.5)
    assert again.rollout.samples_per_prompt == 2 and again.iteration == 1
    saved = torch.load(tmp_path / "step1.ckpt", weights_only=True)
    assert not [k for k in saved["state_dict"] if k.startswith("reference")]
    assert saved["online_dpo"]["iterations"] == saved["rl"]["iteration"] == 1


# ------------------------------------------------------------------------------------------------- what is counted


def same_pairs(scores):
    """A reward that gives these scores to the completions of each prompt."""
    return lambda prompts, completions: list(scores) * (len(completions) // len(scores))


@pytest.mark.parametrize(
    ("scores", "options", "want"),
    [
        ([1.0, 1.0], dict(), dict(pairs=0, ties=4, flat_groups=4, without_pairs=1, updates=0)),
        ([1.0, 3.0], dict(margin=2.0), dict(pairs=0, ties=4, flat_groups=4, without_pairs=1, updates=0)),
        ([1.0, 3.0], dict(margin=1.9), dict(pairs=4, ties=0, flat_groups=0, without_pairs=0, updates=1)),
        ([1.0, 3.0, 3.0], dict(pairs="all"), dict(pairs=8, ties=4, flat_groups=0, without_pairs=0, updates=1)),
        ([1.0, math.nan, 2.0], dict(shaping=dict(bad_scores="drop")),
         dict(pairs=4, ties=0, flat_groups=0, dropped_samples=4)),
        ([1.0, math.nan], dict(shaping=dict(bad_scores="drop")), dict(pairs=0, ties=0, flat_groups=4, updates=0)),
    ],
    ids=str,
)  # fmt: skip
def test_ties_and_flat_groups_are_dropped_and_counted(scores, options, want, tiny_model_dir, tmp_path):
    trainer, module = run(tiny_model_dir, tmp_path, max_steps=1, samples=len(scores), reward=same_pairs(scores),
                          **options)  # fmt: skip
    found = {name: trainer.callback_metrics[f"train/{name}"].item() for name in want}
    assert found == want
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    moved = not torch.equal(module.policy.model.lm_head.weight, start.lm_head.weight)
    assert moved == bool(want["pairs"])


def test_iterations_without_a_pair_are_told_once_and_end_the_run(tiny_model_dir, tmp_path):
    options = dict(max_steps=7, reward="even", data_pairs=True, mixture=0.5)
    with pytest.raises(ValueError, match=r"last 3 iterations are flat.*: the score is .* for all\. .*"
                       r"set shaping\.max_flat: null"):  # fmt: skip
        run(tiny_model_dir, tmp_path / "ends", **options, shaping=dict(max_flat=3))
    with pytest.warns(UserWarning) as told:
        trainer, module = run(tiny_model_dir, tmp_path, **options, shaping=dict(max_flat=None))
    assert sum("takes no update: no prompt" in str(each.message) for each in told) == 1
    assert trainer.global_step == module.iteration == module.without_pairs == 7 and not module.skipped


def test_a_judge_that_always_says_a_gives_no_pair(tiny_model_dir, tmp_path):
    trainer, _ = run(tiny_model_dir, tmp_path, max_steps=1, judge="first", samples=3, pairs="all")
    found = trainer.callback_metrics
    assert found["train/pairs"] == 0 and found["train/ties"] == 12 and found["train/flat_groups"] == 4


def test_a_judge_ranks_completions(tiny_model_dir, tmp_path, tiny_tokenizer):
    trainer, module = run(tiny_model_dir, tmp_path, max_steps=1, judge="longest", samples=3, val_fraction=0.2)
    experience, *_ = module.updates_seen[0]
    for tree in experience.trees:
        better, worse = (
            len(tiny_tokenizer.decode(tree.branches[i].input_ids, skip_special_tokens=True))
            for i in (tree.pairs[0].better, tree.pairs[0].worse)
        )
        assert better > worse
    found = quiet(tmp_path).validate(module, trainer.datamodule, verbose=False)[0]
    assert "val/length" in found and "val/score" not in found  # the mean share of a prompt's completions is a half
    records = [r for batch in quiet(tmp_path).predict(module, trainer.datamodule) for r in batch]
    assert {r["score"] for r in records} <= {0.0, 0.25, 0.5, 0.75, 1.0}


def test_cut_completions_are_ranked_lower(tiny_model_dir, tmp_path):
    """By so much that any whole one wins."""
    for penalty in (0.0, 100.0):
        _, module = run(tiny_model_dir, tmp_path / f"{penalty}", max_steps=1, samples=4, batch_size=8,
                        shaping=dict(missing_eos_penalty=penalty))  # fmt: skip
        experience, *_ = module.updates_seen[0]
        cut = [len(tree.branches[tree.pairs[0].better].input_ids) == 10 for tree in experience.trees]
        worse = [len(tree.branches[tree.pairs[0].worse].input_ids) < 10 for tree in experience.trees]
        mixed = [c and w for c, w in zip(cut, worse, strict=True)]
        assert any(mixed) == (penalty == 0.0)


def test_a_bad_score_ends_the_run(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"not a finite number.* set model\.shaping\.bad_scores to drop"):
        run(tiny_model_dir, tmp_path, max_steps=1, reward=same_pairs([1.0, math.inf]))


def test_target_kl_ends_an_iteration(tiny_model_dir, tmp_path):
    trainer, _ = run(tiny_model_dir, tmp_path, max_steps=1, epochs=4, target_kl=1e-3, lr=3e-2)
    assert trainer.callback_metrics["train/updates"] == 1


# ------------------------------------------------------------------------------------------ validation and predict


def test_validation_and_predictions_are_those_of_ppo(tiny_model_dir, tmp_path):
    trainer, module = run(tiny_model_dir, tmp_path, max_steps=1, val_fraction=0.25)
    found = quiet(tmp_path).validate(module, trainer.datamodule, verbose=False)[0]
    records = [r for batch in quiet(tmp_path).predict(module, trainer.datamodule) for r in batch]
    assert found["val/score"] == pytest.approx(sum(r["score"] for r in records) / len(records), rel=1e-5)
    assert all(r.keys() == {"row", "completion", "score", "truncated"} for r in records)
    assert len(records) == 2 * len({r["row"] for r in records})
    assert found == quiet(tmp_path).validate(module, trainer.datamodule, verbose=False)[0]


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(reward=None), "There is neither reward nor judge: give one of them"),
        (dict(judge=script.Longest()), "There is both reward and judge: give one of them"),
        (dict(reward=None, judge="gpt"), "judge is a str: give a Judge, such as ChatJudge(base_url, model)."),
        (dict(rollout=Rollout()), "rollout.samples_per_prompt is 1, and a pair needs two completions"),
        (dict(margin=-0.1), "margin must be at least 0, got -0.1"),
        (dict(margin=math.nan), "margin must be at least 0"),
        (dict(mixture=1.0), "mixture must be at least 0 and below 1"),
        (dict(pairs="best"), "pairs is 'best'. Choose one of: best_worst, all"),
        (dict(beta=0.0), "beta must be above 0"),
        (dict(loss="orpo", beta=0.1), "the loss orpo has no beta"),
        (dict(loss="sigmod"), "There is no loss 'sigmod'; did you mean sigmoid?"),
        (dict(loss="ipo", shaping=OnlinePairShaping(length_alpha=0.1)), "length_alpha is set, but the loss has no"),
        (dict(shaping=PairShaping()), "give an OnlinePairShaping(...)"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(settings, words, tiny_model_dir):
    with pytest.raises(ValueError) as error:
        OnlineDPOModule(tiny_model_dir, **{"reward": letters, **settings})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_greedy_sampling_is_refused():
    with pytest.raises(ValueError, match="temperature must be above 0: greedy completions teach nothing"):
        Rollout(2, Sampling(temperature=0.0))
    with pytest.raises(ValueError, match=r"shaping\.missing_eos_penalty must be at least 0"):
        OnlinePairShaping(missing_eos_penalty=-1.0)
    with pytest.raises(ValueError, match=r"shaping\.max_flat must be at least 1, got 0"):
        OnlinePairShaping(max_flat=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(mixture=0.5), r"mixture=0\.5 weighs a loss on pairs, and the data have none\. Give data\.pairs\.source"),
        (dict(micro_batch_tokens=40), r"and two completions of .*=10 have 46, over .*=40, and a pair"),
    ],
    ids=str,
)
def test_what_would_end_a_run_in_its_middle_is_named_before(settings, words, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(tiny_model_dir, tmp_path, **settings)


def test_pairs_that_nothing_learns_from_are_named(tiny_model_dir, tmp_path):
    with pytest.warns(UserWarning, match=r"data\.pairs is read and not learned from: model\.mixture is 0"):
        run(tiny_model_dir, tmp_path, max_steps=1, data_pairs=True)


def test_the_settings_are_as_many_as_a_reader_can_hold(tiny_model_dir):
    import inspect

    assert len(inspect.signature(OnlineDPOModule.__init__).parameters) - 1 <= 20
    module = OnlineDPOModule(tiny_model_dir, letters, updates=Updates(epochs=1))
    assert copy.copy(module.rollout).samples_per_prompt == 2
    assert PromptDataModule(pairs=DataPairs()).beside == {}
