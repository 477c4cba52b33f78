"""Results, speed and memory on one CUDA card: fine-tuning, PPO, decoding, and ColossalAI's offloading.

    pip install -e '.[colossalai]'
    python benchmarks/gpu.py --check                 # is all right? in 2 minutes: benchmarks/gpu_checks.py
    python benchmarks/gpu.py --all --minutes 8       # the same, then all figures, the least valuable last
    python benchmarks/gpu.py                         # all recipes, one table
    python benchmarks/gpu.py ppo_120m                # one of them
    python benchmarks/gpu.py --peak-tflops 312       # on a card that is not in the list
    python benchmarks/gpu.py --cpu-smoke             # the same code at toy size on a CPU: shows only that it runs

--check and --all add a line of JSON for each step to --out as it comes. A step runs in a process of its own, with a
time that it may take, so that a fault costs that step alone; where --minutes are over, the rest is noted as "no time".

Each recipe trains a random Llama of its own size in a process of its own, on made-up rows of one length, in bf16. A 7B
is written to disk first, and loaded from there as a user's is. The figures are of the steps after a warm-up, by the
clock, with the card's queue emptied at the end of each step. Tokens are those of the rows, prompts and answers; PPO
passes over them once a step, after it sampled the answers.

"peak GB" is torch.cuda.max_memory_allocated from the loading of the model on, in 10^9 bytes. "MFU" is 6 N
operations a token, N being all parameters of the model, over what the card can do at most (dense bf16). It leaves out
attention, and of PPO sampling, reference, critic and measuring passes, so PPO's is low by what it does besides.

Recipes:
    sft             SFTModule, all weights of a 1B at 2,048 tokens, bf16-mixed by autocast
    sft_compile     the same, compiled by torch.compile
    ppo             PPOModule, adapters for policy and critic on one shared backbone in bf16
    ppo_120m        the same with 120 million parameters and short rows; ColossalChat claimed 1.62 GB for such a PPO
    ppo_7b_nf4      ppo of a 7B by QLoRA
    sft_7b_lora     SFTModule, adapters on a 7B in bf16, 4 rows of 2,048 tokens
    zero2_offload   SFTModule under colossalai_zero2_offload: optimizer states and fp32 weights in the CPU's memory
    gemini_offload  the same under colossalai_gemini_offload: bf16 weights lie there too
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import common
import lightning.pytorch as L
import schedule
import torch
from common import BenchmarkParser, Meter
from memory import first_letters
from sft import word_tokenizer
from sharding import num_parameters
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_rlhf import (
    InstructionDataModule,
    Load,
    LoRA,
    PPOModule,
    PromptDataModule,
    Rollout,
    Sampling,
    SFTModule,
    Updates,
)
from lightning_rlhf.data.templates import set_chat_template
from lightning_rlhf.models.loading import Dtype
from lightning_rlhf.models.quantization import Quantization

#: Dense bf16 operations a second in 10^12, as the maker says, by words of the card's name; the first that fits.
PEAKS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
COLUMNS = ("recipe", "parameters", "tokens / s", "MFU", "peak GB", "goal")
HEAD = 64
"""Width of an attention head."""


class Recipe(NamedTuple):
    """What is trained, and how.

    Attributes:
        stage: ``sft`` or ``ppo``.
        strategy: The Trainer's.
        precision: The Trainer's.
        width: Of the Llama.
        layers: Of the Llama.
        rows: Of a step.
        length: Tokens of a row's prompt.
        new: Tokens of its answer.
        checkpointing: Of gradients.
        from_disk: Adapters are trained, on weights that are loaded from a directory in bf16.
        quantization: Of these weights.
        compiled: The policy is compiled.
        goal: Memory that it should need at most, in GB.
        mfu: What it should reach.
    """

    stage: str
    strategy: str = "auto"
    precision: str = "bf16-mixed"
    width: int = 1024
    layers: int = 24
    rows: int = 8
    length: int = 384
    new: int = 128
    checkpointing: bool = False
    from_disk: bool = False
    quantization: Quantization | None = None
    compiled: bool = False
    goal: float | None = None
    mfu: float | None = None


_1B = Recipe("sft", width=2048, layers=18, rows=4, length=1024, new=1024, mfu=0.45)
_7B = Recipe("ppo", width=4096, layers=32, checkpointing=True, from_disk=True)
RECIPES = {
    "sft": _1B,
    "sft_compile": _1B._replace(compiled=True, mfu=0.5),
    "ppo": Recipe("ppo", rows=32, checkpointing=True),
    "ppo_120m": Recipe("ppo", width=768, layers=10, length=96, new=32, checkpointing=True, goal=1.0),
    "ppo_7b_nf4": _7B._replace(quantization="nf4", goal=24.0),
    "sft_7b_lora": _7B._replace(stage="sft", rows=4, length=1024, new=1024, goal=40.0),
    "zero2_offload": Recipe("sft", "colossalai_zero2_offload", checkpointing=True),
    "gemini_offload": Recipe("sft", "colossalai_gemini_offload", checkpointing=True),
}
#: What --check and --all run, by where it is, in this order; the least valuable last.
CHECKS = ("card", "trees", "greedy", "static", "ppo", "exports", "resume")
SHARDED_CHECKS = ("zero2", "zero2_offload", "gemini", "gemini_offload", "gemini_auto")
FIGURES = (
    "decode", "sft", "groups", "head", "ppo_120m", "sft_compile", "serve_4bit", "ppo_7b_nf4", "sft_7b_lora", "ppo",
)  # fmt: skip
LARGE = ("serve_4bit", "ppo_7b_nf4", "sft_7b_lora")
SHARDED_FIGURES = ("zero2_offload", "gemini_offload")
#: Seconds that a step may take: writing a 7B and reading it takes a minute, and ColossalAI's optimizers are compiled at
#: their first use.
LONGEST, LONGEST_7B, LONGEST_SHARDED = 90.0, 150.0, 240.0
#: How many times as long it may take on a CPU that has other work.
PATIENCE = 5
#: Just large enough for Gemini to make chunks of.
SMOKE = {"width": HEAD, "layers": 1, "rows": 2, "length": 6, "new": 4, "vocab_size": 8192, "steps": 2, "warmup": 1}


def recipe_of(options: argparse.Namespace, name: str) -> Recipe:
    """The recipe, but for what the command line says."""
    given = {key: getattr(options, key) for key in ("width", "layers", "rows", "length", "new")}
    return RECIPES[name]._replace(**{key: value for key, value in given.items() if value is not None})


def model_config(recipe: Recipe, vocab_size: int) -> LlamaConfig:
    return common.llama_config(vocab_size, recipe.width, recipe.layers, heads=max(1, recipe.width // HEAD))


# ---------------------------------------------------------------------------------------------- one measurement


class Clock(Meter):
    """By the clock, with the card's peak of memory; on a CPU that of resident memory."""

    def step(self, tokens: int, loss: Tensor) -> None:
        """To be called at the end of every step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.losses.append(loss.detach())
        if len(self.losses) == self.warmup:
            self.started = time.perf_counter()
        elif len(self.losses) > self.warmup:
            self.tokens += tokens
            self.seconds = time.perf_counter() - self.started

    def finish(self) -> None:
        """To be called after the last step."""
        super().finish()
        if torch.cuda.is_available():
            self.extra_mib = torch.cuda.max_memory_allocated() / 2**20
        if not all(map(math.isfinite, self.losses)):
            raise RuntimeError(f"What was trained is worth nothing: its losses are {self.losses}.")


class Watch(common.Watch):
    """Reads a clock from inside the Trainer; of an iteration of PPO the score stands for a loss."""

    def __init__(self, meter: Meter, tokens: int) -> None:
        super().__init__(meter)
        self.tokens = tokens

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is done."""
        found = trainer.callback_metrics
        self.meter.step(self.tokens, found["train/score"] if "train/score" in found else outputs["loss"])


