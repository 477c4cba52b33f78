"""``lightning-rlhf demo``: RLHF of a small real model on the bundled data, from end to end."""

from __future__ import annotations

import argparse
import importlib.resources
import re
import statistics
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_rlhf.arguments import Parser, did_you_mean

if TYPE_CHECKING:
    from lightning_rlhf.data.formats import Message

STAGES = ("sft", "dpo", "reward", "ppo")
#: Of a step of DPO and of the reward model.
PAIRS = 4
PROMPTS = [
    "Classify the sentiment as positive or negative: 'The battery died after two days.'",
    "Rewrite more politely: Send me the file now.",
    "What is a waterfall?",
]
SENTENCE, JUDGE = "one sentence", "reward model"
#: The parts of PPO's reward. The reward model knows a hundred pairs and is easily fooled, so it has the smaller say.
WEIGHTS = {SENTENCE: 1.0, JUDGE: 0.1}


def main(args: Sequence[str] | None = None) -> None:
    """Fine-tunes SmolLM2-135M-Instruct, then DPO of it, and PPO of it against a reward model; all in one HTML report.

    DPO, reward model and PPO begin with the Hugging Face directory that fine-tuning left, and PPO reads the reward
    model's, so any of them can be run again alone.

    Args:
        args: Command line after ``demo``.
    """
    parser = Parser("demo", main.__doc__)
    known = ", ".join(STAGES)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {known}; default all, in this order")
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="hub id or directory; the default needs no hub"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--train", default="bundled", help="instruction data: file, glob or hub id")
    parser.add_argument("--pairs", default="bundled", help="preference data: file, glob or hub id")
    parser.add_argument(
        "--prompts",
        default=_bundled_questions(),
        help="PPO's prompts: file, glob or hub id; default 128 short questions that come with the package",
    )
    parser.add_argument("--steps", type=int, default=16, help="of fine-tuning: 8 conversations each")
    parser.add_argument("--dpo-steps", type=int, default=12, help=f"of DPO: {PAIRS} pairs each")
    parser.add_argument("--reward-steps", type=int, default=32, help=f"of the reward model: {PAIRS} pairs each")
    parser.add_argument("--iterations", type=int, default=8, help="of PPO: 16 completions each")
    parser.add_argument("--new-tokens", type=int, default=48, help="most tokens of PPO's completions")
    parser.add_argument("--seed", type=int, default=0, help="of new adapters and of PPO's samples")
    options = parser.parse_args(args)
    if unknown := [stage for stage in options.stages if stage not in STAGES]:
        parser.error(f"there is no stage {unknown[0]}{did_you_mean(unknown[0], STAGES)} All: {known}")
    began = time.perf_counter()
    print(f"Everything goes to {options.output}.")
    stages = {"sft": fine_tune, "dpo": prefer, "reward": train_reward_model, "ppo": reinforce}
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
    from lightning_rlhf.models.runs import find_model

    print(f"Supervised fine-tuning by LoRA: {options.steps} steps of 8 conversations", flush=True)
    trainer, lora = _begin(options, "sft", options.steps, gradient_clip_val=1.0)
    module = SFTModule(find_model(options.model), lora=lora, optimizer=_adamw(2e-4))
    data = InstructionDataModule(options.train, batch_size=8)
    before, after = _fit(trainer, module, data, options.train)
    _print_both(before, after, "loss", "perplexity", "token_accuracy")


def prefer(options: argparse.Namespace) -> None:
    """DPO by LoRA: the reference is the model without its adapters, and no reward model is needed."""
    from lightning_rlhf import DPOModule

    print(f"DPO of what that left: {options.dpo_steps} steps of {PAIRS} pairs", flush=True)
    trainer, lora = _begin(options, "dpo", options.dpo_steps, gradient_clip_val=1.0)
    module = DPOModule(_left(options, "sft"), lora=lora, optimizer=_adamw(2e-4))
    _fit_pairs(options, trainer, module, "loss", "accuracy", "margin")


def train_reward_model(options: argparse.Namespace) -> None:
    """A reward model by LoRA, kept as an adapter, so that PPO can share its backbone."""
    from lightning_rlhf import RewardModule

    print(f"A reward model of what fine-tuning left: {options.reward_steps} steps of {PAIRS} pairs", flush=True)
    trainer, lora = _begin(options, "reward", options.reward_steps, gradient_clip_val=1.0)
    module = RewardModule(_left(options, "sft"), lora=lora, optimizer=_adamw(5e-4))
    _fit_pairs(options, trainer, module, "loss", "accuracy")


