"""Starts the ranks of a script, or stages in processes of their own."""

import json
import os
import socket
import subprocess
from pathlib import Path

from forked import python


def run_ranks(script, *arguments, ranks=2, logs=None):
    """Runs a script as several ranks, which find each other by the environment, and returns what each printed.

    If a rank fails, the error has the ends of its standard error and of its ``rankN.txt`` in the folder ``logs``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    command = [python(), str(script), *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, env={**env, "LOCAL_RANK": str(rank)}, **pipes) for rank in range(ranks)]
    try:
        outputs = [process.communicate(timeout=800) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, (_, error)) in enumerate(zip(processes, outputs, strict=True)):
        where = (logs / f"rank{rank}.txt").read_text()[-4000:] if logs else ""
        assert process.returncode == 0, f"rank {rank} of {ranks} failed: {where}\n{error[-3000:]}"
    return [out for out, _ in outputs]


def run_stages(model_dir, out, cases, check=True):
    """Runs stages of tests/strategies/run.py one after the other, in one start of processes."""
    script = Path(__file__).parents[1] / "strategies" / "run.py"
    command = [python(), str(script), str(model_dir), str(out), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
