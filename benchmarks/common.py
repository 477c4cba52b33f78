"""What the speed benchmarks share: contestants that take turns in processes of their own, and one table of ratios."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(os.environ.get("LIGHTNING_RLHF_ASSETS", ROOT.parent / "shared"))
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
OURS = "ours"
CLIP = 1.0
"""Gradient norm that every contestant clips at."""


# ---------------------------------------------------------------------------------------------- what all train


def llama_config(
    vocab_size: int, width: int = 256, layers: int = 4, heads: int = 4, context: int = 2048
) -> LlamaConfig:
    """A small Llama: MLP 2.69 times as wide as the model, as in the large ones; embeddings and head apart."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=688 * width // 256,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def random_llama(config: LlamaConfig) -> LlamaForCausalLM:
    """The same random weights for every contestant, in fp32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


def write_llama(config: LlamaConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Writes random weights in bf16, made on a card where there is one, whose peak of memory then begins anew."""
    cuda, usual = torch.cuda.is_available(), torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if cuda else "cpu"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return folder


def adamw(params: Iterable[Any], lr: float = 1e-4) -> torch.optim.AdamW:
    """The optimizer of every contestant: PyTorch's fastest AdamW, whose state is there before the first step.

    So that memory above "model and optimizer" is what a step takes, and not the optimizer's moments.
    """
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True)
    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.zeros(()), **moments}
    return optimizer


# ---------------------------------------------------------------------------------------------- one measurement


@dataclass
class Meter:
    """Times the steps of one contestant in this process, from the end of the warm-up.

    Args:
        warmup: Steps before the clock starts.
        tokens: Real tokens of the measured steps; no padding.
        seconds: CPU seconds they took, of all threads of the process.
        losses: Of every step, the warm-up's too.
        extra_mib: Most resident memory during the steps, above that with model and optimizer made.
        sampling: CPU seconds of the measured steps that went to rollouts, where these are timed apart.
    """

    warmup: int
    tokens: int = 0
    seconds: float = 0.0
    extra_mib: float = 0.0
    losses: list[float | Tensor] = field(default_factory=list)
    sampling: float = 0.0
    started: float = field(default=0.0, init=False, repr=False)
    base_mib: float = field(default=0.0, init=False, repr=False)

    def ready(self) -> None:
        """To be called when model and optimizer are made."""
        gc.collect()
        _forget_peak()
        self.base_mib = _memory("VmRSS")

    def step(self, tokens: int, loss: Tensor) -> None:
        """To be called at the end of every step."""
        self.losses.append(loss.detach())
        if len(self.losses) == self.warmup:
            self.started = time.process_time()
        elif len(self.losses) > self.warmup:
            self.tokens += tokens
            self.seconds = time.process_time() - self.started

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """To be put around the rollout of a step."""
        began = time.process_time()
        yield
        if len(self.losses) >= self.warmup:
            self.sampling += time.process_time() - began

    def finish(self) -> None:
        """To be called after the last step."""
        self.extra_mib = _memory("VmHWM") - self.base_mib
        self.losses = [float(loss) for loss in self.losses]

    @property
    def speed(self) -> float:
        """Real tokens a CPU second."""
        return self.tokens / self.seconds


def _memory(name: str) -> float:
    """A line of Linux's account of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {name}.")


def _forget_peak() -> None:
    """Lets the peak of resident memory begin anew: loading libraries and making models has one of its own."""
    Path("/proc/self/clear_refs").write_text("5")


# ---------------------------------------------------------------------------------------------- ours


class Watch(L.Callback):
    """Reads a meter from inside our Trainer.

    Args:
        meter: What is read.
        tokens: Of each step; None counts those of a packed batch.
        metric: Name of what is logged and stands for a loss; None takes the loss of the step.
    """

    def __init__(self, meter: Meter, tokens: int | None = None, metric: str | None = None) -> None:
        self.meter, self.tokens, self.metric = meter, tokens, metric

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Model and optimizer are made."""
        self.meter.ready()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is done."""
        tokens = batch.num_tokens if self.tokens is None else self.tokens
        self.meter.step(tokens, outputs["loss"] if self.metric is None else trainer.callback_metrics[self.metric])


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The same rate at every step, as the others have it."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def make_trainer(steps: int, callback: L.Callback, **settings: Any) -> L.Trainer:
    """One that does nothing but train."""
    return L.Trainer(
        max_steps=steps,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        **settings,
    )


def fit_ours(
    module: L.LightningModule, data: L.LightningDataModule, steps: int, watch: Watch, clip: float | None = CLIP
) -> None:
    """Trains a stage for so many steps under a meter."""
    make_trainer(steps, watch, accelerator="cpu", gradient_clip_val=clip).fit(module, data)


# ---------------------------------------------------------------------------------------------- theirs


def watched(trainer: type[Any], meter: Meter, tokens: Sequence[int]) -> type[Any]:
    """A trainer of TRL that reads a meter: its losses, and so many tokens a step."""
    from transformers import TrainerCallback

    class Watched(trainer):
        loss: Tensor

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            own = self

            class Reader(TrainerCallback):
                def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                    meter.ready()

                def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                    meter.step(tokens[len(meter.losses)], own.loss)

            self.add_callback(Reader())

        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            self.loss = super().compute_loss(*args, **kwargs)
            return self.loss

    return Watched


def require_trl(peers: Iterable[str], without: str) -> None:
    """Ends the run where a peer is TRL's and there is none; ``without`` are the options of a run without it."""
    if any(peer.startswith("trl") for peer in peers) and importlib.util.find_spec("trl") is None:
        sys.exit(f"TRL is not installed: pip install 'lightning_rlhf[bench]', or choose {without}.")