def reinforce(options: argparse.Namespace) -> None:
    """PPO: policy, reference, critic and reward model are adapters of one backbone."""
    from lightning_rlhf import KL, PPOModule, PromptDataModule, Rollout, Sampling, Shaping, Updates
    from lightning_rlhf.rewards import WeightedReward

    weights = " + ".join(f"{weight} x {name}" for name, weight in WEIGHTS.items())
    print(f"PPO: {options.iterations} iterations of 16 answers. The reward is {weights}", flush=True)
    trainer, lora = _begin(options, "ppo", options.iterations, limit_val_batches=0)
    sources: dict[str, Any] = {SENTENCE: one_sentence, JUDGE: str(_left(options, "reward"))}
    module = PPOModule(
        _left(options, "sft"),
        [WeightedReward(sources[name], weight, name) for name, weight in WEIGHTS.items()],
        lora=lora,
        rollout=Rollout(samples_per_prompt=2, sampling=Sampling(max_new_tokens=options.new_tokens, temperature=0.7)),
        updates=Updates(epochs=2, micro_batch_tokens=2048),
        kl=KL(coef=0.1),
        # the reward model never saw an answer that was cut, and likes such answers: this outweighs it
        shaping=Shaping(missing_eos_penalty=2.0),
        optimizer=_adamw(3e-4),
        seed=options.seed,
    )
    data = PromptDataModule(
        options.prompts, max_length=96, on_bad_row="skip", batch_size=8, val_fraction=0.25, tokenizer=module.tokenizer
    )
    data.setup("validate")
    held_out = [prompt for batch in data.val_dataloader() for prompt in batch.messages]
    if len(held_out) < 3:
        sys.exit(f"{options.prompts} has too few rows: {len(held_out)} held out. Give at least 50.")
    trainer.fit(module, data)
    kl = trainer.callback_metrics["train/kl"].item()
    print(f"   at a KL from where it started of {kl:.1f} nats per completion")
    _show_exports(options, module, held_out)


def one_sentence(prompts: Sequence[object], completions: Sequence[str]) -> list[float]:
    """The part of PPO's reward that a reader can check: 1 where the whole answer is one sentence, else 0."""
    found = (re.fullmatch(r"[A-Z][^.!?\n]{20,}[.!?]", text.strip()) for text in completions)
    return [float(match is not None) for match in found]


class _Answer(NamedTuple):
    text: str  # in one line, with an ellipsis where the length limit cut it
    scores: dict[str, float]

    @property
    def reward(self) -> float:
        return sum(WEIGHTS[name] * score for name, score in self.scores.items())


