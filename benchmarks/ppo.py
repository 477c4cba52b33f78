"""Speed and memory of PPO, beside TRL's PPOTrainer.

    python -m venv .venv-trl && . .venv-trl/bin/activate && pip install -e . 'trl==1.12.0'
    python benchmarks/ppo.py                     # all cases, one table
    python benchmarks/ppo.py --cases one         # 1 epoch

TRL 1.12.0 is the last release with PPO, so this benchmark wants an environment of its own. Every contestant starts from
the same random Llama (width 256, 4 layers, fp32), critic and reward model of the same size, and makes iterations of the
same prompts: completions of a fixed length, scores, one minibatch, so many epochs; with the same AdamW, rate, clip
ranges, KL penalty and number of steps, on one thread, and without clipping of gradients, which TRL's has not. They take
turns, each time in a process of its own. The figure is CPU seconds a step (an iteration) after a warm-up; "extra MiB"
is the most resident memory during the steps above that with models and optimizers made.

Nothing stops early: of ours the stop token is impossible before the full length, and TRL's is told of none and pads
with a token that its model can't sample. Completions differ, since each draws its own.

Contestants:
    ours       Trainer.fit(PPOModule(...), PromptDataModule(...)): policy, critic, reference, reward model; trained in
               full, old log-probs computed anew in the packed pass
    ours-head  the same, the critic being a head on the policy's hidden states, which begins at 0
    ours-lora  the same with adapters on one shared backbone, and the reward model
    trl        PPOTrainer as it comes, but in fp32 as the others (it would take bf16)
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import common
import lightning.pytorch as L
import torch
from common import OURS, BenchmarkParser, Meter
from sft import word_tokenizer
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from lightning_rlhf import GAE, KL, Critic, LoRA, Loss, PPOModule, PromptDataModule, Rollout, Sampling, Updates

GOAL = 0.6
"""Ours should take at most such a share of TRL's CPU seconds, where every completion has a prompt of its own."""


class Case(NamedTuple):
    """An iteration: passes over its completions, and completions of each prompt."""

    epochs: int
    samples: int

    def __str__(self) -> str:
        several = f", {self.samples} samples a prompt" if self.samples > 1 else ""
        return f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}{several}"


CASES = {"one": Case(1, 1), "four": Case(4, 1), "samples": Case(4, 4)}
KL_COEF, CLIP_RATIO, CLIP_VALUE, VALUE_COEF, GAMMA, LAM = 0.05, 0.2, 0.2, 0.1, 1.0, 0.95
COLUMNS = ("case", "contestant", "CPU s / step", "range", "of TRL's", "extra MiB", "of TRL's", "goal")

# ---------------------------------------------------------------------------------------------- what they train on


class Task(NamedTuple):
    """The same for every contestant.

    Attributes:
        policy: Directory of the policy, with the tokenizer.
        reward: Directory of the reward model, from which the critics start too.
        prompts: As many as all steps take.
        case: What an iteration is.
    """

    policy: Path
    reward: Path
    tokenizer: PreTrainedTokenizerFast
    prompts: list[str]
    case: Case
    options: argparse.Namespace
    meter: Meter

    @property
    def steps(self) -> int:
        """Of the warm-up too."""
        return self.options.warmup + self.options.steps


def make_task(options: argparse.Namespace, folder: Path) -> Task:
    tokenizer = word_tokenizer(options.vocab_size)
    config = common.llama_config(len(tokenizer), options.width, options.layers)
    policy = common.random_llama(config)
    config.num_labels = 1
    reward = LlamaForSequenceClassification(config)
    for name, model in {"policy": policy, "reward": reward}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw, case = random.Random(0), CASES[options.case]
    count = options.completions // case.samples * (options.warmup + options.steps)
    words = [[f"w{draw.randrange(2, options.vocab_size)}" for _ in range(options.length)] for _ in range(count)]
    prompts = list(map(" ".join, words))
    return Task(folder / "policy", folder / "reward", tokenizer, prompts, case, options, Meter(options.warmup))


# ---------------------------------------------------------------------------------------------- contestants


