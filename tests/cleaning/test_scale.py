"""The same cleaning on datatrove's executors. Without the extra `scale` most of it is skipped."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_rlhf.cleaning import scale
from lightning_rlhf.cli import main

pytest.importorskip("rensa")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three files whose rows have near duplicates within and across them, rows that filters drop, and a bad line."""
    folder = tmp_path_factory.mktemp("files")
    openings = ("Explain to a child", "写一首短诗", "Name three uses of", "用三句话介绍")
    lines = []
    for i in range(600):
        text = f"{openings[i % 4]} word{i // 4} other{i} and a few more words that all rows have in them 第{i}个"
        lines.append({"instruction": text, "output": "As an AI language model, no." if i % 50 == 7 else f"Answer {i}."})
        if i % 9 == 0:
            lines.append({"instruction": text.upper() + "!", "output": f"Mail a{i}@mail.cn"})
    lines = [lines[i * 7 % len(lines)] for i in range(len(lines))]
    for i in range(3):
        rows = [json.dumps(row, ensure_ascii=False) for row in lines[i::3]]
        (folder / f"part{i}.jsonl").write_text("\n".join([*rows, "{broken"] if i == 1 else rows), encoding="utf-8")
    return folder


def clean(files, out, *options):
    main(["data", "clean", str(files), "--out", str(out), *options])
    return out.read_text(encoding="utf-8"), fates(out)


def fates(out):
    """What became of the rows that are left out: the filter, by place."""
    dropped = out.with_name(f"{out.stem}.dropped.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["where"]: entry["filter"] for entry in map(json.loads, dropped)}


def alike(ours, theirs, rows):
    """The share of rows with the same fate."""
    return 1 - len(ours.items() ^ theirs.items()) / 2 / rows


@pytest.mark.slow
def test_the_local_executor_agrees_with_our_engine(files, tmp_path, capsys):
    pytest.importorskip("datatrove")
    text, ours = clean(files, tmp_path / "ours.jsonl")
    again, theirs = clean(files, tmp_path / "theirs.jsonl", "--executor", "local")
    rows = text.count("\n") + len(ours)
    assert sum(name == "NearDuplicate" for name in ours.values()) > 40
    assert alike(ours, theirs, rows) >= 0.995
    said = capsys.readouterr().out
    assert "1 bad rows: 1 x malformed JSON" in said and f"{again.count(chr(10)):,} of {rows - 1:,} rows kept" in said
    reports = [json.loads((tmp_path / f"{name}.report.json").read_text()) for name in ("ours", "theirs")]
    for name, one in reports[0]["filters"]["filters"].items():
        other = reports[1]["filters"]["filters"][name]
        assert (one["seen"], one["reasons"]) == (other["seen"], other["reasons"])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # nothing in between is left


@pytest.mark.slow
def test_without_near_duplicates(files, tmp_path):
    pytest.importorskip("datatrove")
    filters = ("--filters", "Length", "Refusal")
    assert clean(files, tmp_path / "a.jsonl", *filters) == clean(
        files, tmp_path / "b.jsonl", *filters, "--executor", "local"
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_ray_drops_the_same_rows(files, tmp_path):
    pytest.importorskip("datatrove")
    pytest.importorskip("ray")
    command = [
        sys.executable,
        "-m",
        "lightning_rlhf",
        "data",
        "clean",
        str(files),
        "--executor",
        "ray",
        "--workers",
        "2",
    ]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with (tmp_path / "log").open("w") as log:  # no pipe: Ray's processes would hold it open
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "ray.jsonl")], env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = "none within 240 s"
    assert code == 0, f"exit status: {code}\n{(tmp_path / 'log').read_text()[-3000:]}"
    theirs = (tmp_path / "ray.jsonl").read_text(encoding="utf-8"), fates(tmp_path / "ray.jsonl")
    assert theirs == clean(files, tmp_path / "local.jsonl", "--executor", "local")