def adamw(parameters: Iterable[Any]) -> torch.optim.AdamW:
    """Leaves its states to the strategy, which may split or offload them."""
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)


def make_rows(recipe: Recipe, vocab_size: int, steps: int) -> list[dict[str, str]]:
    """Prompts and answers of the recipe's lengths, the end token counted."""
    draw = random.Random(0)

    def text(tokens: int) -> str:
        return " ".join(f"w{draw.randrange(2, vocab_size)}" for _ in range(tokens))

    count = recipe.rows * steps
    return [{"prompt": text(recipe.length), "completion": f" {text(recipe.new - 1)}"} for _ in range(count)]


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM | Path:
    """The model, or the directory from which it is loaded."""
    config = model_config(recipe, len(tokenizer))
    if recipe.from_disk:
        return common.write_llama(config, tokenizer, folder / "model")
    return common.random_llama(config)


def load_of(recipe: Recipe) -> Load:
    """How the model is held."""
    dtype: Dtype = "bfloat16" if recipe.from_disk else "float32"
    return Load(dtype=dtype, quantization=recipe.quantization, gradient_checkpointing=recipe.checkpointing)


def make_sft(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]], cache: Path
) -> tuple[L.LightningModule, L.LightningDataModule]:
    module = SFTModule(
        make_model(recipe, tokenizer, cache),
        tokenizer,
        lora=LoRA(r=16, alpha=32) if recipe.from_disk else None,
        load=load_of(recipe),
        optimizer=adamw,
        lr_scheduler=common.constant,
    )
    return module, InstructionDataModule(
        rows, batch_size=recipe.rows, val_fraction=0.0, cache_dir=cache, tokenizer=tokenizer
    )


