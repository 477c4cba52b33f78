"""``lightning-rlhf demo``: RLHF of a small real model on the bundled data, from end to end."""

from __future__ import annotations

import argparse
import importlib.resources
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_rlhf.arguments import Parser, did_you_mean

STAGES = ("sft", "reward", "ppo")
PROMPTS = [
    "Classify the sentiment as positive or negative: 'The battery died after two days.'",
    "Rewrite more politely: Send me the file now.",
    "用一句话解释什么是机器学习。",
]


def main(args: Sequence[str] | None = None) -> None:
    """Fine-tunes SmolLM2-135M-Instruct, trains a reward model, and PPO against it; all in one HTML report.

    Each stage begins with the Hugging Face directory that the one before left, so any of them can be run again alone.

    Args:
        args: Command line after ``demo``.
    """
    parser = Parser("demo", main.__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="of sft, reward, ppo; default all, in this order")
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="hub id or directory; the default needs no hub"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--train", default="bundled", help="instruction data: file, glob or hub id")
    parser.add_argument("--pairs", default="bundled", help="preference data: file, glob or hub id")
    parser.add_argument(
        "--prompts",
        default=_bundled_english(),
        help="PPO's prompts: file, glob or hub id; default the bundled ones in English",
    )
    parser.add_argument("--steps", type=int, default=16, help="of fine-tuning: 8 conversations each")
    parser.add_argument("--reward-steps", type=int, default=32, help="of the reward model: 8 pairs each")
    parser.add_argument("--iterations", type=int, default=10, help="of PPO: 16 completions each")
    parser.add_argument("--new-tokens", type=int, default=32, help="most tokens of PPO's completions")
    options = parser.parse_args(args)
    if unknown := [stage for stage in options.stages if stage not in STAGES]:
        parser.error(f"there is no stage {unknown[0]}{did_you_mean(unknown[0], STAGES)} All: {', '.join(STAGES)}")
    began = time.perf_counter()
    print(f"Everything goes to {options.output}.")
    stages = {"sft": fine_tune, "reward": train_reward_model, "ppo": reinforce}
    chosen = [stage for stage in STAGES if stage in (options.stages or STAGES)]
    for number, name in enumerate(chosen, 1):
        print(f"\n{number}. ", end="", flush=True)
        stages[name](options)
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Curves, answers and settings, in one page:")
    print(f"   {options.output / 'report.html'}")
    kind = "AutoModelForSequenceClassification" if chosen[-1] == "reward" else "AutoModelForCausalLM"
    print(
        f"The model is an ordinary Hugging Face directory:\n   {kind}.from_pretrained('{_left(options, chosen[-1])}')"
    )


def fine_tune(options: argparse.Namespace) -> None:
    """Supervised fine-tuning by LoRA."""
    from lightning_rlhf import InstructionDataModule, SFTModule
    from lightning_rlhf.models.pretrained import obtain

    print(f"Supervised fine-tuning by LoRA: {options.steps} steps of 8 conversations", flush=True)
    trainer, lora = _begin(options, "sft", options.steps, gradient_clip_val=1.0)
    module = SFTModule(obtain(options.model), lora=lora, optimizer=_adamw(2e-4))
    data = InstructionDataModule(options.train, batch_size=8)
    before, after = _fit(trainer, module, data, options.train)
    for when, found in (("before", before), ("after ", after)):
        print(f"   {when}  {_line(found, 'loss', 'perplexity', 'token_accuracy')}")


def train_reward_model(options: argparse.Namespace) -> None:
    """A reward model by LoRA, kept as an adapter, so that PPO can share its backbone."""
    from lightning_rlhf import PreferenceDataModule, RewardModule

    print(f"A reward model of what that left: {options.reward_steps} steps of 8 pairs", flush=True)
    trainer, lora = _begin(options, "reward", options.reward_steps, gradient_clip_val=1.0)
    module = RewardModule(_left(options, "sft"), lora=lora, optimizer=_adamw(5e-4))
    data = PreferenceDataModule(options.pairs, batch_size=8, val_fraction=0.2)
    before, after = _fit(trainer, module, data, options.pairs)
    for when, found in (("before", before), ("after ", after)):
        print(f"   {when}  {_line(found, 'loss', 'accuracy')}")
    print(f"   ('the longer answer wins' is right for {after['val/length_accuracy']:.3f} of these pairs)")