class Watch(common.Watch):
    """Reads a meter from inside our Trainer, an iteration a step."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.meter)
        self.options = task.options

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """An iteration is done; its mean score stands for a loss."""
        found = trainer.callback_metrics
        tokens = self.options.completions * (self.options.length + found["train/length_mean"].item())
        self.meter.step(round(tokens), found["train/score"])


def run_ours(task: Task, lora: LoRA | None = None, kind: Literal["adapter", "head", "separate"] = "separate") -> None:
    options, length = task.options, task.options.new
    start = task.reward if kind == "separate" else None
    module = PPOModule(
        task.policy,
        str(task.reward),
        critic=Critic(start, kind, clip=CLIP_VALUE, loss_coef=VALUE_COEF),
        lora=lora,
        rollout=Rollout(task.case.samples, Sampling(max_new_tokens=length, min_new_tokens=length)),
        updates=Updates(epochs=task.case.epochs, max_grad_norm=None),
        kl=KL(coef=KL_COEF),
        loss=Loss(clip_low=CLIP_RATIO, clip_high=CLIP_RATIO),
        gae=GAE(gamma=GAMMA, lam=LAM),
        optimizer=common.adamw,
        lr_scheduler=common.constant,
    )
    data = PromptDataModule(
        [{"prompt": prompt} for prompt in task.prompts],
        as_text=True,
        batch_size=options.completions // task.case.samples,
        val_fraction=0.0,
        cache_dir=task.policy.parent / "cache",
    )
    common.fit_ours(module, data, task.steps, Watch(task), clip=None)


def run_trl(task: Task) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    options, meter = task.options, task.meter
    tokens = options.completions * (options.length + options.new)

    class WatchTRL(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.ready()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.step(tokens, torch.tensor(trainer.score))

    class Watched(PPOTrainer):
        score: float

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            self.score = logs["objective/scores"]
            super().log(logs, *args, **kwargs)

    rows = [
        {"input_ids": task.tokenizer(prompt).input_ids} for prompt in task.prompts for _ in range(task.case.samples)
    ]
    task.tokenizer.add_special_tokens({"pad_token": "<pad>"})  # beyond the model's vocabulary
    policy = LlamaForCausalLM.from_pretrained(task.policy)
    critic, reward = (AutoModelForSequenceClassification.from_pretrained(task.reward) for _ in range(2))
    optimizer = common.adamw([*policy.parameters(), *critic.parameters()])
    trainer = Watched(
        args=PPOConfig(
            str(task.policy.parent / "trl"),
            per_device_train_batch_size=options.completions,
            total_episodes=len(rows),
            num_ppo_epochs=task.case.epochs,
            response_length=options.new,
            temperature=1.0,
            kl_coef=KL_COEF,
            cliprange=CLIP_RATIO,
            cliprange_value=CLIP_VALUE,
            vf_coef=VALUE_COEF,
            gamma=GAMMA,
            lam=LAM,
            num_sample_generations=0,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=task.tokenizer,
        model=policy,
        ref_model=LlamaForCausalLM.from_pretrained(task.policy),
        reward_model=reward.requires_grad_(False).eval(),
        value_model=critic,
        train_dataset=Dataset.from_list(rows),
        optimizers=(optimizer, common.constant(optimizer)),
        callbacks=[WatchTRL()],
    )
    trainer.train()


CONTESTANTS: dict[str, Callable[[Task], None]] = {
    OURS: run_ours,
    "ours-head": lambda task: run_ours(task, kind="head"),
    "ours-lora": lambda task: run_ours(task, LoRA(r=16, alpha=32), "adapter"),
    "trl": run_trl,
}

# ---------------------------------------------------------------------------------------------- command


def rows(case: Case, found: Mapping[str, list[Meter]], steps: int) -> list[list[str]]:
    """Rows of the table: medians, each over TRL's, and where ours falls short."""
    seconds = {name: [m.seconds / steps for m in meters] for name, meters in found.items()}
    memory = {name: statistics.median(m.extra_mib for m in meters) for name, meters in found.items()}
    lines = []
    for name, each in seconds.items():
        middle = statistics.median(each)
        line = [str(case), name, f"{middle:.2f}", f"{min(each):.2f} to {max(each):.2f}", "", f"{memory[name]:,.0f}"]
        line += ["", ""]
        if name != "trl" and "trl" in found:
            ratio = middle / statistics.median(seconds["trl"])
            line[4], line[6] = f"{ratio:.2f}x", f"{memory[name] / memory['trl']:.2f}x"
            if name == OURS and case.samples == 1:
                line[7] = f"{GOAL}x " + ("met" if ratio <= GOAL else f"over by {ratio - GOAL:.2f}x")
        lines.append(line)
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    sizes = dict(length=96, new=32, vocab_size=1024, width=256, layers=4)
    parser = BenchmarkParser(__doc__, CONTESTANTS, rounds=3, steps=6, warmup=2, **sizes)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--completions", type=int, default=8, help="completions per iteration; default: %(default)s")
    parser.add_argument("--case", choices=CASES, default="one", help=argparse.SUPPRESS)
    options = parser.parse(arguments)
    return options


def work(options: argparse.Namespace) -> None:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(options, Path(folder))
        CONTESTANTS[options.worker](task)
    task.meter.finish()
    common.report(task.meter)


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the table."""
    options = parse(arguments)
    if options.worker:
        work(options)
        return
    places = ("trl", "trl.experimental.ppo")
    if "trl" in options.contestants and not all(map(importlib.util.find_spec, places)):
        sys.exit("There is no TRL with PPO here: pip install 'trl==1.12.0', or choose other --contestants.")
    passed = ["steps", "warmup", "completions", "length", "new", "vocab_size", "width", "layers"]
    flags = common.flags(options, passed)
    lines = []
    for name in options.cases:
        case = CASES[name]
        found = common.alternate(__file__, options.contestants, options.rounds, [*flags, "--case", name], str(case))
        lines += rows(case, found, options.steps)
    print(common.markdown(lines, COLUMNS))


if __name__ == "__main__":
    main()
