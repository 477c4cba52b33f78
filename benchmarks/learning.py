"""Learning results: what each stage learns on small real models.

    python benchmarks/learning.py sft_smollm2            # seeds 0, 1, 2; a table, and a line a run in results/
    python benchmarks/learning.py sft_stories260k --seeds 0

Settings and seeds stand in this file and were committed before the runs that the README reports. Every finished run
adds a line to ``benchmarks/results/learning.jsonl``; none is left out. What is no number but a list, such as a curve,
goes to a file of its own beside it.

Studies of PPO report the mean score of completions of the validation prompts before and after, drawn by the same keys;
and of the training completions the first iteration, in which the policy is still where it starts, beside the mean of
the last five.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.resources
import json
import operator
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch

from lightning_rlhf import (
    GAE,
    KL,
    Critic,
    DPOModule,
    Groups,
    GRPOModule,
    InstructionDataModule,
    KTOModule,
    LoRA,
    OnlineDPOModule,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Rollout,
    Sampling,
    SFTModule,
    Shaping,
    UnpairedDataModule,
    Updates,
)
from lightning_rlhf.evaluation import Answer, AnswerPair, judge_pairs, make_judge, rates
from lightning_rlhf.functional import ALGORITHMS
from lightning_rlhf.models.pretrained import obtain
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.rewards import WeightedReward
from lightning_rlhf.rewards.verifiers import constraints, number
from lightning_rlhf.rl.environments import Calculator
from lightning_rlhf.stages.alignment import AlignmentStage
from lightning_rlhf.stages.rl import RLStage
from lightning_rlhf.utils.filesystem import COMPLETE

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "learning.jsonl"
RUNS = ROOT / "runs" / "learning"
QUIET: dict[str, Any] = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
ASSETS = Path(os.environ.get("LIGHTNING_RLHF_ASSETS", ROOT.parent / "shared"))
STORIES = ROOT / "tests" / "assets" / "stories260K"
#: Learning rates of GRPO's studies: in full, and of adapters.
GRPO_RATE, LORA_RATE = 1e-4, 7e-4


def sft_smollm2(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """SmolLM2-135M-Instruct by LoRA on the bundled data, both languages, 1 epoch; a tenth held out by the seed."""
    module = SFTModule(
        obtain("smollm2-135m-instruct"),
        lora=LoRA(r=16, alpha=32),
        optimizer=lambda params: torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0),
    )
    return _held_out(module, InstructionDataModule(batch_size=8, seed=seed), epochs=1, max_steps=max_steps)


def sft_stories260k(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """stories260K in full on the bundled English data, 10 epochs; rows over its 512 tokens are skipped and counted."""
    return _sft_stories(seed, 10, max_steps)


def sft_stories260k_short(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """The same for 2 epochs: a hundred rows are over-fitted in 10."""
    return _sft_stories(seed, 2, max_steps)


def _sft_stories(seed: int, epochs: int, max_steps: int) -> dict[str, Any]:
    module = SFTModule(
        STORIES,
        chat_template="plain",
        optimizer=lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=0.01),
    )
    english = importlib.resources.files("lightning_rlhf.data") / "bundled" / "instructions.en.jsonl"
    data = InstructionDataModule(str(english), batch_size=8, max_length=512, on_bad_row="skip", seed=seed)
    return _held_out(module, data, epochs, max_steps)


def reward_stories260k(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """stories260K in full on pairs of its own samples, of which VADER finds one happier; 4 epochs, a fifth held out."""
    return _reward_stories(seed, max_steps)[1]


def _reward_stories(seed: int, max_steps: int) -> tuple[RewardModule, dict[str, Any]]:
    module = RewardModule(
        STORIES,
        chat_template="plain",
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01),
    )
    data = PreferenceDataModule(_happier(seed, pairs=3000), batch_size=64, val_fraction=0.2, seed=seed)
    return module, _held_out(module, data, epochs=4, max_steps=max_steps)


def reward_smollm2(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """SmolLM2-135M-Instruct by LoRA on 40 x 8 real preferences up to 384 tokens; 15 % held out by first user turn."""
    return _reward_smollm2(seed, max_steps)[1]


def _reward_smollm2(seed: int, max_steps: int) -> tuple[RewardModule, dict[str, Any]]:
    module = RewardModule(
        obtain("smollm2-135m-instruct"),
        lora=LoRA(r=16, alpha=32),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0),
    )
    real = str(ASSETS / "data" / "preference.jsonl")
    data = PreferenceDataModule(real, batch_size=16, max_length=384, on_bad_row="skip", val_fraction=0.15, seed=seed)
    return module, _held_out(module, data, epochs=1, max_steps=40 if max_steps < 0 else max_steps)


def dpo_smollm2(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """SmolLM2-135M-Instruct by DPO with LoRA on real preferences up to 320 tokens; 1 epoch, a quarter held out.

    The split goes by first user turns, and is one for all seeds: 40 % of the turns are trained on, 35 % train the
    judge, and 25 % are held out. Policy and start answer greedily, 64 tokens each, the English prompts that neither
    was trained on. The judge is a reward model of the first 64 tokens of answers: it compares what it has learned to
    compare, and the longer answer is no better for it. It is trained once for all seeds.
    """
    with tempfile.TemporaryDirectory() as scratch:  # what was cut short must not be taken for a trained one
        folder = (RUNS if max_steps < 0 else Path(scratch)) / "dpo_smollm2_judge"
        if not (folder / "found.json").is_file():
            L.seed_everything(0, verbose=False)
            learned = _judge_smollm2(folder, max_steps)
            (folder / "found.json").write_text(json.dumps(learned))
        judged = json.loads((folder / "found.json").read_text())
        L.seed_everything(seed, verbose=False)  # whether it was trained now or before
        module = DPOModule(
            obtain("smollm2-135m-instruct"),
            lora=LoRA(r=16, alpha=32),
            optimizer=lambda params: torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0),
        )
        held_out = _turns("preference.jsonl", 0, 0.25)
        data = PreferenceDataModule(
            _turns("preference.jsonl", 0.6, 1), val=held_out, max_length=320, on_bad_row="skip", batch_size=8, seed=seed
        )
        trained_on = {_first_turn(row) for row in _turns("preference.jsonl", 0.25, 1)}
        prompts = [row["prompt"] for row in _turns("prompts.jsonl", 0, 1) if row.get("lang", "en") == "en"]
        prompts = [prompt for prompt in prompts if prompt not in trained_on and len(prompt) <= 250]
        before = _beginnings(module, prompts)
        trainer = L.Trainer(max_epochs=1, max_steps=max_steps, limit_val_batches=0, gradient_clip_val=1.0, **QUIET)
        trainer.fit(module, data)
        found: dict[str, Any] = {"steps": trainer.global_step}
        measured = L.Trainer(**QUIET).validate(module, data, verbose=False)[0]  # at the start half are right, by ties
        found |= {f"{name.removeprefix('val/')} after": value for name, value in measured.items()}
        pairs = [AnswerPair(*three) for three in zip(prompts, _beginnings(module, prompts), before, strict=True)]
        for name, judge in (("win rate", make_judge(str(folder))), ("longer wins", make_judge(_length))):
            verdicts = judge_pairs(judge, pairs)
            scores = torch.tensor([sum(verdict.scores) / 2 for verdict in verdicts])
            found |= {
                name: rates(verdicts).win_rate.item(),
                f"{name}, error": (scores.std() / len(scores) ** 0.5).item(),
            }
    found |= {"prompts": len(pairs), "same answer": sum(pair.a == pair.b for pair in pairs)}
    samples = [{"prompt": pair.prompt, "before": pair.b.text, "after": pair.a.text} for pair in pairs[::15]]
    return {**found, **{f"judge {name}": value for name, value in judged.items()}, "samples": samples}


def _judge_smollm2(folder: Path, max_steps: int) -> dict[str, Any]:
    """Trains a reward model of the beginnings of answers, on other first turns than DPO, and saves it."""
    module = RewardModule(
        obtain("smollm2-135m-instruct"),
        lora=LoRA(r=16, alpha=32),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0),
    )

    def begin(answer: str | list[dict[str, str]]) -> str:
        text = answer if isinstance(answer, str) else answer[0]["content"]
        return str(module.tokenizer.decode(module.tokenizer(text).input_ids[:64]))

    rows, held_out = (
        [{**row, **{name: begin(row[name]) for name in ("chosen", "rejected")}} for row in found]
        for found in (_turns("preference.jsonl", 0.25, 0.6), _turns("preference.jsonl", 0, 0.25))
    )
    data = PreferenceDataModule(rows, val=held_out, batch_size=16, max_length=192, on_bad_row="skip")
    found = _held_out(module, data, epochs=1, max_steps=max_steps)
    save_pretrained(module.model_to_export.model, module.tokenizer, folder, adapter_only=True)
    return {name: found[name] for name in ("steps", "accuracy before", "accuracy after", "length_accuracy")}


def _first_turn(row: dict[str, Any]) -> str:
    return str(row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"])


def _turns(name: str, low: float, high: float) -> list[dict[str, Any]]:
    """Rows of a file of real data whose first user turn's hash is between two shares."""
    rows = [json.loads(line) for line in (ASSETS / "data" / name).read_text(encoding="utf-8").splitlines()]
    shares = [int.from_bytes(hashlib.sha256(_first_turn(row).encode()).digest()[:8], "big") / 2**64 for row in rows]
    return [row for row, share in zip(rows, shares, strict=True) if low <= share < high]


