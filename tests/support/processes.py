"""Two processes of a test file that is a script too."""

import os
import subprocess
import sys
from pathlib import Path


def run_two(script, folder):
    """What each of two processes printed, and what it said when it died; their arguments are a store and the rank."""
    store = folder / "store"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, script, str(store)]
    processes = [subprocess.Popen([*command, str(rank)], env=env, **pipes) for rank in range(2)]
    try:
        return [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
