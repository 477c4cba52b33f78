"""Exports and samples of a run of two processes, on DDP or FSDP.

    python run_callbacks.py MODEL_DIR OUT_DIR '{"strategy": "fsdp"}'

Writes to OUT_DIR what the callbacks write, and rankN.json: the best value that rank N knows.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_rlhf import HFExport, InstructionDataModule, LoRA, SFTModule
from lightning_rlhf.callbacks import SampleCompletions

torch.set_num_threads(1)
ROWS = [{"prompt": f"Say {i}", "completion": f"{i} " * (1 + i % 3)} for i in range(16)]


class FSDPOnCPU(FSDPStrategy):
    """Sharded over processes without GPUs; the weights need no copy to the CPU, where they are."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)

    def lightning_module_state_dict(self):
        config = FullStateDictConfig(offload_to_cpu=False, rank0_only=True)
        with FullyShardedDataParallel.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, config):
            return self.model.state_dict()


class Module(SFTModule):
    """Logs a metric that gets better on the first rank and worse on the second."""

    def on_validation_epoch_end(self):
        better = self.trainer.current_epoch + 1.0
        value = -better if self.trainer.is_global_zero else 10 + 0.5 * better
        self.log("val/mine", value, rank_zero_only=False, sync_dist=False)


def run(model_dir, out, strategy="ddp"):
    L.seed_everything(0, verbose=False)
    out = Path(out)
    best = HFExport(monitor="val/mine")
    trainer = L.Trainer(
        accelerator="cpu", devices=2, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        strategy=FSDPOnCPU(auto_wrap_policy={LlamaDecoderLayer}) if strategy == "fsdp" else strategy,
        callbacks=[
            best,
            SampleCompletions(["Say 1", "Say 2"], max_new_tokens=4, temperature=0.7),
            HFExport(str(out / "adapters"), when="end", adapter_only=True),
        ],
    )  # fmt: skip
    module = Module(model_dir, lora=LoRA(r=4), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    trainer.fit(module, InstructionDataModule(ROWS, batch_size=8, val_fraction=0.3, cache_dir=out / "cache"))
    (out / f"rank{trainer.global_rank}.json").write_text(json.dumps(best.best))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
