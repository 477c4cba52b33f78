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
from lightning_rlhf.rl.updater import Updater

spec = importlib.util.spec_from_file_location("run", Path(__file__).with_name("run.py"))
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


class WatchedUpdater(Updater):
    def step(self, parameters, loss, max_grad_norm, count):
        before = {name: [p.detach().clone() for p in group] for name, group in parameters.items()}
        step = super().step(parameters, loss, max_grad_norm, count)
        moved = [
            any(not torch.equal(p, b) for p, b in zip(parameters[name], before[name], strict=True))
            for name in ("policy", "value")
        ]
        scales = {boosted.path: boosted.scale for boosted in self.trainer.strategy.boosted}
        self.module.seen.append([step.outcome == "taken", *moved, scales["policy"], scales["critic"]])
        return step


class Overflowing(PPOModule):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.updater = [], WatchedUpdater(self)

    def backward_minibatch(self, experience, chosen, ptx):
        found = super().backward_minibatch(experience, chosen, ptx)
        if len(self.seen) in (1, 2):
            critic = next(boosted for boosted in self.trainer.strategy.boosted if boosted.path == "critic")
            next(gradient for _, _, gradient in critic.gradients())[0] = math.inf
        return found


if __name__ == "__main__":
    run.PPOModule = Overflowing
    trainer, module = run.run(
        sys.argv[1], sys.argv[2], "ppo", dict(plugin="zero2", initial_scale=2.0**8), precision="colossalai 16-mixed",
        max_steps=1, lora=True, critic_kind="separate", micro_batch_tokens=None, max_dropped=1,
    )  # fmt: skip
    (Path(sys.argv[2]) / "seen.json").write_text(json.dumps([module.seen, trainer.global_step, module.skipped]))
