"""Self-instruct by a small model on this machine, and what its rows are worth for fine-tuning.

    python benchmarks/collect.py                       # 200 rows by SmolLM2-135M: yields, CPU minutes, 20 rows unpicked
    python benchmarks/collect.py --rows 1000 --sft     # then fine-tune on them, and on human rows, three seeds

Every finished run adds a line to ``benchmarks/results/collect.jsonl``, whichever side wins.
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
#: 175 English instructions with answers, written by people (Wang et al. 2023).
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
    start = time.process_time()
    with Ledger(folder / "ledger.sqlite") as ledger:
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
            growth.step()
            seconds = time.process_time() - start
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
        "cpu_minutes": round((time.process_time() - start) / 60, 2),
        "seed": plan.seed,
    }


def fine_tune(model: str, rows: Sequence[dict[str, Any]], human: Path, seed: int, folder: Path) -> dict[str, Any]:
    """Held-out loss on human rows: without training, after the grown rows, after as many human rows at most.

    A third of the human rows is held out. The other human rows are passed over so often that both trainings see the
    same number of rows.

    Args:
        model: Name or directory of the model.
        rows: Rows that were grown.
        human: File of human rows.
        seed: Seed of the split, the adapters and the order.
        folder: Folder for files.
    """
    import lightning.pytorch as L

    from lightning_rlhf import InstructionDataModule, LoRA, SFTModule

    read = [{**row.value, "lang": "en"} for row in read_rows(str(human), BadRows())]
    parts = dict(split(read, 1 / 3, 0, lambda row: row["instruction"], seed))
    for name, part in (("held_out", parts["val"]), ("human", parts["train"]), ("grown", rows)):
        write_rows(folder / f"{name}.jsonl", part)
    found: dict[str, Any] = {"study": "sft", "model": model, "seed": seed, "held_out_rows": len(parts["val"])}
    for name, part in (("grown", rows), ("human", parts["train"])):
        L.seed_everything(seed, verbose=False)
        weight = len(rows) / len(part)
        module = SFTModule(obtain(model), lora=LoRA(r=16, alpha=32), optimizer=_adamw)
        data = InstructionDataModule(
            [{"source": str(folder / f"{name}.jsonl"), "weight": weight}],
            val=str(folder / "held_out.jsonl"),
            batch_size=8,
            on_bad_row="skip",
        )
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False, num_sanity_val_steps=0, gradient_clip_val=1.0,
        )  # fmt: skip
        found["untrained"] = trainer.validate(module, data, verbose=False)[0]["val/loss"]
        trainer.fit(module, data)
        found[name] = trainer.validate(module, data, verbose=False)[0]["val/loss"]
        found[f"{name}_rows"] = len(part)
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
    results = [found]
    for block in left_out(growth.counts["en"])[:1]:
        print("\n".join(f"  {step:50s} {number:>8s}  {note}".rstrip() for step, number, note in block.rows))  # type: ignore[union-attr]
    for i in sorted(random.Random(0).sample(range(len(growth.rows)), min(SHOWN, len(growth.rows)))):
        question, answer = (turn["content"] for turn in growth.rows[i]["messages"])
        print(f"\n{growth.rows[i]['id']}  {' '.join(question.split())}\n    {' '.join(answer.split())[:300]}")
    for seed in options.seeds if options.sft else ():
        results.append(fine_tune(options.model, growth.rows, HUMAN, seed, options.out / f"sft-{seed}"))
        print(json.dumps(results[-1]))
    with RESULTS.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)


if __name__ == "__main__":
    main()
