"""GRPO with an environment: against a plain padded reference, its invariances, resume, and what people see."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import assert_equal, difference, load_script, spawn, spawn_killed
from transformers import AutoModelForCausalLM

from lightning_rlhf import GRPOModule, SampleCompletions
from lightning_rlhf.data import Branch, Tree, pack
from lightning_rlhf.models import Policy
from lightning_rlhf.rewards import WeightedReward
from lightning_rlhf.rollout import Environment, Turn, TurnError

HERE = Path(__file__).parent
reference, run_grpo = (load_script(HERE / f"{name}.py") for name in ("reference_grpo", "run_grpo"))
letters, trained = run_grpo.letters, run_grpo.trained
Recorded = run_grpo.Recorded
TURNS = dict(environment=dict(most=3), max_total_tokens=70, updates=dict(micro_batch_tokens=150))
run = partial(run_grpo.run, **TURNS)
ONE_UPDATE = dict(epochs=1, minibatches=1, micro_batch_tokens=None)


# ------------------------------------------------------------------------------------------------- the definition

VARIANTS = {
    "grpo": (dict(loss=dict(entropy_coef=0.05), kl=dict(coef=0.2, where="loss")), dict(entropy_coef=0.05, kl_coef=0.2)),
    "dapo": (dict(algorithm="dapo", shaping=dict(missing_eos_penalty=0.5)), dict(mean="token", high=0.28, penalty=0.5)),
    "rloo": (
        dict(algorithm="rloo", kl=dict(coef=0.3), shaping=dict(mask_truncated=True)),
        dict(baseline="leave_one_out", std=False, ratio="none", mean="constant", kl_coef=0.3, kl_where="reward",
             mask=True),
    ),
    "reinforce++": (
        dict(algorithm="reinforce++", kl=dict(coef=0.3)),
        dict(baseline="none", whiten=True, mean="token", kl_coef=0.3, kl_where="reward"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_iterations_equal_a_plain_padded_reference_with_masks(tiny_model_dir, tmp_path, variant):
    options, settings = VARIANTS[variant]
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir).double()
    policy, frozen = copy.deepcopy(start), copy.deepcopy(start)
    _, module = run(copy.deepcopy(start), tmp_path, kind=Recorded, max_steps=3, samples=4, tokenizer=tiny_model_dir,
                    lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0), **options)  # fmt: skip
    s = reference.Settings(temperature=0.7, longest=10, **settings)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() > 1]}, {"params": [p for p in parameters if p.dim() <= 1],
                                                            "weight_decay": 0.0}], lr=3e-3, eps=1e-5)  # fmt: skip
    said = 0
    for experience, updates, after, samples in module.iterations:
        want = [letter + more for letter, more in zip(letters(samples.prompts, samples.completions,
                samples.columns["wanted"]), samples.environment, strict=True)]  # fmt: skip
        assert experience.scores.tolist() == pytest.approx(want, rel=1e-5)
        rows = zip(experience.scores.tolist(), experience.truncated.tolist(), strict=True)
        groups = [[reference.Sample(t.prompt, b.input_ids, *next(rows), sampled=b.scored) for b in t.branches]
                  for t in experience.trees]  # fmt: skip
        said += sum(b.scored is not None for t in experience.trees for b in t.branches)
        reference.judge(policy, frozen, groups, s)
        want = torch.cat([x.advantages for group in groups for x in group])
        torch.testing.assert_close(experience.advantages.double(), want.double(), rtol=1e-4, atol=1e-5)
        old = torch.cat([x.old for group in groups for x in group])
        torch.testing.assert_close(experience.old_logprobs.double(), old, rtol=0, atol=1e-5)
        torch.testing.assert_close(experience.rollout_logprobs.double(), old, rtol=0, atol=1e-4)
        for chosen, found in updates:
            mine = [groups[i] for i in chosen]
            if not any(x.counts for group in mine for x in group):
                assert found == {}
                continue
            policy_loss, loss = reference.update(policy, mine, s, parameters, optimizer)
            assert found["policy_loss"] == pytest.approx(policy_loss, rel=1e-4, abs=1e-6)
            assert found["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
        own = {"policy.model." + k: p for k, p in policy.named_parameters()}
        assert difference(after[0], {k: own[k] for k in after[0]}) < 1e-4
    assert said > 10


def test_lengths_and_entropies_are_those_of_the_policys_tokens(tiny_model_dir, tmp_path):
    trainer, module = run(tiny_model_dir, tmp_path, kind=Recorded, max_steps=1, kl=dict(coef=0.1))
    [(experience, *_)] = module.iterations
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir).double()
    samples = [reference.Sample(t.prompt, b.input_ids, 0.0, False, b.scored) for t in experience.trees
               for b in t.branches]  # fmt: skip
    with torch.no_grad():
        found = reference.token_scores(policy, samples, 0.7)
    lengths = torch.tensor([float(len(logp)) for logp, _ in found])
    logged = {name.removeprefix("train/"): value.item() for name, value in trainer.callback_metrics.items()}
    assert logged["length_mean"] == pytest.approx(lengths.mean().item())
    assert logged["length_max"] == lengths.max() and logged["length_min"] == lengths.min()
    assert logged["entropy"] == pytest.approx(torch.cat([e for _, e in found]).mean().item(), rel=1e-4)
    assert logged["kl"] == pytest.approx(0, abs=1e-5) and logged["rollout_error"] < 1e-4
    turns = [1 if s.sampled is None else 1 + sum(a < b for a, b in zip(s.sampled, s.sampled[1:], strict=False))
             for s in samples]  # fmt: skip
    assert logged["turns"] == pytest.approx(sum(turns) / len(turns)) and max(turns) == 3
    assert logged["score"] == pytest.approx(logged["score/letters"] + logged["score/environment"], rel=1e-5)


def test_tokens_of_an_environment_change_only_what_follows_them(tiny_model_dir):
    policy = Policy(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    first, said, last = [7, 9, 11], [30, 31], [12, 13]
    sampled = [True] * 3 + [False] * 2 + [True] * 2

    def scores(said):
        batch = pack([Tree([5, 6], [Branch([*first, *said, *last], sampled), Branch([8, 9])])])
        assert batch.target.tolist() == [*first, *last, 8, 9] and batch.num_scored == 7
        return policy(batch, entropy=True)[:2]

    logprobs, entropies = scores(said)
    other = scores([40, 41])
    same = [0, 1, 2, 5, 6]
    torch.testing.assert_close(logprobs[same], other[0][same])
    torch.testing.assert_close(entropies[same], other[1][same])
    assert (logprobs[3:5] - other[0][3:5]).abs().min() > 1e-4


# ------------------------------------------------------------------------------------------------- invariances


def gradient(model_dir, out_dir, kind=Recorded, **options):
    """The gradient of the first update."""
    return run(model_dir, out_dir, kind=kind, max_steps=1, samples=5, **{"updates": ONE_UPDATE, **options})[1].gradient


class Reversed(Recorded):
    def run_rollout(self, prompts, iteration):
        return super().run_rollout(prompts.select(range(len(prompts.rows))[::-1]), iteration)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "reinforce++"])
def test_the_gradient_depends_neither_on_micro_batches_nor_on_order(tiny_model_dir, tmp_path, algorithm):
    """A group is far over the budget and is cut between its completions."""
    whole = gradient(tiny_model_dir, tmp_path / "a", algorithm=algorithm)
    cut = gradient(
        tiny_model_dir, tmp_path / "b", algorithm=algorithm, updates={**ONE_UPDATE, "micro_batch_tokens": 130}
    )
    assert difference(cut, whole) < 2e-6
    assert difference(gradient(tiny_model_dir, tmp_path / "c", Reversed, algorithm=algorithm), whole) < 2e-6


@pytest.mark.distributed
def test_two_processes_equal_one(tiny_model_dir, tmp_path):
    options = dict(TURNS, algorithm="dapo", lr=1e-3, batch_size=5, groups=dict(flat_groups="refill", spare=1, rounds=1))
    two, one = (spawn(HERE / "run_grpo.py", tiny_model_dir, tmp_path / str(n), devices=n, **options) for n in (2, 1))
    assert difference(two, one) < 1e-5
    a, b = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("2", "1"))
    for name in ("train/score", "train/turns", "train/length_mean", "train/score/environment"):
        assert a[name] == pytest.approx(b[name], rel=1e-3), name


# ------------------------------------------------------------------------------------------------- resume

RESUMED = dict(algorithm="dapo", batch_size=6, groups=dict(flat_groups="refill", spare=1, rounds=2), reward=None)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_model_dir, tmp_path):
    _, whole = run(tiny_model_dir, tmp_path / "whole", max_steps=5, save_every=1, **RESUMED)
    _, module = run(tiny_model_dir, tmp_path / "again", max_steps=5, seed=7,
                    ckpt=tmp_path / "whole" / "step3.ckpt", **RESUMED)  # fmt: skip
    assert_equal(trained(module), trained(whole))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_killed_at_random_moments_it_ends_the_same(tiny_model_dir, tmp_path, kills):
    """kill -9, resumed from the last checkpoint each time."""
    options = dict(TURNS, **RESUMED, lora=True, max_steps=3 * kills + 3)
    whole = spawn(HERE / "run_grpo.py", tiny_model_dir, tmp_path / "whole", **options)
    assert_equal(spawn_killed("run_grpo", tiny_model_dir, tmp_path / "killed", kills, save_every=1, **options), whole)


# ------------------------------------------------------------------------------------------------- what people see


def test_the_environments_reward_is_a_part_of_the_score(tiny_model_dir, tmp_path):
    _, module = run(tiny_model_dir, tmp_path / "a", max_steps=1, reward=None)
    assert list(module.reward.names) == ["environment"]
    rewards = [WeightedReward(letters, 0.5, "letters"), WeightedReward(run_grpo.has, 2.0, "has")]
    trainer, module = run(tiny_model_dir, tmp_path / "b", max_steps=1, reward=rewards, algorithm="gdpo")
    logged = {name: trainer.callback_metrics[f"train/{name}"].item() for name in
              ("score", "score/letters", "score/has", "score/environment")}  # fmt: skip
    assert logged["score"] == pytest.approx(
        0.5 * logged["score/letters"] + 2 * logged["score/has"] + logged["score/environment"], rel=1e-5
    )
    with pytest.raises(ValueError, match=r"a part has the name 'environment', which is the environment's"):
        run(tiny_model_dir, tmp_path, reward=[WeightedReward(letters, 1.0, "environment")])
    with pytest.raises(ValueError, match=r"There is no reward. Set reward, or an environment that gives one"):
        GRPOModule(tiny_model_dir)


def test_validation_prediction_and_samples_show_turns(tiny_model_dir, tmp_path):
    trainer, module = run(tiny_model_dir, tmp_path, val_fraction=0.3, max_steps=1)
    found = trainer.validate(module, trainer.datamodule, verbose=False)[0]
    records = [r for batch in trainer.predict(module, trainer.datamodule.val_dataloader()) for r in batch]
    assert found["val/score"] == pytest.approx(sum(r["score"] for r in records) / len(records))
    several = [r for r in records if len(r["turns"]) > 1]
    assert several and all(r["turns"][0]["role"] == "assistant" and "\n[user] " in r["completion"] for r in several)
    again = [r for batch in trainer.predict(module, trainer.datamodule.val_dataloader()) for r in batch]
    assert again == records  # the environment draws the same at each validation
    run(tiny_model_dir, tmp_path / "shown", val_fraction=0.3, max_steps=2, reward=None, kind=Shown)
    rows = [json.loads(line) for line in (tmp_path / "shown" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) > 4 and all(row["score"] >= 0 for row in rows) and any(row["score"] for row in rows)
    assert any("\n[user] " in row["completion"] for row in rows)


class Shown(GRPOModule):
    def configure_callbacks(self):
        return [SampleCompletions(["Say a", "Say fox", "Say dog"], max_new_tokens=10, temperature=1.0)]


class Breaks(Environment):
    def reset(self, row, seed):
        return row["messages"]

    def step(self, messages, text):
        return Turn() if "1" in messages[-1]["content"] else Turn(done=True)


def test_a_fault_ends_the_run_and_names_the_row(tiny_model_dir, tmp_path):
    with pytest.raises(TurnError, match=r"Breaks, row 1\d? of the prompts: step returned no messages"):
        run(tiny_model_dir, tmp_path, environment=Breaks(), sampling=dict(max_new_tokens=4, logit_bias={4: 50.0}))


def test_what_micro_batches_cannot_hold_is_refused_before_the_first_rollout(tiny_model_dir, tmp_path):
    message = r"completion of rollout.max_total_tokens=200 have 2\d\d, over 150: updates.micro_batch_tokens"
    with pytest.raises(ValueError, match=message):
        run(tiny_model_dir, tmp_path, max_total_tokens=200)
    with pytest.raises(TurnError, match=r"over 150: updates.micro_batch_tokens. Set rollout.max_total_tokens to at"):
        run(tiny_model_dir, tmp_path, max_total_tokens=None)


def test_stop_strings_end_turns_and_the_reward_model_reads_a_stop_token(tiny_model_dir, tmp_path):
    _, module = run(tiny_model_dir, tmp_path, kind=Recorded, max_steps=1, reward=None)
    [(experience, _, _, samples)] = module.iterations
    every = [branch for tree in experience.trees for branch in tree.branches]
    read = samples.batch
    eos = module.tokenizer.eos_token_id
    last = read.input_ids[read.last].tolist()
    for branch, token, cut in zip(every, last, samples.truncated, strict=True):
        assert token == (branch.input_ids[-1] if cut else eos)
    stopped = [b for b, cut in zip(every, samples.truncated, strict=True) if not cut]
    assert any(b.input_ids[-1] != eos for b in stopped)
