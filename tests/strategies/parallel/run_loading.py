"""What a rank holds of a model while it loads and cuts it.

    python run_loading.py MODEL_DIR OUT_DIR AXIS

AXIS is ``tp`` or ``pp``. Each rank writes to OUT_DIR/rankN.json how much memory it alone had, in bytes: before the
model was loaded, while the whole model was tried before it is cut, and when training began; and whether the weights of
all ranks are together those of the file.
"""

import json
import os
import sys
from pathlib import Path

import lightning.pytorch as L
import torch
from safetensors.torch import load_file

from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.models import Policy
from lightning_rlhf.models.loading import load_causal_lm
from lightning_rlhf.strategies import ColossalAIStrategy

torch.set_num_threads(1)


def own_memory():
    """Resident memory of this process that is no map of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


class Loaded(L.LightningModule):
    def __init__(self, model_dir):
        super().__init__()
        self.memory = {"before": own_memory()}
        self.file = Path(model_dir) / "model.safetensors"
        self.policy = Policy(load_causal_lm(model_dir, dtype="float32"))
        self.policy.transformer.register_forward_pre_hook(self.note)
        self.policy.transformer.model.register_forward_pre_hook(self.note)

    def note(self, *call):
        self.memory.setdefault("whole", own_memory())

    def on_train_start(self):
        self.memory["cut"] = own_memory()
        self.memory["wrapped"] = self.trainer.strategy.model is not self
        found = self.trainer.strategy.whole_state_dict(exact=True)
        want = load_file(self.file)
        own = {name.removeprefix("policy.model."): value for name, value in found.items()}
        self.memory["equal"] = not found or all(torch.equal(own[name], value) for name, value in want.items())
        self.trainer.should_stop = True

    def training_step(self, batch, batch_idx):
        return self.policy(batch, weights=batch.weight).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader([pack([Tree([3, 4], [Branch([5, 6])])])] * 2, batch_size=None)


def main(model_dir, out, axis):
    module = Loaded(model_dir)
    if os.environ["LOCAL_RANK"] == "1":  # what it has of its own gives way to the first rank's
        module.policy.transformer.model.layers[5].input_layernorm.weight.data.fill_(3.0)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=ColossalAIStrategy("ddp", **{axis: 2}), max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
    )  # fmt: skip
    trainer.fit(module)
    (Path(out) / f"rank{trainer.global_rank}.json").write_text(json.dumps(module.memory))


if __name__ == "__main__":
    main(*sys.argv[1:])
