"""A run of two processes whose living tensors are counted: run_ranks.py MODEL OUT PLUGIN TP PP PRECISION."""

import json
import sys
from pathlib import Path

import measured
from torch.utils.data import DataLoader

from lightning_rlhf import SFTModule
from lightning_rlhf.plan.shapes import Shape
from lightning_rlhf.strategies import ColossalAIStrategy

if __name__ == "__main__":
    model, out, plugin, tp, pp, precision = sys.argv[1:]
    batches = [Shape("instructions", 4, 40, 40, 1, 1).batch() for _ in range(2)]
    strategy = ColossalAIStrategy(plugin, tp=int(tp), pp=int(pp), micro_batches=2)
    found = measured.fit(
        SFTModule(model), DataLoader(batches, batch_size=None), strategy, devices=2, precision=precision,
        use_distributed_sampler=False,
    )  # fmt: skip
    Path(out, f"{strategy.global_rank}.json").write_text(json.dumps(found), encoding="utf-8")
