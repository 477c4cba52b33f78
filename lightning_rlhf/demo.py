"""``lightning-rlhf demo``: a small real model, fine-tuned on the bundled data, from end to end."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PROMPTS = [
    "Classify the sentiment as positive or negative: 'The battery died after two days.'",
    "Rewrite more politely: Send me the file now.",
    "用一句话解释什么是机器学习。",
]


def main(args: Sequence[str] | None = None) -> None:
    """Fetches SmolLM2-135M-Instruct, measures it, fine-tunes it by LoRA, measures it again and exports it.

    Args:
        args: Command line after ``demo``.
    """
    parser = argparse.ArgumentParser(prog="lightning-rlhf demo", description=main.__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="hub id or directory; the default needs no hub"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a step")
    parser.add_argument("--train", default="bundled", help="instruction data: file, glob or hub id")
    options = parser.parse_args(args)

    import lightning.pytorch as L
    import torch
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger

    from lightning_rlhf import HFExport, InstructionDataModule, LoRA, SampleCompletions, SFTModule
    from lightning_rlhf.models.pretrained import obtain

    began = time.perf_counter()
    L.seed_everything(0, verbose=False)
    module = SFTModule(
        obtain(options.model),
        lora=LoRA(r=16, alpha=32),
        optimizer=lambda params: torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0),
    )
    data = InstructionDataModule(options.train, batch_size=options.batch_size)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=options.steps,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=CSVLogger(options.output, name="log"),
        default_root_dir=options.output,
        callbacks=[
            HFExport(str(options.output / "hf"), when="end"),
            SampleCompletions(PROMPTS, max_new_tokens=40),
            # Lightning's default bar shows nothing in a file or a pipe
            *([] if sys.stdout.isatty() else [TQDMProgressBar()]),
        ],
    )
    print(f"Everything goes to {options.output}.\n\n1. Held-out loss before training")
    measured = trainer.validate(module, data, verbose=False)
    if not measured:
        sys.exit(f"{options.train} has too few rows: none was held out. Give at least 50.")
    before = measured[0]
    print(f"   {_line(before)}\n\n2. Fine-tuning by LoRA, {options.steps} steps of {options.batch_size} conversations")
    trainer.fit(module, data)
    print("\n3. Held-out loss after training")
    after = trainer.validate(module, data, verbose=False)[0]
    print(f"   before  {_line(before)}\n   after   {_line(after)}")
    print(f"\nDone in {time.perf_counter() - began:.0f} s. The model is an ordinary Hugging Face directory:")
    print(f"   AutoModelForCausalLM.from_pretrained('{options.output / 'hf' / 'last'}')")


def _line(metrics: Mapping[str, float]) -> str:
    names = ("loss", "perplexity", "token_accuracy")
    return "  ".join(f"{n.replace('_', ' ')} {metrics[f'val/{n}']:.3f}" for n in names)