# ---------------------------------------------------------------------------------------------- taking turns


_MARK = "measured: "


def report(meter: Meter) -> None:
    """Hands a finished measurement from a worker process to :func:`measure`."""
    result = {name: value for name, value in asdict(meter).items() if name not in ("started", "base_mib")}
    print(_MARK + json.dumps(result))


#: Help of the options that several benchmarks have; all are whole numbers.
SHARED = {
    "rounds": "rounds in which the contestants take turns; more give a more reliable median",
    "steps": "measured steps per round (PPO: iterations)",
    "warmup": "steps before them that are not measured, at least 1",
    "rows": "rows per step or batch",
    "length": "maximum number of tokens per row, or per prompt if completions are sampled",
    "new": "maximum number of tokens per completion",
    "vocab_size": "size of the vocabulary",
    "width": "hidden size of the random model",
    "layers": "layers of the random model",
}


class BenchmarkParser(argparse.ArgumentParser):
    """The command line of a benchmark.

    Args:
        about: Description, the script's docstring.
        workers: Names that the hidden option ``--worker`` may have. None: there is no such option.
        shared: Defaults of the options of :data:`SHARED` that the benchmark has. None: the default depends on the case.
    """

    def __init__(self, about: str | None, workers: Iterable[str] | None = None, **shared: int | None) -> None:
        super().__init__(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        for name, default in shared.items():
            text = f"{SHARED[name]}; default: {'depends on the case' if default is None else default}"
            self.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=text)
        if workers is not None:
            self.add_argument("--worker", choices=list(workers), help=argparse.SUPPRESS)

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Reads the options, and checks the warm-up."""
        options = self.parse_args(arguments)
        if (warmup := getattr(options, "warmup", None)) is not None and warmup < 1:
            self.error("--warmup must be at least 1, because the clock starts at the end of a step.")
        return options


def flags(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Those of the options that have a value, as a worker's command line."""
    given = {name: getattr(options, name) for name in names}
    return [
        part for n, value in given.items() if value is not None for part in (f"--{n.replace('_', '-')}", str(value))
    ]


def measure(script: str | Path, arguments: Sequence[str]) -> Meter:
    """Runs ``script`` in a fresh single-threaded process, whose output ends with a :func:`report`."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return Meter(**json.loads(lines[-1].removeprefix(_MARK)))


def launch_ranks(
    script: str | Path, arguments: Sequence[str], ranks: int, settings: Mapping[str, str] = ONE_THREAD
) -> list[Any]:
    """Runs ``script``, whose Trainer starts the ranks; what each of them wrote to ``--out`` as ``RANK.json``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), "--out", folder, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
        files = sorted(Path(folder).iterdir(), key=lambda file: int(file.stem))
        if done.returncode or len(files) != ranks:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return [json.loads(file.read_text()) for file in files]


def alternate(
    script: str | Path, contestants: Sequence[str], rounds: int, arguments: Sequence[str], title: str
) -> dict[str, list[Meter]]:
    """Measures A B C A B C ..., each in a process of its own, so that all meet the same state of the machine."""
    found: dict[str, list[Meter]] = {name: [] for name in contestants}
    for i in range(rounds):
        for name in contestants:
            found[name].append(measure(script, ["--worker", name, *arguments]))
            last = found[name][-1]
            print(
                f"{title}, round {i + 1} of {rounds}: {name} {last.speed:.0f} tokens a CPU second, "
                f"{last.extra_mib:.0f} MiB",
                file=sys.stderr,
                flush=True,
            )
    return found


# ---------------------------------------------------------------------------------------------- the table


class Goal(NamedTuple):
    """What ours should reach against a contestant: so many times its speed, at such a share of its memory, or None."""

    speed: float | None
    memory: float | None = None


COLUMNS = (
    "case",
    "contestant",
    "tokens / CPU s",
    "range",
    "ours is",
    "extra MiB",
    "ours needs",
    "loss differs by",
    "goal",
)


def rows(case: str, found: Mapping[str, list[Meter]], goals: Mapping[str, Goal]) -> list[list[str]]:
    """Rows of the table: medians, ours over each contestant, and where ours falls short of a goal."""
    ours = found[OURS]
    lines = []
    for name, meters in found.items():
        speeds = [m.speed for m in meters]
        speed_ratio = _median(m.speed for m in ours) / statistics.median(speeds)
        memory = _median(m.extra_mib for m in meters)
        memory_ratio = _median(m.extra_mib for m in ours) / memory
        other = name != OURS
        lines.append(
            [
                case,
                name,
                f"{statistics.median(speeds):,.0f}",
                f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                f"{speed_ratio:.2f}x" if other else "",
                f"{memory:,.0f}",
                f"{memory_ratio:.2f}x" if other else "",
                f"{loss_difference(ours[0], meters[0]):.1e}" if other else "",
                verdict(goals[name], speed_ratio, memory_ratio) if name in goals else "",
            ]
        )
    return lines


def loss_difference(a: Meter, b: Meter) -> float:
    """Largest difference of the losses of the steps that both made: the same work was done."""
    return max(abs(float(x) - float(y)) for x, y in zip(a.losses, b.losses, strict=False))


def verdict(goal: Goal, speed: float, memory: float) -> str:
    parts = []
    if goal.speed is not None:
        parts.append(f"{goal.speed}x " + ("met" if speed >= goal.speed else f"short by {goal.speed - speed:.2f}x"))
    if goal.memory is not None:
        over = memory - goal.memory
        parts.append(f"memory {goal.memory}x " + ("met" if over <= 0 else f"over by {over:.2f}x"))
    return ", ".join(parts)


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def markdown(lines: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines))