def _show_exports(options: argparse.Namespace, module: Any, prompts: Sequence[list[Message]]) -> None:
    """What the exported policy and the model before it answer to held-out prompts, and what the rewards say of it."""
    before, after = (_answers(options, stage, prompts, module.stop_token_ids) for stage in ("sft", "ppo"))
    apart = _distance_of_export(options, module, prompts[0])
    print(f"\n   {_left(options, 'ppo')} loaded by plain transformers: logits within {apart:.0e} of the policy's.")
    print(f"   Its greedy answers to {len(prompts)} held-out prompts, beside those of the model before:")
    print(f"   {'mean of':14} before   after    rise (standard error)")
    for name in WEIGHTS:
        first, last = ([answer.scores[name] for answer in found] for found in (before, after))
        print(f"   {name:14} {statistics.fmean(first):6.2f}  {statistics.fmean(last):6.2f}  {_rise(first, last)}")
    order = sorted(range(len(prompts)), key=lambda i: after[i].reward - before[i].reward)
    print("\n   The prompts whose reward rose least, in the middle, and most:")
    for i in (order[0], order[len(order) // 2], order[-1]):
        print(f"\n   {_line_of(prompts[i][-1]['content'])}")
        for when, answer in (("before", before[i]), ("after ", after[i])):
            scores = ", ".join(f"{name} {score:.2f}" for name, score in answer.scores.items())
            print(_paragraph(f"   {when}  ", answer.text))
            print(f"           ({scores})")
    print("\n   No part of the reward knows whether an answer is true: read them for that.")


def _answers(
    options: argparse.Namespace, stage: str, prompts: Sequence[list[Message]], stops: Sequence[int]
) -> list[_Answer]:
    """Greedy answers of what a stage exported, by plain transformers, with their scores.

    They may be longer than in PPO, so that those before can end too: the reward model can only judge whole answers.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lightning_rlhf.data.packed import Branch, Tree, pack
    from lightning_rlhf.models import RewardModel, load_reward_model

    model = AutoModelForCausalLM.from_pretrained(_left(options, stage)).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(_left(options, stage), padding_side="left")
    asked = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    padding = tokenizer.pad_token_id
    out = model.generate(**asked, do_sample=False, max_new_tokens=3 * options.new_tokens, pad_token_id=padding)
    trees, texts, lines = [], [], []
    for tokens, real in zip(out, asked["attention_mask"].bool(), strict=True):
        prompt, answer = tokens[: len(real)][real], tokens[len(real) :]
        ends = torch.isin(answer, torch.tensor(list(stops))).nonzero()
        answer = answer[: ends[0] + 1] if len(ends) else answer
        trees.append(Tree(prompt.tolist(), [Branch(answer.tolist())]))
        texts.append(tokenizer.decode(answer, skip_special_tokens=True))
        lines.append(" ".join(texts[-1].split()) + ("" if len(ends) else " …"))
    judge = RewardModel(load_reward_model(_left(options, "reward"), needs_head=True)).eval()
    with torch.no_grad():
        judged = judge(pack(trees), normalize=True).tolist()
    scores = zip(one_sentence(prompts, texts), judged, strict=True)
    return [_Answer(line, {SENTENCE: x, JUDGE: y}) for line, (x, y) in zip(lines, scores, strict=True)]


def _distance_of_export(options: argparse.Namespace, module: Any, prompt: list[Message]) -> float:
    """The largest difference between the export's logits and the policy's.

    Raises:
        RuntimeError: The export is not the policy that was trained.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _left(options, "ppo")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    with torch.no_grad(), module.policy.native_attention() as policy:
        trained = policy(ids.to(module.device)).logits.cpu()
        apart: float = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits - trained).abs().max().item()
    if not apart < 1e-2:
        raise RuntimeError(f"{folder} is not the policy that was trained: logits differ by {apart:.2g}.")
    return apart


def _rise(before: Sequence[float], after: Sequence[float]) -> str:
    """By how much the mean rose, with its standard error over prompts, and what that says."""
    rises = [last - first for first, last in zip(before, after, strict=True)]
    rise, error = statistics.fmean(rises), statistics.stdev(rises) / len(rises) ** 0.5
    said = "rose" if rise > 0 else "fell"
    said += f" by {abs(rise) / error:.1f} standard errors" if error else " for every prompt alike"
    if abs(rise) < 2 * error or not rise:
        said = "no change that chance does not explain"
    return f"{rise:+.2f} ({error:.2f}): {said}"


# ---------------------------------------------------------------------------------------------------------------- parts


def _begin(options: argparse.Namespace, stage: str, steps: int, **settings: Any) -> tuple[Any, Any]:
    """The Trainer of a stage, and its adapters."""
    import lightning.pytorch as L
    from lightning.pytorch.loggers import CSVLogger

    from lightning_rlhf import HFExport, LoRA, SampleCompletions, SaveOnInterrupt
    from lightning_rlhf.callbacks import Report

    L.seed_everything(options.seed, verbose=False)
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


def _fit_pairs(options: argparse.Namespace, trainer: Any, module: Any, *names: str) -> None:
    """Trains on the pairs, and says what became of the held-out ones."""
    from lightning_rlhf import PreferenceDataModule

    data = PreferenceDataModule(options.pairs, batch_size=2 * PAIRS, val_fraction=0.2)
    before, after = _fit(trainer, module, data, options.pairs)
    _print_both(before, after, *names)
    print(f"   ('the longer answer wins' is right for {after['val/length_accuracy']:.3f} of these pairs)")


def _left(options: argparse.Namespace, stage: str) -> Path:
    """What a stage exported."""
    from lightning_rlhf.models.runs import exports_of

    folder: Path = options.output / stage
    if not (found := exports_of(folder)):
        last = folder / "hf" / "last"
        sys.exit(f"There is no {last}: run `lightning-rlhf demo {stage}` first, with the same --output.")
    return found[0].path


def _again(options: argparse.Namespace, stage: str) -> str:
    """What runs a stage and those that follow it."""
    left = [name for name in STAGES[STAGES.index(stage) :] if name in (options.stages or STAGES)]
    return f"lightning-rlhf demo {' '.join(left)}, with the same options"


def _bundled_questions() -> str:
    """Questions on which a model of the demo's size is at home: what its answers change in can be seen."""
    return str(importlib.resources.files("lightning_rlhf.data") / "bundled" / "questions.en.jsonl")


def _adamw(lr: float) -> Any:
    from torch.optim import AdamW

    return lambda params: AdamW(params, lr=lr, weight_decay=0.0)


def _print_both(before: Mapping[str, float], after: Mapping[str, float], *names: str) -> None:
    for when, found in (("before", before), ("after ", after)):
        values = (f"{name.replace('_', ' ')} {found[f'val/{name}']:.3f}" for name in names)
        print(f"   {when}  {'  '.join(values)}")


def _paragraph(label: str, text: str) -> str:
    """A text of one line as several, behind a label."""
    return textwrap.fill(
        text,
        110,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _line_of(text: str) -> str:
    """A text in one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:99]}…"
