"""Every stage, evaluation and callback, where some rank has no row, one after the other in one start of processes.

    MASTER_ADDR=127.0.0.1 MASTER_PORT=... WORLD_SIZE=3 NODE_RANK=0 LOCAL_RANK=1 python run_empty_ranks.py \
        MODEL_DIR OUT_DIR '[["ddp", 1], ["ddp", 4]]'

Strategies and numbers of rows are given. A rank writes to OUT_DIR/rankN.json what it came to know by case, and
to OUT_DIR/rankN.txt where it is; a case that takes longer than PATIENCE ends it with its stacks in that file.
"""

import faulthandler
import json
import math
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_rlhf import (
    EMA,
    DPOModule,
    HFExport,
    InstructionDataModule,
    KTOModule,
    LoRA,
    MeasureWinRate,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    Ptx,
    Report,
    RewardModule,
    SampleCompletions,
    Sampling,
    SFTModule,
    UnpairedDataModule,
    WritePredictions,
)
from lightning_rlhf.callbacks import SaveOnInterrupt
from lightning_rlhf.rewards import WeightedReward
from lightning_rlhf.strategies import ColossalAIStrategy

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from grouping import grouped

torch.set_num_threads(1)
PATIENCE = 120
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # Lightning takes the variable away after a run
STRATEGIES = {
    "colossalai_ddp": {"plugin": "ddp", "find_unused_parameters": True},
    "colossalai_zero2": {"plugin": "zero2"},
    "colossalai_gemini": {"plugin": "gemini", "min_chunk_elements": 2048},
}
PPO = ("function", "model", "adapter", "parts")


def letters(prompts, completions):
    """More different characters are better."""
    return [float(len(set(c))) for c in completions]


def length(prompts, completions):
    return [float(len(c)) for c in completions]


def rows(n):
    return [{"prompt": f"Say {i} " + "fox " * i, "chosen": f"{i} dog " * (1 + i), "rejected": "fine"} for i in range(n)]


