"""Self-instruct by a small model on this machine, and what its rows are worth for fine-tuning.

    python benchmarks/collect.py                       # 200 rows by SmolLM2-135M: yields, CPU minutes, 20 rows unpicked
    python benchmarks/collect.py --rows 1000           # goes on with the same ledger
    python benchmarks/collect.py --sft                 # fine-tunes on the rows, and on as many human ones, three seeds

It may be stopped and started again. Everything that finishes adds a line to ``benchmarks/results/collect.jsonl``,
whichever side wins.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_rlhf.collection.answers import Writing
from lightning_rlhf.collection.card import left_out
from lightning_rlhf.collection.command import filters
from lightning_rlhf.collection.generators import EngineGenerator
from lightning_rlhf.collection.grow import Growth, Plan, split
from lightning_rlhf.collection.seeds import read_seeds
from lightning_rlhf.collection.settings import Settings
from lightning_rlhf.collection.trace import Trace, write_rows
from lightning_rlhf.data.sources import BadRows, read_rows
from lightning_rlhf.endpoint import Ledger
from lightning_rlhf.models.pretrained import SMOLLM2, obtain

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "collect.jsonl"
ASSETS = Path(os.environ.get("LIGHTNING_RLHF_ASSETS", ROOT.parent / "shared"))
#: 175 English instructions, each with an answer or more, written by people (Wang et al. 2023).
HUMAN = ASSETS / "data" / "self_instruct_seed_tasks.jsonl"
SHOWN = 20


def settings(model: str) -> Settings:
    """Those of configs/collect/smollm2.yaml."""
    return Settings(
        EngineGenerator(model, device="cpu"),
        filters=[
            {"Length": {"min_instruction": 4, "max_instruction": 80}},
            *("Script", "Repetition", "Refusal", "MissingInput", "PersonalData", "NearDuplicate"),
        ],
        task_sampling=Writing(0.8, 0.95, 128),
        answer_sampling=Writing(0.5, 0.95, 256),
    )


def collect(model: str, plan: Plan, folder: Path) -> tuple[Growth, dict[str, Any]]:
    """Grows rows, and measures the CPU time of what this process did.

    Args:
        model: Name or directory of the model.
        plan: What to ask for, in English.
        folder: Folder to go on in.

    Returns:
        The growth, and its figures.
    """
    chosen = settings(model)
    assert isinstance(chosen.generator, EngineGenerator)
    seeds = [task for task, _ in read_seeds("bundled", ["en"], BadRows())]
    folder.mkdir(parents=True, exist_ok=True)
    taken = folder.parent / "cpu_seconds.txt"  # by all that is in the ledger, over all runs
    with Ledger(folder.parent / "ledger.sqlite") as ledger:
        growth = Growth(
            plan,
            seeds,
            chosen.generator,
            chosen.generator,
            filters(chosen),
            chosen.task_sampling,
            chosen.answer_sampling,
            Trace(folder / "trace", {**vars(plan), "model": model}),
            ledger,
        )
        while growth.missing:
            start = time.process_time()
            growth.step()
            seconds = float(taken.read_text() if taken.exists() else 0) + time.process_time() - start
            taken.write_text(f"{seconds:.1f}")
            print(f"round {growth.round}: {len(growth.rows)} of {plan.languages['en']} rows, {seconds:.0f} CPU s")
        totals = ledger.totals()
    count = growth.counts["en"]
    return growth, {
        "study": "collect",
        "model": model,
        "rows": count.rows,
        "rounds": growth.round,
        "requests": count.requests,
        "asked": count.asked,
        "tasks": count.tasks,
        "unread": dict(count.unread),
        "dropped": {
            step: {name: found["reasons"] for name, found in tally["filters"].items() if found["reasons"]}
            for step, tally in (("tasks", count.instruction), ("rows", count.row))
        },
        "unanswered": dict(count.unanswered),
        "prompt_tokens": totals.usage.prompt,
        "reply_tokens": totals.usage.completion,
        "cpu_minutes": round(float(taken.read_text()) / 60, 2),
        "seed": plan.seed,
    }


def fine_tune(model: str, rows: Sequence[dict[str, Any]], human: Path, seed: int, folder: Path) -> dict[str, Any]:
    """Held-out loss on human rows: without training, after grown rows, and after as many human rows.

    A third of the human rows is held out. Of the grown rows as many are drawn as there are other human rows; if there
    are twice as many or more, a third training reads all of them.

    Args:
        model: Name or directory of the model.
        rows: Rows that were grown.
        human: File of human rows.
        seed: Seed of the split, of what is drawn, of the adapters and of the order.
        folder: Folder for files.
    """
    import lightning.pytorch as L

    from lightning_rlhf import InstructionDataModule, LoRA, SFTModule

    read = [row.value for row in read_rows(str(human), BadRows())]
    written = [{"instruction": row["instruction"], **row["instances"][0], "lang": "en"} for row in read]
    parts = dict(split(written, 1 / 3, 0, lambda row: row["instruction"], seed))
    count = min(len(parts["train"]), len(rows))
    draw = random.Random(seed)
    trained = {"human": draw.sample(parts["train"], count), "grown": draw.sample(list(rows), count)}
    if len(rows) >= 2 * count:
        trained["all grown"] = list(rows)
    for name, part in (("held out", parts["val"]), *trained.items()):
        write_rows(folder / f"{name}.jsonl", part)
    found: dict[str, Any] = {
        "study": "sft",
        "model": model,
        "seed": seed,
        "rows": len(rows),
        "held out rows": len(parts["val"]),
    }
    for name, part in trained.items():
        L.seed_everything(seed, verbose=False)
        module = SFTModule(obtain(model), lora=LoRA(r=16, alpha=32), optimizer=_adamw)
        data = InstructionDataModule(
            str(folder / f"{name}.jsonl"), val=str(folder / "held out.jsonl"), batch_size=8, on_bad_row="skip"
        )
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False, num_sanity_val_steps=0, gradient_clip_val=1.0,
        )  # fmt: skip
        if "untrained" not in found:
            found["untrained"] = trainer.validate(module, data, verbose=False)[0]["val/loss"]
        trainer.fit(module, data)
        found[name] = trainer.validate(module, data, verbose=False)[0]["val/loss"]
        found[f"{name} rows"] = len(part)
    return found


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-4)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "collect")
    parser.add_argument("--sft", action="store_true", help="fine-tune on the rows, and on human ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    plan = Plan({"en": options.rows}, tasks=4)
    growth, found = collect(options.model, plan, options.out / f"{options.rows}")
    _keep(found)
    for block in left_out(growth.counts["en"])[:1]:
        print("\n".join(f"  {step:50s} {number:>8s}  {note}".rstrip() for step, number, note in block.rows))  # type: ignore[union-attr]
    for i in sorted(random.Random(0).sample(range(len(growth.rows)), min(SHOWN, len(growth.rows)))):
        question, answer = (turn["content"] for turn in growth.rows[i]["messages"])
        print(f"\n{growth.rows[i]['id']}  {' '.join(question.split())}\n    {' '.join(answer.split())[:300]}")
    for seed in options.seeds if options.sft else ():
        found = fine_tune(options.model, growth.rows, HUMAN, seed, options.out / f"sft-{seed}")
        print(json.dumps(found))
        _keep(found)


def _keep(found: dict[str, Any]) -> None:
    """Adds a result to the file, unless it is there."""
    line = json.dumps(found, ensure_ascii=False) + "\n"
    if not RESULTS.exists() or line not in RESULTS.read_text(encoding="utf-8"):
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(line)


if __name__ == "__main__":
    main()