def reinforce(options: argparse.Namespace) -> None:
    """PPO: policy, reference, critic and reward model are adapters of one backbone."""
    from lightning_rlhf import KL, Critic, PPOModule, PromptDataModule, Rollout, Sampling, Shaping, Updates

    print(
        f"PPO against that reward model: {options.iterations} iterations of 16 completions; an answer that is cut at",
        end="",
    )
    print(f" {options.new_tokens} tokens costs 1", flush=True)
    trainer, lora = _begin(options, "ppo", options.iterations, limit_val_batches=0)
    reward = _left(options, "reward")
    module = PPOModule(
        _left(options, "sft"),
        str(reward),
        critic=Critic(reward),
        lora=lora,
        rollout=Rollout(sampling=Sampling(max_new_tokens=options.new_tokens)),
        updates=Updates(epochs=2, micro_batch_tokens=1024),
        kl=KL(coef=0.02),
        shaping=Shaping(missing_eos_penalty=1.0),
        optimizer=_adamw(5e-4),
    )
    data = PromptDataModule(
        options.prompts, max_length=96, on_bad_row="skip", batch_size=16, val_fraction=0.2, eval_batch_size=64
    )

    def answers() -> list[dict[str, Any]]:
        """Completions of the held-out prompts with their scores, always drawn by the same keys."""
        batches: Any = trainer.predict(module, data)
        return [record for batch in batches for record in batch]

    first = answers()
    if len(first) < 2:
        sys.exit(f"{options.prompts} has too few rows: {len(first)} held out. Give at least 50.")
    trainer.fit(module, data)
    kl = trainer.callback_metrics["train/kl"].item()
    last = answers()
    rises = [after["score"] - before["score"] for before, after in zip(first, last, strict=True)]
    error = statistics.stdev(rises) / len(rises) ** 0.5
    rise = statistics.fmean(rises)
    before, after = (statistics.fmean(record["score"] for record in found) for found in (first, last))
    print(
        f"   mean reward of {len(rises)} held-out prompts  {before:.3f} before, {after:.3f} after: {rise:+.3f}, ",
        end="",
    )
    print(f"{rise / error if error else 0:.1f} standard errors")
    ended = [statistics.fmean(not record["truncated"] for record in found) for found in (first, last)]
    print(f"   answers that end within {options.new_tokens} tokens  {ended[0]:.2f} before, {ended[1]:.2f} after")
    print(f"   at a KL from where it started of {kl:.1f} nats a completion")
    loader: Any = data.predict_dataloader()
    asked = [prompt for batch in loader for prompt in batch.messages]
    order = sorted(range(len(rises)), key=rises.__getitem__)
    chosen = [asked[order[len(order) * quarter // 4]] for quarter in (1, 2, 3)]
    _show_export(options, module, chosen, sum(r > 0 for r in rises), len(rises))


def _show_export(options: argparse.Namespace, module: Any, prompts: Sequence[Any], risen: int, count: int) -> None:
    """The exported policy beside the model before it: both loaded and run by plain transformers.

    Raises:
        RuntimeError: The export is not the policy that was trained.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lightning_rlhf.models import load_reward_model

    folders = {"before": _left(options, "sft"), "after ": _left(options, "ppo")}
    models = {when: AutoModelForCausalLM.from_pretrained(folder).eval() for when, folder in folders.items()}
    tokenizer: Any = AutoTokenizer.from_pretrained(folders["after "])
    judge: Any = load_reward_model(_left(options, "reward"), needs_head=True).eval()

    def encoded(prompt: Any) -> Any:
        found: Any = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return found["input_ids"]

    with torch.no_grad():
        ids = encoded(prompts[0])
        with module.policy.native_attention() as policy:
            trained = policy(ids.to(module.device)).logits.cpu()
        apart = (models["after "](ids).logits - trained).abs().max().item()
        if not apart < 1e-2:
            raise RuntimeError(f"{folders['after ']} is not the policy that was trained: logits differ by {apart:.2g}.")
        print(f"\n   {folders['after ']} loaded by plain transformers: logits within {apart:.0e} of the policy's.")
        print(
            "   Its greedy answers, and their rewards, beside those of the model before. The three prompts are those at"
        )
        print(f"   the quartiles of the rise, of {count} prompts, of which {risen} rose:")
        for prompt in prompts:
            ids = encoded(prompt)
            print(f"\n   {_line_of(prompt[-1]['content'])}")
            for when, model in models.items():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=options.new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                )
                reward = judge(out).logits.item() - judge.config.score_offset
                text: Any = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
                print(f"   {when} {reward:6.2f}  {_line_of(text)}")


# ---------------------------------------------------------------------------------------------------------------- parts


def _begin(options: argparse.Namespace, stage: str, steps: int, **settings: Any) -> tuple[Any, Any]:
    """The Trainer of a stage, and its adapters."""
    import lightning.pytorch as L
    from lightning.pytorch.loggers import CSVLogger

    from lightning_rlhf import HFExport, LoRA, SampleCompletions, SaveOnInterrupt
    from lightning_rlhf.callbacks import Report

    L.seed_everything(0, verbose=False)
    folder = options.output / stage
    answers = SampleCompletions(PROMPTS, max_new_tokens=40, every_n_steps=max(1, steps))
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=steps,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=CSVLogger(folder, name="log"),
        default_root_dir=folder,
        callbacks=[
            HFExport(str(folder / "hf"), when="end", adapter_only=stage == "reward"),
            *([] if stage == "reward" else [answers]),  # which answers nothing
            Report(options.output / "report.html", "RLHF of a small model", append=stage != "sft"),
            SaveOnInterrupt(advice=f"To begin this stage again: {_again(options, stage)}"),
        ],
        **settings,
    )
    return trainer, LoRA(r=16, alpha=32)


def _fit(trainer: Any, module: Any, data: Any, source: str) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Trains between two measurements of the held-out rows."""
    before = trainer.validate(module, data, verbose=False)
    if not before:
        sys.exit(f"{source} has too few rows: none was held out. Give at least 50.")
    trainer.fit(module, data)
    return before[0], trainer.validate(module, data, verbose=False)[0]


def _left(options: argparse.Namespace, stage: str) -> Path:
    """What a stage exported."""
    from lightning_rlhf.utils.filesystem import COMPLETE

    folder: Path = options.output / stage / "hf" / "last"
    if not (folder / COMPLETE).is_file():
        sys.exit(f"There is no {folder}: run `lightning-rlhf demo {stage}` first, with the same --output.")
    return folder


def _again(options: argparse.Namespace, stage: str) -> str:
    """What runs a stage and those that follow it."""
    left = [name for name in STAGES[STAGES.index(stage) :] if name in (options.stages or STAGES)]
    return f"lightning-rlhf demo {' '.join(left)}, with the same options"


def _bundled_english() -> str:
    """A model of the demo's size answers Chinese prompts with nonsense, whose rewards say nothing."""
    return str(importlib.resources.files("lightning_rlhf.data") / "bundled" / "instructions.en.jsonl")


def _adamw(lr: float) -> Any:
    from torch.optim import AdamW

    return lambda params: AdamW(params, lr=lr, weight_decay=0.0)


def _line(metrics: Mapping[str, float], *names: str) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {metrics[f'val/{name}']:.3f}" for name in names)


def _line_of(text: str) -> str:
    """A text in one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:99]}…"
