"""A run of PPO or GRPO that is killed with SIGKILL at random moments, and resumed from its last checkpoint each time.

    python run_killed.py run_ppo MODEL_DIR OUT_DIR KILLS '{"lora": true, ...}'

What takes long to import is imported once; each life of the run is a fork of this process. Prints how many were killed.
"""

import importlib
import json
import math
import multiprocessing
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def last(out):
    """The newest checkpoint."""
    return max(out.glob("step*.ckpt"), key=step, default=None)


def step(path):
    """The iterations that a checkpoint has behind it."""
    return 0 if path is None else int(path.stem[4:])


def main(script, model_dir, out, kills, options):
    run = importlib.import_module(script).run
    draw, killed = random.Random(0), 0
    while not (out / "weights.pt").exists():
        begun = last(out)
        life = multiprocessing.get_context("fork").Process(
            target=run, args=(model_dir, out), kwargs={**options, "ckpt": begun}
        )
        life.start()
        if killed < kills:
            deadline = None
            # One iteration at least, so that it comes to an end, and two at most, so that it does not come too soon.
            while life.is_alive() and step(last(out)) < step(begun) + 2 and (deadline or math.inf) > time.monotonic():
                if deadline is None and last(out) != begun:
                    deadline = time.monotonic() + draw.uniform(0, 0.3)
                time.sleep(0.005)
            life.kill()
            killed += 1
        life.join()
        if life.exitcode not in (0, -9):
            sys.exit("the run failed by itself")
    print(killed)


if __name__ == "__main__":
    script, model, folder, number, given = sys.argv[1:]
    main(script, model, Path(folder), int(number), json.loads(given))
