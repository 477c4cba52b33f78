"""Win rates of a run of two processes, on DDP or FSDP.

    python run_win_rate.py MODEL_DIR OUT_DIR '{"strategy": "fsdp"}'

Writes to OUT_DIR what the callback writes, and rankN.json: what rank N knows of it.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import torch
from run_callbacks import ROWS, FSDPOnCPU
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_rlhf import InstructionDataModule, LoRA, MeasureWinRate, SFTModule

torch.set_num_threads(1)


def letters(prompts, completions):
    """More different characters are better."""
    return [len(set(c)) for c in completions]


def run(model_dir, out, strategy="ddp", devices=2):
    L.seed_everything(0, verbose=False)
    out = Path(out)
    chosen = FSDPOnCPU(auto_wrap_policy={LlamaDecoderLayer}) if strategy == "fsdp" else strategy
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out, num_sanity_val_steps=0,
        strategy=chosen if devices > 1 else "auto",
        callbacks=[
            MeasureWinRate(letters, prompts=[f"Say {i}" for i in range(5)], max_new_tokens=6, temperature=0.7),
            MeasureWinRate(letters, model_dir, prompts=["Say 1"], max_new_tokens=4, name="other"),
        ],
    )  # fmt: skip
    module = SFTModule(model_dir, lora=LoRA(r=4), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    trainer.fit(module, InstructionDataModule(ROWS, batch_size=8, val_fraction=0.3, cache_dir=out / "cache"))
    known = {name: value.item() for name, value in trainer.callback_metrics.items() if "win_rate" in name}
    baseline = [list(answer) for answer in trainer.callbacks[1]._baseline]
    (out / f"rank{trainer.global_rank}.json").write_text(json.dumps([known, baseline]))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