def _beginnings(module: AlignmentStage, prompts: Sequence[str]) -> list[Answer]:
    """The first 64 tokens of greedy answers, which the judge reads as whole."""
    parts = [prompts[start : start + 32] for start in range(0, len(prompts), 32)]
    found = [c for part in parts for c in module.generate(part, Sampling(max_new_tokens=64, temperature=0.0))]
    return [Answer(completion.text) for completion in found]


def _length(prompts: list[str], completions: list[str]) -> list[float]:
    """The length of each completion in characters."""
    return [float(len(text)) for text in completions]


def dpo_stories260k(seed: int, max_steps: int = -1, **settings: Any) -> dict[str, Any]:
    """stories260K in full by DPO on 800 pairs of its own samples, ranked by VADER; 2 epochs, a fifth held out.

    Pairs and fresh samples have 48 tokens at most. The split goes by openings.
    """
    module = _dpo_stories(**settings)
    pairs = _own_pairs(module, seed, 800)
    data = PreferenceDataModule(pairs, batch_size=64, val_fraction=0.2, seed=seed)
    before = _fresh_score(module, seed)
    found = _held_out(module, data, epochs=2, max_steps=max_steps)
    return {"score before": before, "score after": _fresh_score(module, seed), **found}


def _dpo_stories(**settings: Any) -> DPOModule:
    return DPOModule(
        STORIES,
        chat_template="plain",
        optimizer=lambda params: torch.optim.AdamW(params, lr=5e-4, weight_decay=0.0),
        **settings,
    )


