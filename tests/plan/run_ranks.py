"""Runs of several processes whose living tensors are counted: run_ranks.py MODEL OUT CASE.

CASE is JSON: the Trainer's ``devices`` and ``precision``, ``stage`` (sft, reward, ppo or grpo), and the arguments of
the strategy. Each rank writes what it held to OUT/RANK.json, and the tokens of a prompt that was read.
"""

import json
import sys
from pathlib import Path

import measured
from cases import SHAPES, data_of, module_of

from lightning_rlhf.strategies import ColossalAIStrategy

if __name__ == "__main__":
    model, out, case = sys.argv[1:]
    options = json.loads(case)
    stage, devices, precision = (options.pop(name) for name in ("stage", "devices", "precision"))
    strategy = ColossalAIStrategy(**options)
    module = module_of(stage, model)
    more = {"use_distributed_sampler": False} if stage in SHAPES else {}
    data = data_of(stage, devices // strategy.ranks_per_copy, out)
    found = measured.fit(module, data, strategy, devices, precision=precision, **more)
    if stage not in SHAPES:
        found["prompt"] = len(module.sampled[0].experience.trees[0].prompt)
    Path(out, f"{strategy.global_rank}.json").write_text(json.dumps(found), encoding="utf-8")
