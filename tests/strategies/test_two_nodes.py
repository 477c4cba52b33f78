"""Two machines: network namespaces with a cable between them, and torchrun in each.

The commands are those of configs/parallel/two_nodes.yaml, on the CPU. Making namespaces needs root on Linux.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "parallel" / "two_nodes.yaml"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def machines():
    """Names of two namespaces, each with one end of a cable."""
    if shutil.which("ip") is None or os.name != "posix" or os.geteuid() != 0:
        pytest.skip("two machines need ip and root")
    names = [f"rlhf{os.getpid()}n{i}" for i in range(2)]
    ends = [f"v{os.getpid()}n{i}" for i in range(2)]
    if made := [done.stderr for name in names if (done := ip("netns", "add", name)).returncode]:
        pytest.skip(f"network namespaces cannot be made: {made[0]}")
    try:
        assert ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]).returncode == 0
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            assert ip("link", "set", end, "netns", name).returncode == 0
            for command in (f"addr add {address}/24 dev {end}", f"link set {end} up", "link set lo up"):
                assert ip("-n", name, *command.split()).returncode == 0
        yield list(zip(names, ends, strict=True))
    finally:
        for name in names:
            ip("netns", "del", name)


def lose(name):
    """Kills all that runs on a machine: torchrun's workers have process groups of their own."""
    for pid in ip("netns", "pids", name).stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def command(node):
    """The command of the config's comment on a machine, up to the stage's config."""
    text = re.sub(r"\n# +", " ", CONFIG.read_text(encoding="utf-8"))
    [found] = re.findall(r"(torchrun .*? fit) --config", text.replace("\\", ""))
    words = shlex.split(found)
    assert [words[words.index("--node-rank") + 1], words[words.index("--nproc-per-node") + 1]] == ["N", "gpu"]
    values = {"N": str(node), "ADDRESS": ADDRESSES[0], "gpu": "1"}
    return [str(Path(sys.executable).with_name("torchrun")), *(values.get(word, word) for word in words[1:])]


@contextmanager
def started(machines, stage, model_dir, out, **options):
    """A fit of a stage on both machines."""
    rows, stages = out / "rows.jsonl", ROOT / "configs" / stage / "smollm2_lora.yaml"
    out.mkdir(parents=True)
    lines = [{"instruction": f"question {i}", "output": "the fox"} for i in range(16)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    callbacks = [
        {"class_path": "HFExport", "init_args": {"dirpath": str(out / "hf")}},
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(out), "every_n_train_steps": 2}},
    ]
    small = {
        "model.pretrained": model_dir, "model.chat_template": "chatml", "data.train": rows, "data.batch_size": 4,
        "data.cache_dir": out / "cache", "trainer.default_root_dir": out, "trainer.logger": "false",
        "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false", "trainer.callbacks": json.dumps(callbacks), **options,
    }  # fmt: skip
    arguments = ["--config", str(stages), "--config", str(CONFIG)]
    arguments += [text for name, value in small.items() for text in (f"--{name}", str(value))]
    processes, logs = [], []
    try:
        for node, (name, end) in enumerate(machines):
            env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": end, "TP_SOCKET_IFNAME": end}
            logs.append(out / f"node{node}.txt")
            with logs[-1].open("w") as log:
                processes.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, *command(node), *arguments],
                        env=env, stdout=log, stderr=log,
                    )
                )  # fmt: skip
        yield processes, logs
    finally:
        for process, (name, _) in zip(processes, machines, strict=True):
            lose(name)
            process.wait()


SMALL = {
    "sft": {"trainer.max_steps": 3},
    "ppo": {
        "trainer.max_steps": 2,
        "model.reward": "lightning_rlhf.rewards.verifiers.length",
        "model.rollout.sampling.max_new_tokens": 6,
    },
}


@pytest.mark.parametrize("stage", [pytest.param("sft", marks=pytest.mark.exhaustive), "ppo"])
def test_a_stage_runs_on_two_machines(stage, machines, tiny_model_dir, tmp_path):
    with started(machines, stage, tiny_model_dir, tmp_path / "two", **SMALL[stage]) as (processes, logs):
        ended = [process.wait(300) for process in processes]
        assert ended == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    [exported] = (tmp_path / "two" / "hf").rglob("*.safetensors")
    [start] = Path(tiny_model_dir).glob("*.safetensors")
    before, after = load_file(start), load_file(exported)
    changes = [(after[name] - weight).abs().max().item() for name, weight in before.items() if "q_proj" in name]
    assert changes and all(0 < change < 1 for change in changes)


def test_if_one_machine_is_lost_the_other_ends_with_an_error(machines, tiny_model_dir, tmp_path):
    endless = {"trainer.max_steps": 100000, "trainer.max_epochs": -1}
    with started(machines, "sft", tiny_model_dir, tmp_path / "two", **endless) as (processes, logs):
        while not list((tmp_path / "two").glob("*.ckpt")):
            assert processes[0].poll() is None, logs[0].read_text()[-3000:]
            time.sleep(0.2)
        lose(machines[1][0])
        assert processes[0].wait(120) != 0, "the other machine ended as though all were well"
    assert re.search("Connection (closed|reset) by peer", logs[0].read_text()), logs[0].read_text()[-3000:]