def make_ppo(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]], cache: Path
) -> tuple[L.LightningModule, L.LightningDataModule]:
    model = make_model(recipe, tokenizer, cache)
    module = PPOModule(
        model if isinstance(model, Path) else model.to(torch.bfloat16),  # frozen; adapters are fp32
        first_letters,
        tokenizer=tokenizer,
        lora=LoRA(r=16, alpha=32),
        rollout=Rollout(sampling=Sampling(max_new_tokens=recipe.new, min_new_tokens=recipe.new)),
        updates=Updates(epochs=1, micro_batch_tokens=max(8, recipe.rows // 4) * (recipe.length + recipe.new)),
        load=load_of(recipe),
        optimizer=adamw,
        lr_scheduler=common.constant,
    )
    prompts = [{"prompt": row["prompt"]} for row in rows]
    return module, PromptDataModule(
        prompts, as_text=True, batch_size=recipe.rows, val_fraction=0.0, cache_dir=cache, tokenizer=tokenizer
    )


def work(options: argparse.Namespace) -> None:
    """One measurement, in this process."""
    if options.cpu_smoke:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ColossalAI's CPU mode wants no card to be there
    # offloaded optimizers step on the CPU; the others hardly use it
    torch.set_num_threads(1 if options.cpu_smoke else os.cpu_count() or 1)
    recipe, meter = recipe_of(options, options.worker), Clock(options.warmup)
    tokenizer = word_tokenizer(options.vocab_size)
    set_chat_template(tokenizer, "plain")
    steps = options.warmup + options.steps
    rows = make_rows(recipe, options.vocab_size, steps)
    make = {"sft": make_sft, "ppo": make_ppo}[recipe.stage]
    with tempfile.TemporaryDirectory() as folder:
        trainer = common.make_trainer(
            steps,
            Watch(meter, recipe.rows * (recipe.length + recipe.new)),
            accelerator="cpu" if options.cpu_smoke else "gpu",
            devices=1,
            strategy=recipe.strategy,
            precision=recipe.precision,
        )
        module, data = make(recipe, tokenizer, rows, Path(folder))
        if recipe.compiled:
            module.configure_model()
            policy: Any = module.policy
            policy.compile(backend="eager" if options.cpu_smoke else "inductor")
        trainer.fit(module, data)
    meter.finish()
    common.report(meter)


# ---------------------------------------------------------------------------------------------- command


def peak_of(card: str) -> float | None:
    """Most operations a second of a card, in 10^12; None where it isn't listed."""
    words = set(re.findall(r"\w+", card))
    return next((peak for name, peak in PEAKS.items() if words >= set(name.split())), None)


def row(name: str, recipe: Recipe, parameters: int, meter: Meter, peak_tflops: float | None) -> list[str]:
    """A row of the table; without a peak, which is a CPU's, neither MFU nor the card's memory."""
    line = [name, f"{parameters:,}", f"{meter.speed:,.0f}", "", "", ""]
    if peak_tflops is not None:
        memory, mfu = meter.extra_mib * 2**20 / 1e9, 6 * parameters * meter.speed / (peak_tflops * 1e12)
        line[3:5] = [f"{mfu:.1%}", f"{memory:.2f}"]
        goals = []
        if recipe.goal is not None:
            over = memory - recipe.goal
            goals.append(f"{recipe.goal} GB " + ("met" if over <= 0 else f"over by {over:.2f} GB"))
        if recipe.mfu is not None:
            short = recipe.mfu - mfu
            goals.append(f"MFU {recipe.mfu:.0%} " + ("met" if short <= 0 else f"short by {short:.1%}"))
        line[5] = ", ".join(goals)
    return line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    sizes = dict.fromkeys(("steps", "warmup", "rows", "length", "new", "width", "layers", "vocab_size"))
    parser = BenchmarkParser(__doc__, RECIPES, **sizes)
    parser.add_argument("recipes", nargs="*", help=f"some of {', '.join(RECIPES)}; default: all")
    parser.add_argument("--cpu-smoke", action="store_true", help="toy size on a CPU, without MFU and memory")
    parser.add_argument("--check", action="store_true", help="check results alone, as JSON lines")
    parser.add_argument("--all", action="store_true", help="check results, then measure all, as JSON lines")
    parser.add_argument("--minutes", type=float, help="time for --check (default 2) or --all (default 8)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu.jsonl"), help="file of their lines; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peak-tflops", type=float, help="peak of the card in dense bf16, 10^12 operations per second")
    options = parser.parse(arguments)
    if unknown := [name for name in options.recipes if name not in RECIPES]:
        parser.error(f"There is no recipe {', '.join(unknown)}. Choose from {', '.join(RECIPES)}.")
    if options.check + options.all + bool(options.recipes) > 1:
        parser.error("Choose one of --check, --all and recipes.")
    if options.minutes is not None and not (options.check or options.all):
        parser.error("--minutes belongs to --check or --all.")
    options.recipes = options.recipes or list(RECIPES)
    for name, value in (SMOKE if options.cpu_smoke else {"steps": 10, "warmup": 3, "vocab_size": 32_000}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def find_peak(options: argparse.Namespace) -> float | None:
    """Of the card; exits where there is none, or where nothing is known of it."""
    if options.cpu_smoke:
        return None
    if not torch.cuda.is_available():
        sys.exit(
            "This benchmark needs a CUDA card, and torch sees none here. --cpu-smoke runs the same code at toy size on "
            "the CPU, which shows only that it runs."
        )
    card = torch.cuda.get_device_name()
    peak = options.peak_tflops or peak_of(card)
    if peak is None:
        sys.exit(f"How fast a {card} can be is not in the list: give --peak-tflops, its dense bf16 10^12 operations/s.")
    print(f"{card}, {peak:g} * 10^12 operations a second.\n")
    return peak


def steps_of(options: argparse.Namespace) -> list[schedule.Step]:
    """The steps of --check or --all."""
    smoke = ["--cpu-smoke"] * options.cpu_smoke
    peak = [] if options.peak_tflops is None else ["--peak-tflops", str(options.peak_tflops)]
    here = Path(__file__)

    patience = PATIENCE if options.cpu_smoke else 1

    def check(name: str, longest: float) -> schedule.Step:
        return schedule.Step(name, schedule.python(here.with_name("gpu_checks.py"), name, *smoke), patience * longest)

    def measure(name: str, longest: float) -> schedule.Step:
        if name not in RECIPES:
            return check(name, longest)
        command = schedule.python(here, name, "--json", *smoke, *peak)
        return schedule.Step(f"{name}, figures", command, patience * longest)

    found = [check(name, LONGEST) for name in CHECKS]
    found += [measure(name, LONGEST_7B if name in LARGE else LONGEST) for name in FIGURES if options.all]
    # placement "auto" measures the card's memory
    found += [check(name, LONGEST_SHARDED) for name in SHARDED_CHECKS if not (options.cpu_smoke and "auto" in name)]
    return found + [measure(name, LONGEST_SHARDED) for name in SHARDED_FIGURES if options.all]


def run_all(options: argparse.Namespace) -> None:
    """Runs the steps; exits with 1 if one was not right."""
    minutes = options.minutes if options.minutes is not None else 8.0 if options.all else 2.0
    found = schedule.run_steps(steps_of(options), minutes, options.out)
    wrong = [f"{line['step']} ({line['status']})" for line in found if line["status"] in ("failed", "timeout")]
    print(f"{sum(line['status'] == 'ok' for line in found)} of {len(found)} steps are ok: {options.out}")
    if wrong:
        sys.exit(f"Not right: {', '.join(wrong)}.")


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the table."""
    options = parse(arguments)
    if options.worker:
        work(options)
        return
    peak = find_peak(options)
    if options.check or options.all:
        run_all(options)
        return
    passed = ["steps", "warmup", "rows", "length", "new", "width", "layers", "vocab_size"]
    flags = common.flags(options, passed) + ["--cpu-smoke"] * options.cpu_smoke
    lines = []
    for name in options.recipes:
        recipe = recipe_of(options, name)
        meter = common.measure(__file__, ["--worker", name, *flags])
        parameters = num_parameters(model_config(recipe, options.vocab_size))
        lines.append(row(name, recipe, parameters, meter, peak))
        if options.json:
            schedule.say({k: v for k, v in zip(COLUMNS[1:], lines[-1][1:], strict=True) if v})
        print(f"{name}: {meter.speed:,.0f} tokens a second", file=sys.stderr, flush=True)
    print(common.markdown(lines, COLUMNS))


if __name__ == "__main__":
    main()