class Interrupt(L.Callback):
    """A signal on the last rank, which is the first to be without rows, in its second step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class OnRankZero(L.Callback):
    """Logs a metric on the first rank alone, which is to be monitored."""

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.log("zero", 2.0, rank_zero_only=True)


def make(stage, model_dir, out, n):
    """A module, its data, and the metric to watch."""
    data = rows(n)
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in data]
    prompts = [{"prompt": row["prompt"]} for row in data]
    common = dict(optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3))
    files = dict(batch_size=n, eval_batch_size=1, cache_dir=out / "cache")
    if stage == "sft":
        return SFTModule(model_dir, **grouped(**common)), InstructionDataModule(texts, val=texts, **files), "val/loss"
    if stage == "reward":
        files["batch_size"] = 2 * n  # sequences: a pair has two
        module = RewardModule(model_dir, **grouped(lora=LoRA(r=4), **common))
        return module, PreferenceDataModule(data, val=data, **files), "val/loss"
    if stage == "dpo":
        files["batch_size"] = 2 * n
        return DPOModule(model_dir, **grouped(**common)), PreferenceDataModule(data, val=data, **files), "val/loss"
    if stage == "kto":
        # there must be two prompts; the last step of an epoch is one row, and z0 is that of all validation rows
        texts += [{"prompt": "Say it", "completion": "dog"}] if n == 1 else []
        answers = [{**row, "label": i % 2 == 0} for i, row in enumerate(texts)]
        files |= dict(batch_size=len(answers) - 1, eval_batch_size=len(answers))
        return KTOModule(model_dir, **grouped(**common)), UnpairedDataModule(answers, val=answers, **files), "val/loss"
    kind = stage.removeprefix("ppo ")
    reward = {
        "function": letters,
        "model": str(out.parent / "reward model"),
        "adapter": str(out.parent / "reward model adapter"),
        "parts": [WeightedReward(letters, 1.0), WeightedReward(length, 0.5)],
    }[kind]
    ptx = texts if kind == "parts" else None
    module = PPOModule(
        model_dir,
        reward,
        **grouped(
            lora=LoRA(r=4) if kind == "adapter" else None,
            epochs=2,
            minibatches=2,
            scale_scores=n > 1,
            sampling=Sampling(max_new_tokens=6, temperature=0.7),
            kl_target=1.0,
            ptx_coef=0.5 if ptx else 0.0,
            **common,
        ),
    )
    return module, PromptDataModule(prompts, val=prompts, ptx=Ptx(ptx, batch_size=n), **files), "val/score"


def case(stage, strategy, model_dir, out, n):
    """Fit with all callbacks, then validate, test and predict; what came of it."""
    L.seed_everything(0, verbose=False)
    out.mkdir(parents=True, exist_ok=True)
    module, data, monitor = make(stage, model_dir, out, n)
    settings = STRATEGIES.get(strategy)
    callbacks = [
        HFExport(str(out / "hf"), monitor=monitor),
        OnRankZero(),
        HFExport(str(out / "zero"), when="best", monitor="zero"),
        ModelCheckpoint(out / "best", monitor=monitor, save_top_k=1),
        EarlyStopping(monitor, patience=9),
        Report(),
        WritePredictions(),
    ]
    # which sharding strategies refuse: with one row alone, where all that are compared take it
    callbacks += [EMA(0.5)] if n == 1 and strategy in ("one", "ddp", "colossalai_ddp") else []
    if stage != "reward":
        judges = {"letters": letters, "model": str(out.parent / "reward model")}
        callbacks += [SampleCompletions(num_prompts=2, max_new_tokens=4)]
        callbacks += [MeasureWinRate(j, name=name, max_new_tokens=4, temperature=0.7) for name, j in judges.items()]

    def trainer(**options):
        return L.Trainer(
            accelerator="cpu", devices=WORLD, logger=False,
            strategy="auto" if strategy == "one" else strategy if settings is None
            else ColossalAIStrategy(**settings, timeout=timedelta(seconds=PATIENCE)),
            precision="bf16-mixed" if "gemini" in strategy else "32-true",
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=out, **options,
        )  # fmt: skip

    found = {}
    run = trainer(max_steps=2, callbacks=callbacks)
    at(f"{stage}, {strategy}, {n} rows: fit")
    run.fit(module, data)
    found["fit"] = numbers(run.callback_metrics)
    found["best"] = [c.best for c in callbacks if isinstance(c, HFExport)]
    for name in ("validate", "test"):
        at(f"{stage}, {strategy}, {n} rows: {name}")
        found[name] = numbers(getattr(run, name)(module, data, verbose=False)[0])
    at(f"{stage}, {strategy}, {n} rows: predict")
    run.predict(module, data)
    found["predict"] = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return found


def interrupted(strategy, model_dir, out, n):
    """Whether a signal on an empty rank has all ranks save and end."""
    out.mkdir(parents=True, exist_ok=True)
    at(f"interrupt, {strategy}, {n} rows")
    module, data, _ = make("sft", model_dir, out, n)
    trainer = L.Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, max_steps=4, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=out,
        callbacks=[Interrupt(), SaveOnInterrupt()],
    )  # fmt: skip
    try:
        trainer.fit(module, data)
    except BaseException as error:  # however a run says that it was interrupted
        if not isinstance(error, SystemExit | KeyboardInterrupt) and "nterrupt" not in type(error).__name__:
            raise
    return {"step": trainer.global_step, "saved": (out / "interrupted.ckpt").is_file()}


def numbers(metrics):
    """But those of time."""
    found = {name: float(value) for name, value in metrics.items() if "second" not in name}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def at(place):
    """Notes the place, and gives it its time."""
    log.write(f"{place}\n")
    faulthandler.dump_traceback_later(PATIENCE, exit=True, file=log)


def run_all(model_dir, out, runs):
    """What came of each stage under each strategy with so many rows, by name."""
    stages = ["sft", "reward", "dpo", "kto", *(f"ppo {kind}" for kind in PPO)]
    names = {f"{stage}, {strategy}, {n}": (stage, strategy, n) for strategy, n in runs for stage in stages}
    place = {name: out / f"{name.replace(' ', '_')} of {WORLD}" for name in names}
    found = {name: case(stage, strategy, model_dir, place[name], n) for name, (stage, strategy, n) in names.items()}
    faulthandler.cancel_dump_traceback_later()  # it would end the tests, which call this too
    return found


def main(model_dir, out, runs):
    found = run_all(model_dir, Path(out), json.loads(runs))
    found["interrupt"] = interrupted("ddp", model_dir, Path(out) / f"interrupt of {WORLD}", 1)
    faulthandler.cancel_dump_traceback_later()
    (Path(out) / f"rank{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with open(Path(sys.argv[2]) / f"rank{os.environ['LOCAL_RANK']}.txt", "w", buffering=1) as log:
        main(*sys.argv[1:])
