"""A run of several processes whose living tensors are counted: run_ranks.py MODEL OUT ROW.

ROW is JSON: a row of table.py. Each rank writes what it held to OUT/RANK.json.
"""

import json
import sys
from pathlib import Path

import measured
from cases import data_of, module_of

from lightning_rlhf.strategies import ColossalAIStrategy

if __name__ == "__main__":
    model, out, text = sys.argv[1:]
    row = json.loads(text)
    strategy, devices = ColossalAIStrategy(**row["strategy"]), row["devices"]
    module = module_of(row["stage"], model, row["lora"], row["checkpointing"])
    data = data_of(row["stage"], devices // strategy.ranks_per_copy, out)
    found = measured.fit(module, data, strategy, devices, row["precision"])
    Path(out, f"{strategy.global_rank}.json").write_text(json.dumps(found), encoding="utf-8")
