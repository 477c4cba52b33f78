"""Fits that several tests look at, in this process and in others."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from forked import python
from runs import load_script

HERE = Path(__file__).parent
SCRIPT = HERE / "run_artifacts.py"


@pytest.fixture(scope="session")
def artifacts():
    """The module of the script."""
    return load_script(SCRIPT)


@pytest.fixture(scope="session")
def start():
    """``start(model_dir, out, runs)``: several fits of several processes, in one start."""

    def run(model_dir, out, runs):
        out.mkdir(parents=True, exist_ok=True)
        command = [python(), str(SCRIPT), str(model_dir), str(out), json.dumps(runs)]
        env = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=420)
        assert done.returncode == 0, done.stderr[-3000:]
        return out

    return run