def dpo_stories260k_ipo(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """The same by IPO."""
    return dpo_stories260k(seed, max_steps, loss="ipo")


def dpo_stories260k_simpo(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """The same by SimPO, without a reference."""
    return dpo_stories260k(seed, max_steps, loss="simpo")


def dpo_stories260k_large_beta(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """Control: the same by DPO with a beta of 100 leaves the policy where it was."""
    return dpo_stories260k(seed, max_steps, beta=100.0)


def kto_stories260k(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """stories260K in full by KTO on the pairs of dpo_stories260k taken apart; 2 epochs, a fifth held out."""
    module = KTOModule(
        STORIES,
        chat_template="plain",
        optimizer=lambda params: torch.optim.AdamW(params, lr=5e-4, weight_decay=0.0),
    )
    pairs = _own_pairs(module, seed, 800)
    data = UnpairedDataModule(pairs, take_apart=True, batch_size=64, val_fraction=0.2, seed=seed)
    before = _fresh_score(module, seed)
    found = _held_out(module, data, epochs=2, max_steps=max_steps)
    return {"score before": before, "score after": _fresh_score(module, seed), **found}


def dpo_stories260k_shuffled(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """Control: the same on 640 pairs whose order is drawn teaches nothing about 600 pairs of 15 other openings."""
    module = _dpo_stories()
    pairs, other = _own_pairs(module, seed, 2400), set(OPENINGS[::4])
    generator = torch.Generator().manual_seed(seed)
    shuffled = [row for row in pairs if row["prompt"] not in other][:640]
    for row in shuffled:
        if torch.rand((), generator=generator) < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    held_out = [row for row in pairs if row["prompt"] in other][:600]
    data = PreferenceDataModule(shuffled, val=held_out, batch_size=64, seed=seed)
    before = _fresh_score(module, seed)
    found = _held_out(module, data, epochs=2, max_steps=max_steps)
    return {"score before": before, "score after": _fresh_score(module, seed), **found}


def online_dpo_stories260k(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """stories260K in full by online DPO: 12 iterations of 4 samples for each of 60 openings, ranked by VADER.

    These are 2,880 samples of 48 tokens at most, as many as the 800 pairs of dpo_stories260k took, and 48 updates of 30
    pairs at most, where DPO takes 44 to 46 of 32. Pairs differ by more than 0.2 here too.
    """
    module = OnlineDPOModule(
        STORIES,
        happiness,
        chat_template="plain",
        rollout=Rollout(samples_per_prompt=4, sampling=Sampling(max_new_tokens=48)),
        margin=0.2,
        updates=Updates(epochs=2, minibatches=2, micro_batch_tokens=8192),
        optimizer=lambda params: torch.optim.AdamW(params, lr=5e-4, weight_decay=0.0),
        seed=seed,
    )
    rows = [{"prompt": opening} for opening in OPENINGS]
    data = PromptDataModule(rows, val=rows, batch_size=len(rows), eval_batch_size=len(rows), seed=seed)
    curve = Curve(("kl", "pairs", "flat_groups"))
    before = _fresh_score(module, seed)
    steps, first, last = _train(module, data, max_steps=12 if max_steps < 0 else max_steps, callbacks=[curve])
    totals = {name: sum(point[name] for point in curve.points) for name in ("pairs", "flat_groups")}
    held_out = {f"val {name}": value for name, value in _beside(first, last).items()}
    found = {"steps": steps, **totals, "kl after": curve.points[-1]["kl"], **held_out}
    return {"score before": before, "score after": _fresh_score(module, seed), **found}


def ppo_stories260k(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """stories260K in full, 2 completions of 48 tokens for each of 60 openings, scored by VADER; 30 iterations."""
    found, curve = _ppo_stories(seed, happiness, max_steps)
    return {**found, "learning_curve": curve}


def ppo_stories260k_head(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """The same, the critic being a head on the policy's hidden states."""
    found, curve = _ppo_stories(seed, happiness, max_steps, kind="head")
    return {**found, "learning_curve": curve}


def ppo_stories260k_head_detached(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """The same, the critic's loss training its head alone."""
    found, curve = _ppo_stories(seed, happiness, max_steps, kind="head", trunk_grad=0.0)
    return {**found, "learning_curve": curve}


def ppo_stories260k_adapter(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """The same with LoRA (r 16) at 10 times the rate, the critic being a second adapter."""
    found, curve = _ppo_stories(seed, happiness, max_steps, lr=1.5e-3, kind="adapter", lora=LoRA(r=16))
    return {**found, "learning_curve": curve}


def ppo_stories260k_large_kl(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """Control: the same with kl_coef 10 leaves the policy where it was."""
    found, curve = _ppo_stories(seed, happiness, max_steps, kl_coef=10.0)
    return {**found, "learning_curve": curve}


def ppo_stories260k_constant(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """Control: the same with a constant reward leaves the policy where it was; VADER's score is looked at alone."""
    return _ppo_stories(seed, [WeightedReward(constant), WeightedReward(happiness, 0.0, "gold")], max_steps)[0]


def ppo_stories260k_proxy(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """The same against reward_stories260k's model, 80 iterations on a loose rein; VADER's score is the gold one.

    What neither of them sees is written down too: the share of a completion's words that are distinct.
    """
    module, learned = _reward_stories(seed, max_steps)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(module.model_to_export.model, module.tokenizer, Path(folder) / "proxy")
        reward = [
            WeightedReward(str(Path(folder) / "proxy"), 1.0, "proxy"),
            WeightedReward(happiness, 0.0, "gold"),  # this and the next are looked at, not learned from
            WeightedReward(variety, 0.0, "variety"),
        ]
        found, curve = _ppo_stories(seed, reward, max_steps, steps=80, lr=3e-4, kl_coef=0.002, scale_scores=True)
    kl, gold = turning_point(curve)
    return {
        "reward model accuracy": learned["accuracy after"],
        **found,
        "gold peak": gold,
        "KL at gold peak": kl,
        "over_optimization": curve,
    }


def grpo_stories260k(seed: int, max_steps: int = -1, algorithm: str = "grpo") -> dict[str, Any]:
    """stories260K in full by GRPO, 4 completions of 48 tokens for each of 30 openings, by VADER; 10 iterations.

    The KL penalty of 0.001 is there to measure the KL. GDPO, which wants several rewards, gets variety as a second one.
    Runs with rates of 3e-4 and 1.5e-4 went to a KL above 8; the rate of 1e-4 was tried with RLOO and seed 7.
    """
    both = [WeightedReward(happiness, 1.0, "happiness"), WeightedReward(variety, 0.2, "variety")]
    return _grpo_stories(seed, both if algorithm == "gdpo" else happiness, max_steps, algorithm)


def grpo_stories260k_large_kl(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """Control: the same with a KL coefficient of 10 leaves the policy where it was."""
    return _grpo_stories(seed, happiness, max_steps, kl_coef=10.0)


def grpo_stories260k_constant(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """Control: the same with a constant reward leaves the policy where it was; VADER's score is looked at alone."""
    return _grpo_stories(seed, [WeightedReward(constant), WeightedReward(happiness, 0.0, "gold")], max_steps)


def grpo_stories260k_length(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """Control: the same with a reward for short stories, of 200 tokens at most, moves their length."""
    return _grpo_stories(seed, shortness, max_steps, new_tokens=200)


def _grpo_stories(
    seed: int,
    reward: Callable[..., Sequence[float]] | list[WeightedReward],
    max_steps: int,
    algorithm: str = "grpo",
    kl_coef: float = 0.001,
    new_tokens: int = 48,
) -> dict[str, Any]:
    module = GRPOModule(
        STORIES,
        reward,
        algorithm,
        chat_template="plain",
        rollout=Rollout(sampling=Sampling(max_new_tokens=new_tokens), samples_per_prompt=4),
        kl=KL(coef=kl_coef, where="loss"),
        groups=Groups(max_flat=None),  # of a constant reward all are
        updates=Updates(epochs=1, minibatches=4, micro_batch_tokens=8192),
        optimizer=lambda params: torch.optim.AdamW(params, lr=GRPO_RATE, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0),
        seed=seed,
    )
    rows = [{"prompt": opening} for opening in OPENINGS]
    data = PromptDataModule(rows, val=rows, as_text=True, batch_size=30, eval_batch_size=len(rows), seed=seed)
    return _ppo(module, data, 10 if max_steps < 0 else max_steps)[0]


def grpo_smollm2_sentence(
    seed: int, max_steps: int = -1, algorithm: str = "grpo", groups: Groups | None = None
) -> dict[str, Any]:
    """SmolLM2-135M-Instruct by LoRA and GRPO: one sentence with a word, ending in "!"; 8 iterations.

    The score is the share of the three that an answer keeps. Six words are held out. An iteration has 4 prompts with 8
    answers of 16 tokens at most, and 2 updates.
    """
    rows = [
        {
            "prompt": f"One sentence with the word {word}, ending in '!'",
            "constraints": {"sentences": 1, "contains": [word], "ends_with": "!"},
        }
        for word in WORDS.split()
    ]
    return _grpo_smollm2(seed, constraints, rows, 6, 16, max_steps, algorithm, groups)


def grpo_smollm2_sentence_refill(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """The same by DAPO with dynamic sampling: up to 2 further prompts take the place of those with equal scores."""
    return grpo_smollm2_sentence(seed, max_steps, "dapo", Groups("refill", spare=1, rounds=2))


def grpo_smollm2_sums(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """SmolLM2-135M-Instruct by LoRA and GRPO: sums of two digits; 12 of the 100 held out; 8 iterations."""
    sums = [{"prompt": f"What is {a} + {b}?", "answer": a + b} for a in range(10) for b in range(10)]
    order = torch.randperm(len(sums), generator=torch.Generator().manual_seed(0)).tolist()
    return _grpo_smollm2(seed, number, [sums[i] for i in order], 12, 12, max_steps)


def _grpo_smollm2(
    seed: int,
    reward: Callable[..., Sequence[float | None]],
    rows: list[dict[str, Any]],
    held_out: int,
    new_tokens: int,
    max_steps: int,
    algorithm: str = "grpo",
    groups: Groups | None = None,
) -> dict[str, Any]:
    """Trains on all rows but the first ones, which are held out and looked at before, in the middle and after."""
    groups = groups or Groups()
    module = GRPOModule(
        obtain("smollm2-135m-instruct"),
        reward,
        algorithm,
        lora=LoRA(r=16, alpha=32),
        rollout=Rollout(sampling=Sampling(max_new_tokens=new_tokens), samples_per_prompt=8),
        kl=KL(coef=0.001, where="loss"),
        groups=groups,
        updates=Updates(epochs=1, minibatches=2, micro_batch_tokens=1024),
        optimizer=lambda params: torch.optim.AdamW(params, lr=LORA_RATE, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        seed=seed,
    )
    data = PromptDataModule(
        rows[held_out:],
        val=rows[:held_out],
        batch_size=4 + groups.spare * groups.rounds,
        eval_batch_size=held_out,
        seed=seed,
    )
    curve, looks = Curve(("score", "kl", "flat_groups", "updates", "length_mean")), Looks()
    trainer = L.Trainer(
        max_steps=8 if max_steps < 0 else max_steps,
        val_check_interval=4 if max_steps < 0 else max_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        default_root_dir=RUNS,
        callbacks=[curve, looks],
        **QUIET,
    )
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    start, *later = looks.points
    found = {
        "steps": len(curve.points),
        "updates": looks.updates,
        "score before": start["score"],
        "score after": later[-1]["score"],
        "updates to double": next((p["updates"] for p in later if p["score"] >= 2 * start["score"]), None),
        "train score first": curve.points[0]["score"],
        "train score last": curve.points[-1]["score"],
        "train kl last": curve.points[-1]["kl"],
        "CPU seconds of training": looks.seconds,
    }
    return {**found, "grpo_held_out": looks.points, "grpo_curve": curve.points}


def grpo_calculator(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """SmolLM2-135M-Instruct by LoRA with a calculator, in two turns of 12 tokens: 8 completions of 4 sums a time.

    Six iterations; a turn ends at "=" too. The reward is 1 for the right answer, 0.2 for an expression with a value.
    Measured is its mean over 8 completions of 4 other sums, before and after, each with its standard error.
    """
    draw = random.Random(seed)
    names = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}
    drawn = ((draw.randint(11, 99), draw.choice(list(names)), draw.randint(11, 99)) for _ in range(28))
    rows = [{"prompt": f"What is {a} {name} {b}?", "answer": names[name](a, b)} for a, name, b in drawn]
    module = GRPOModule(
        obtain("smollm2-135m-instruct"),
        environment=Calculator(tool_reward=0.2),
        lora=LoRA(r=16, alpha=32),
        rollout=Rollout(sampling=Sampling(max_new_tokens=12, stop_strings=("=", "\n")), samples_per_prompt=8),
        updates=Updates(epochs=1, minibatches=2),
        optimizer=lambda params: torch.optim.AdamW(params, lr=5e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0),
        seed=seed,
    )
    data = PromptDataModule(rows[4:], val=rows[:4], predict=rows[:4], batch_size=4, seed=seed)
    curve = Curve(("score", "turns", "stopped"))

    def measure(when: str) -> dict[str, float]:
        batches: Any = L.Trainer(**QUIET).predict(module, data)
        scores = torch.tensor([record["score"] for batch in batches for record in batch])
        error = scores.std() / len(scores) ** 0.5
        return {f"reward {when}": scores.mean().item(), f"standard error {when}": error.item()}

    before = measure("before")
    steps = 6 if max_steps < 0 else max_steps
    L.Trainer(limit_val_batches=0, max_steps=steps, callbacks=[curve], default_root_dir=RUNS, **QUIET).fit(module, data)
    turns = {"train turns first": curve.points[0]["turns"], "train turns last": curve.points[-1]["turns"]}
    return {"steps": len(curve.points), **before, **measure("after"), **turns}


def ppo_smollm2(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """SmolLM2-135M-Instruct, LoRA on one backbone, against reward_smollm2's model; 12 x 16 real prompts x 32 tokens.

    The reward model is that of seed 0 for all seeds, trained once.
    """
    with tempfile.TemporaryDirectory() as scratch:  # what was cut short must not be taken for a trained one
        reward = (RUNS if max_steps < 0 else Path(scratch)) / "reward_smollm2_0"
        if not (reward / COMPLETE).is_file():
            L.seed_everything(0, verbose=False)
            trained, _ = _reward_smollm2(0, max_steps)
            save_pretrained(trained.model_to_export.model, trained.tokenizer, reward, adapter_only=True)
        L.seed_everything(seed, verbose=False)  # whether it was trained now or before
        module = PPOModule(
            obtain("smollm2-135m-instruct"),
            str(reward),
            critic=Critic(pretrained=reward),
            lora=LoRA(r=16, alpha=32),
            rollout=Rollout(sampling=Sampling(max_new_tokens=32)),
            updates=Updates(epochs=2, micro_batch_tokens=1024),
            kl=KL(coef=0.02),
            optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0),
            seed=seed,
        )
        data = PromptDataModule(
            str(ASSETS / "data" / "prompts.jsonl"),
            predict=[{"prompt": question} for question in QUESTIONS],
            max_length=96,
            on_bad_row="skip",
            batch_size=16,
            val_fraction=0.1,
            seed=seed,
        )

        def answers() -> list[str]:
            batches: Any = L.Trainer(**QUIET).predict(module, data)
            return [record["completion"] for batch in batches for record in batch]

        before = answers()
        found = _ppo(module, data, 12 if max_steps < 0 else max_steps)[0]
        table = zip(QUESTIONS, before, answers(), strict=True)
    return {**found, "samples": [{"prompt": q, "before": one, "after": other} for q, one, other in table]}


def _ppo_stories(
    seed: int,
    reward: Callable[..., Sequence[float]] | list[WeightedReward],
    max_steps: int,
    steps: int = 30,
    lr: float = 1.5e-4,
    kl_coef: float = 0.03,
    scale_scores: bool = False,
    kind: Literal["adapter", "head", "separate"] = "separate",
    trunk_grad: float = 1.0,
    lora: LoRA | None = None,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    module = PPOModule(
        STORIES,
        reward,
        chat_template="plain",
        lora=lora,
        rollout=Rollout(sampling=Sampling(max_new_tokens=48), samples_per_prompt=2),
        updates=Updates(epochs=4, micro_batch_tokens=8192),
        kl=KL(coef=kl_coef),
        critic=Critic(kind=kind, trunk_grad=trunk_grad, clip=None, lr=1e-3),
        gae=GAE(lam=1.0),  # of a constant reward nothing is left, once its advantages are whitened
        shaping=Shaping(scale=scale_scores),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0),
        seed=seed,
    )
    rows = [{"prompt": opening} for opening in OPENINGS]
    data = PromptDataModule(rows, val=rows, as_text=True, batch_size=len(rows), eval_batch_size=len(rows), seed=seed)
    return _ppo(module, data, steps if max_steps < 0 else max_steps)


def happiness(prompts: list[str], completions: list[str]) -> list[float]:
    """The sentiment of each completion by VADER, from -1 to 1."""
    return [_judge().polarity_scores(text)["compound"] for text in completions]


def variety(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of each completion's words that are distinct: low where it says the same again and again."""
    words = [text.lower().split() for text in completions]
    return [len(set(each)) / max(1, len(each)) for each in words]


def shortness(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
    """Minus the number of a completion's tokens, in hundreds."""
    return [-len(ids) / 100 for ids in completion_ids]


def constant(prompts: list[str], completions: list[str]) -> list[float]:
    """The same score for all."""
    return [1.0] * len(completions)


@cache
def _judge() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def smooth(values: Sequence[float], reach: int = 4) -> list[float]:
    """Means over each value and so many neighbors on both sides."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def turning_point(curve: Sequence[dict[str, float]]) -> tuple[float, float]:
    """KL and gold score, both smoothed, where the gold score is highest."""
    kl, gold = (smooth([point[name] for point in curve]) for name in ("kl", "gold"))
    best = max(range(len(gold)), key=gold.__getitem__)
    return kl[best], gold[best]


OPENINGS = [
    f"{start} {who}"
    for start in ("Once upon a time,", "One day,", "Yesterday,", "In the morning,", "At night,", "After lunch,")
    for who in (
        "a little girl",
        "a boy",
        "a dog",
        "the cat",
        "Lily",
        "Tom",
        "Mom",
        "a big bear",
        "the old man",
        "a bird",
    )
]


#: Of the sentences that are asked for; the first six are held out.
WORDS = (
    "moon river bread winter garden teacher music horse window summer apple street cloud doctor island forest kitchen "
    "silver morning letter mountain chair flower train bridge coffee market castle pencil rabbit storm village candle "
    "ocean basket dragon engine farmer glass hammer jacket kettle ladder mirror needle orange paper queen rocket "
    "school table uncle violin water yellow zebra"
)

QUESTIONS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "How can I sleep better?",
    "Explain in one sentence why the sky is blue.",
]


def _happier(seed: int, pairs: int) -> list[dict[str, str]]:
    """Pairs of samples of 48 tokens that open alike, whose sentiments differ by at least 0.2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    torch.manual_seed(seed)
    rows: list[dict[str, str]] = []
    while len(rows) < pairs:
        for opening in OPENINGS:
            ids = torch.tensor([tokenizer(opening).input_ids] * 32)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=48, pad_token_id=0
            )
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for one, other in zip(texts[::2], texts[1::2], strict=True):
                (low, rejected), (high, chosen) = sorted(zip(happiness([], [one, other]), (one, other), strict=True))
                if high - low >= 0.2 and rejected.strip():
                    # numbered openings: the split goes by them, and pairs must not all fall on one side
                    rows.append({"prompt": f"{len(rows)}. {opening}", "chosen": chosen, "rejected": rejected})
    return rows[:pairs]


def _samples(module: AlignmentStage | OnlineDPOModule, seed: int, each: int) -> list[tuple[str, str]]:
    """Openings, and a continuation of 48 tokens at most for each; every opening several times."""
    asked = [opening for opening in OPENINGS for _ in range(each)]
    found = module.generate(asked, Sampling(max_new_tokens=48), seed=seed)
    return [(opening, completion.text) for opening, completion in zip(asked, found, strict=True)]


def _own_pairs(module: AlignmentStage, seed: int, count: int) -> list[dict[str, str]]:
    """Pairs of the policy's own samples that open alike, whose sentiments differ by at least 0.2."""
    rows: list[dict[str, str]] = []
    for round_ in range(100):
        drawn = _samples(module, 1000 * seed + round_, 16)
        for (opening, one), (_, other) in zip(drawn[::2], drawn[1::2], strict=True):
            (low, rejected), (high, chosen) = sorted(zip(happiness([], [one, other]), (one, other), strict=True))
            if high - low >= 0.2 and rejected.strip():
                rows.append({"prompt": opening, "chosen": chosen, "rejected": rejected})
        if len(rows) >= count:
            break
    return rows[:count]


def _fresh_score(module: AlignmentStage | OnlineDPOModule, seed: int) -> float:
    """The mean sentiment of samples that no pair has."""
    scores = happiness([], [text for _, text in _samples(module, 1000 * seed + 999, 4)])
    return sum(scores) / len(scores)


def _held_out(
    module: SFTModule | RewardModule | AlignmentStage,
    data: InstructionDataModule | PreferenceDataModule | UnpairedDataModule,
    epochs: int,
    max_steps: int,
) -> dict[str, Any]:
    """Trains by epochs."""
    steps, before, after = _train(module, data, max_epochs=epochs, max_steps=max_steps, gradient_clip_val=1.0)
    fixed = [name for name in before if name in ("length_accuracy", "matched_pairs")]
    return {"steps": steps, **{n: after[n] for n in fixed}, **_beside(before, after, fixed)}


def _ppo(module: RLStage, data: PromptDataModule, steps: int) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Trains by iterations; what was found, and the curve."""
    curve = Curve()
    _, before, after = _train(module, data, max_steps=steps, callbacks=[curve])
    first, last = curve.points[0], curve.points[-5:]
    found: dict[str, Any] = {"steps": len(curve.points), **_beside(before, after)}
    for name in ("score", "kl", "length_mean", *module.reward.names):
        found |= {f"train {name} first": first[name], f"train {name} last 5": sum(p[name] for p in last) / len(last)}
    return found, curve.points


class Looks(L.Callback):
    """Keeps what validations find on the way, and what training up to them took.

    Attributes:
        points: One a validation; the first is before training.
        updates: Optimizer steps so far.
        seconds: CPU seconds of the iterations so far, without validations.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.updates = self.seconds = self._began = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """An iteration begins."""
        self._began = time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """An iteration is done."""
        self.seconds += time.process_time() - self._began
        self.updates += trainer.callback_metrics["train/updates"].item()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Held-out prompts are answered."""
        score = trainer.callback_metrics["val/score"].item()
        self.points.append({"updates": self.updates, "score": score, "CPU seconds": self.seconds})


class Curve(L.Callback):
    """Keeps what is logged of each iteration, and the mean scores of a reward's parts.

    Args:
        names: What to keep.

    Attributes:
        points: One an iteration.
    """

    def __init__(
        self, names: Sequence[str] = ("score", "kl", "length_mean", "entropy", "approx_kl", "explained_variance")
    ) -> None:
        self.names = names
        self.points: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """An iteration is done."""
        logged: Any = trainer.callback_metrics
        names = {name: name for name in self.names} | {f"score/{name}": name for name in pl_module.reward.names}
        found = {short: logged.get(f"train/{name}") for name, short in names.items()}  # not all stages have a critic
        self.points.append({short: value.item() for short, value in found.items() if value is not None})


def _train(
    module: L.LightningModule, data: L.LightningDataModule, **settings: Any
) -> tuple[int, dict[str, float], dict[str, float]]:
    """Trains between two measurements of what validation logs; steps, before, after."""
    trainer = L.Trainer(limit_val_batches=0, default_root_dir=RUNS, **settings, **QUIET)

    def measure() -> dict[str, float]:
        # a Trainer of its own: the training one is told to validate nothing
        found = L.Trainer(**QUIET).validate(module, data, verbose=False)[0]
        return {name.removeprefix("val/"): value for name, value in found.items()}

    before = measure()
    trainer.fit(module, data)
    return trainer.global_step, before, measure()


def _beside(before: dict[str, float], after: dict[str, float], fixed: Sequence[str] = ()) -> dict[str, float]:
    """Each measure before and after."""
    names = [name for name in before if name not in fixed]
    return {f"{name} {when}": v[name] for name in names for when, v in (("before", before), ("after", after))}


STUDIES: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f
    for f in (
        sft_smollm2,
        sft_stories260k,
        sft_stories260k_short,
        reward_stories260k,
        reward_smollm2,
        dpo_smollm2,
        dpo_stories260k,
        dpo_stories260k_ipo,
        dpo_stories260k_simpo,
        dpo_stories260k_large_beta,
        kto_stories260k,
        dpo_stories260k_shuffled,
        online_dpo_stories260k,
        ppo_stories260k,
        ppo_stories260k_head,
        ppo_stories260k_head_detached,
        ppo_stories260k_adapter,
        ppo_stories260k_large_kl,
        ppo_stories260k_constant,
        ppo_stories260k_proxy,
        ppo_smollm2,
        grpo_stories260k,
        grpo_stories260k_large_kl,
        grpo_stories260k_constant,
        grpo_stories260k_length,
        grpo_smollm2_sentence,
        grpo_smollm2_sentence_refill,
        grpo_smollm2_sums,
        grpo_calculator,
    )
}
#: The same by each other algorithm: ``grpo_stories260k_dapo``, ...
STUDIES |= {
    f"grpo_stories260k_{name}": partial(grpo_stories260k, algorithm=name) for name in ALGORITHMS.keys() - {"grpo"}
}


def record(study: str, row: dict[str, Any]) -> None:
    """Adds a run's numbers to the results, and each list to the file of its name."""
    parts = {RESULTS: {name: value for name, value in row.items() if not isinstance(value, list)}}
    lists = {name: value for name, value in row.items() if isinstance(value, list)}
    parts |= {RESULTS.with_name(f"{name}.jsonl"): {"seed": row["seed"], name: value} for name, value in lists.items()}
    RESULTS.parent.mkdir(exist_ok=True)
    for path, part in parts.items():
        with path.open("a") as file:
            file.write(json.dumps({"study": study, **part}) + "\n")


def main() -> None:
    """Runs a study for each seed, and prints every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=-1, help="cut short, to try it; such runs are not recorded")
    options = parser.parse_args()
    study = STUDIES[options.study]
    print(f"{options.study}: {getattr(study, 'func', study).__doc__}")
    rows = []
    for seed in options.seeds:
        L.seed_everything(seed, verbose=False)
        began = time.process_time()
        found = study(seed, options.max_steps)
        row = {"seed": seed, **found, "CPU seconds": time.process_time() - began}
        if options.max_steps < 0:
            record(options.study, row)
        rows.append({name: value for name, value in row.items() if not isinstance(value, list)})
        print(json.dumps(rows[-1]), flush=True)
    print(f"\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(f'{v:.3f}' if isinstance(v, float) else str(v) for v in row.values())} |")


if __name__ == "__main__":
    main()
