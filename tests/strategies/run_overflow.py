"""PPO by fp16 under ZeRO-2, with a critic whose gradients overflow in two updates.

    python run_overflow.py MODEL_DIR OUT_DIR

Writes to OUT_DIR/seen.json, for each update, whether it was taken, whether policy and critic moved, and their scales.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

import torch

from lightning_rlhf import PPOModule

spec = importlib.util.spec_from_file_location("run", Path(__file__).with_name("run.py"))
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


class Overflowing(PPOModule):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def gradients(self, experience, chosen, ptx):
        found = super().gradients(experience, chosen, ptx)
        if len(self.seen) in (1, 2):
            critic = next(boosted for boosted in self._sharded.boosted if boosted.path == "critic")
            next(gradient for _, gradient in critic.gradients())[0] = math.inf
        return found

    def update(self, parameters, loss, first):
        before, policy = [p.detach().clone() for p in parameters], len(self.trained()[0])
        taken = super().update(parameters, loss, first)
        moved = [not torch.equal(p, b) for p, b in zip(parameters, before, strict=True)]
        scales = {boosted.path: boosted.scale for boosted in self._sharded.boosted}
        self.seen.append([taken, any(moved[:policy]), any(moved[policy:]), scales["policy"], scales["critic"]])
        return taken


if __name__ == "__main__":
    run.PPOModule = Overflowing
    trainer, module = run.run(
        sys.argv[1], sys.argv[2], "ppo", dict(plugin="zero2", initial_scale=2.0**8), precision="colossalai 16-mixed",
        max_steps=1, lora=True, shared_backbone=False, micro_batch_tokens=None, max_dropped=1,
    )  # fmt: skip
    (Path(sys.argv[2]) / "seen.json").write_text(json.dumps([module.seen, trainer.global_step, module.skipped]))
