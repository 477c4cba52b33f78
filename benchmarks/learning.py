"""Learning results: what each stage learns on small real models.

    python benchmarks/learning.py sft_smollm2            # seeds 0, 1, 2; a table, and a line a run in results/
    python benchmarks/learning.py sft_stories260k --seeds 0

Settings and seeds stand in this file and were committed before the runs that the README reports. Every finished run
adds a line to ``benchmarks/results/learning.jsonl``; none is left out.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from lightning_rlhf import InstructionDataModule, LoRA, SFTModule
from lightning_rlhf.models.pretrained import obtain

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "learning.jsonl"
ASSETS = Path(os.environ.get("LIGHTNING_RLHF_ASSETS", ROOT.parent / "shared"))


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
    module = SFTModule(
        ASSETS / "models" / "stories260K",
        chat_template="plain",
        optimizer=lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=0.01),
    )
    english = importlib.resources.files("lightning_rlhf.data") / "bundled" / "instructions.en.jsonl"
    data = InstructionDataModule(str(english), batch_size=8, max_length=512, on_bad_row="skip", seed=seed)
    return _held_out(module, data, epochs=10, max_steps=max_steps)


def _held_out(module: SFTModule, data: InstructionDataModule, epochs: int, max_steps: int) -> dict[str, Any]:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        max_steps=max_steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=ROOT / "runs" / "learning",
    )

    def measure() -> dict[str, float]:
        # a Trainer of its own: the training one is told to validate nothing
        judge = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
        found = judge.validate(module, data, verbose=False)[0]
        return {name: found[f"val/{name}"] for name in ("loss", "perplexity", "token_accuracy")}

    before = measure()
    trainer.fit(module, data)
    after = measure()
    shown = {
        f"{name} {when}": values[name] for name in before for when, values in (("before", before), ("after", after))
    }
    return {"steps": trainer.global_step, **shown}


STUDIES: dict[str, Callable[..., dict[str, Any]]] = {f.__name__: f for f in (sft_smollm2, sft_stories260k)}


def main() -> None:
    """Runs a study for each seed, and prints every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=-1, help="cut short, to try it; such runs are not recorded")
    options = parser.parse_args()
    study = STUDIES[options.study]
    print(f"{options.study}: {study.__doc__}")
    rows = []
    for seed in options.seeds:
        L.seed_everything(seed, verbose=False)
        began = time.process_time()
        found = study(seed, options.max_steps)
        rows.append({"seed": seed, **found, "CPU seconds": time.process_time() - began})
        print(json.dumps(rows[-1]), flush=True)
        if options.max_steps < 0:
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps({"study": options.study, **rows[-1]}) + "\n")
    print(f"\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(f'{v:.3f}' if isinstance(v, float) else str(v) for v in row.values())} |")


if __name__ == "__main__":
    main()