@pytest.mark.parametrize(
    ("nodes", "most"),
    [
        ([{"Alive": True, "Resources": {"CPU": 2, "memory": 2**29}}], "0.50"),
        ([{"Alive": True, "Resources": {"memory": 2**33}}], "8.00"),
        ([{"Alive": False, "Resources": {"CPU": 2, "memory": 2**33}}], "0.00"),
        ([{"Alive": True, "Resources": {"CPU": 2, "memory": 2**30}}], None),
    ],
)
def test_a_ray_that_could_start_no_task_is_refused(nodes, most, monkeypatch):
    """datatrove's executor waits for ever for resources that nobody has."""
    ray = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: nodes)
    monkeypatch.setattr(scale, "require", lambda *_: ray)
    if most is None:
        scale._connect(2)
    else:
        with pytest.raises(RuntimeError, match=rf"No machine .* the most that one gives is {most} GB"):
            scale._connect(2)


@pytest.mark.slow
def test_slurm_gets_a_job_for_each_stage_after_the_one_before(files, tmp_path, monkeypatch, capsys):
    """A stand-in for sbatch keeps what it is sent; no cluster has run it."""
    pytest.importorskip("datatrove")
    sent = tmp_path / "sent"
    sent.mkdir()
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f'#!/bin/sh\nn=$(ls {sent} | wc -l)\nfor last; do :; done\necho "$@" > {sent}/$n\ncat "$last" >> {sent}/$n\n'
        "echo Submitted batch job $((100 + n))\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}")
    out = tmp_path / "out.jsonl"
    options = ("--executor", "slurm", "--slurm-partition", "cpu", "--slurm-time", "01:00:00", "--workers", "4")
    main(["data", "clean", str(files), "--out", str(out), *options])
    assert "Sent 4 jobs" in capsys.readouterr().out and not out.exists()
    scripts = [path.read_text() for path in sorted(sent.iterdir(), key=lambda path: int(path.name))]
    jobs = {
        m[1]: text
        for text in scripts
        if (m := re.search(r"--job-name=clean-(\w+)", text)) and "merge_stats" not in text
    }
    assert list(jobs) == ["clean", "buckets", "clusters", "finish"]
    assert all("--partition=cpu" in text and "--time=01:00:00" in text for text in jobs.values())
    assert [re.search(r"--array=(\S+)", text)[1] for text in jobs.values()] == ["0-2%4", "0-19%4", "0-0%4", "0-0%4"]
    numbers = {text: 100 + i for i, text in enumerate(scripts)}
    order = [numbers[text] for text in jobs.values()]
    waits = [re.search(r"--dependency=afterok:(\d+)", text.split("\n")[0]) for text in jobs.values()]
    assert waits[0] is None and [int(m[1]) for m in waits[1:]] == order[:-1]
    for text in jobs.values():
        assert Path(re.search(r"launch_pickled_pipeline (\S+)", text)[1]).is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--executor", "slurm"], "needs --slurm-partition"),
        (["--executor", "local", "--workers", "0"], "Give at least 1"),
    ],
)
def test_wrong_settings(files, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        clean(files, tmp_path / "a.jsonl", *options)


@pytest.mark.slow
def test_filters_that_need_an_order_are_refused(files, tmp_path):
    pytest.importorskip("datatrove")
    with pytest.raises(SystemExit, match="Novelty needs all rows in order"):
        clean(files, tmp_path / "a.jsonl", "--executor", "local", "--filters", "Novelty")
    with pytest.raises(SystemExit, match="is an input"):
        clean(files, files / "part0.jsonl", "--executor", "local")


def test_what_is_missing_is_said(files, tmp_path, monkeypatch):
    import importlib

    real = importlib.import_module

    def missing(name, *more):
        if name == "datatrove":
            raise ModuleNotFoundError("No module named 'datatrove'", name="datatrove")
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SystemExit, match=r"pip install 'lightning_rlhf\[scale\]'"):
        clean(files, tmp_path / "a.jsonl", "--executor", "local")
