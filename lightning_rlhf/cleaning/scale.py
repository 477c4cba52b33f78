"""Cleaning of more than one machine holds: the same filters as a pipeline of datatrove, on its executors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_rlhf.cleaning.example import Kind
from lightning_rlhf.cleaning.filters.make import make_filters
from lightning_rlhf.cleaning.outputs import Outputs
from lightning_rlhf.data.sources import source_state
from lightning_rlhf.utils.imports import require

#: Memory that Ray sets aside for a task, in GB, and for objects of a Ray that is started here, in bytes: tasks pass
#: all that is large in files.
_TASK_MEMORY, _OBJECTS = 1, 2**27


@dataclass(frozen=True)
class Cluster:
    """Where the tasks run.

    Args:
        executor: ``local`` processes, the ``ray`` cluster that this process can reach (or a local one), or ``slurm``.
        workers: Tasks at a time.
        partition: Slurm's partition.
        time: Slurm's time limit of a job.
    """

    executor: Literal["local", "ray", "slurm"] = "local"
    workers: int = 1
    partition: str | None = None
    time: str = "04:00:00"

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers is {self.workers}. Give at least 1.")
        if self.executor == "slurm" and not self.partition:
            raise ValueError("--executor slurm needs --slurm-partition.")


def clean_files(
    paths: Sequence[str],
    out: Path,
    filters: Sequence[Any],
    cluster: Cluster,
    kind: Kind | Literal["auto"] = "auto",
    format: str = "auto",
) -> list[str]:
    """Cleans files, a task for each; near duplicates are found across all of them.

    All machines must see the files and the folder of ``out``, where a folder of intermediate files is kept until all is
    done; the same call goes on where it was stopped.

    Args:
        paths: Files, globs or directories.
        out: File for the rows; as of ``data clean``, what was left out and a report are written beside it.
        filters: The filters, as :func:`~lightning_rlhf.cleaning.filters.make_filters` takes them. NearDuplicate runs
            last, wherever it stands.
        cluster: Where it runs.
        kind: What the rows are.
        format: Their format.

    Returns:
        Lines for people: what each filter did and what was written; with Slurm, the job to wait for.

    Raises:
        ImportError: datatrove or Ray is not installed.
        RuntimeError: A task failed; the message names its log.
        ValueError: A filter needs all rows in order, or an output is an input.
    """
    steps = require_steps()
    state = source_state(list(paths))
    files = list(dict.fromkeys(entry[1] for entry in state or []))
    near = [one for one in make_filters(filters) if one.remembers]
    if [one.name for one in near] not in ([], ["NearDuplicate"]):
        raise ValueError(f"{near[0].name} needs all rows in order. Leave it out, or clean without --executor.")
    plain = [spec for spec, one in zip(filters, make_filters(filters), strict=True) if not one.remembers]
    threshold = getattr(near[0], "threshold", None) if near else None
    Outputs(out, files)  # refuses before any work
    settings = json.dumps([state, list(filters), kind, format], default=str)
    work = out.resolve().with_name(f".{out.name}.{hashlib.sha256(settings.encode()).hexdigest()[:12]}")
    clean = steps.CleanFiles(files, str(work), plain, kind, format)
    finish = steps.Finish(files, str(work), str(out.resolve()), threshold)
    if threshold is None:
        stages = [("clean", len(files), [clean, steps.Count()])]
    else:
        signed, buckets, clusters = (str(work / name) for name in ("signatures", "buckets", "clusters"))
        stages = [
            ("clean", len(files), [clean, steps.Sign(signed)]),
            ("buckets", steps.BANDS, [steps.buckets(signed, buckets)]),
            ("clusters", 1, [steps.clusters(buckets, clusters)]),
        ]
    stages.append(("finish", 1, [finish]))
    if cluster.executor == "slurm":
        return _submit(stages, work, cluster)
    for name, tasks, pipeline in stages:
        print(f"{name}: {tasks} tasks, logs in {work / 'logs' / name}", file=sys.stderr, flush=True)
        _run(name, tasks, pipeline, work, cluster)
    said = (work / "said.txt").read_text(encoding="utf-8").splitlines()
    shutil.rmtree(work)
    return said


def require_steps() -> Any:
    """The module of the pipeline's steps, which needs datatrove.

    Raises:
        ImportError: It is not installed.
    """
    require("datatrove", "Cleaning on many machines", "scale")
    from lightning_rlhf.cleaning import scale_steps

    return scale_steps


def _run(name: str, tasks: int, pipeline: list[Any], work: Path, cluster: Cluster) -> None:
    logs = str(work / "logs" / name)
    if cluster.executor == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        _connect(cluster.workers)
        # the many short tasks of this stage share processes: to start one takes longer than they do
        together = -(-tasks // cluster.workers) if name == "buckets" else 1
        executor = RayPipelineExecutor(
            pipeline, tasks, cluster.workers, logging_dir=logs, mem_per_cpu_gb=_TASK_MEMORY, tasks_per_job=together
        )
    else:
        from datatrove.executor import LocalPipelineExecutor

        executor = LocalPipelineExecutor(pipeline, tasks, min(tasks, cluster.workers), logging_dir=logs)
    executor.run()
    if failed := executor.get_incomplete_ranks():  # Ray's executor only warns
        raise RuntimeError(f"{len(failed)} of {tasks} tasks of {name} failed. See {logs}/logs/task_{failed[0]:05d}.log")


def _connect(workers: int) -> None:
    """Connects to the Ray cluster of the environment, or starts one here.

    Raises:
        ImportError: Ray is not installed.
        RuntimeError: No task could ever start: datatrove's executor would wait for ever.
    """
    ray = require("ray", "--executor ray", "scale")
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        local = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": _OBJECTS}
        # the executor's workers fork, and they have threads: a lock that one holds stays locked in the child
        hook = {"worker_process_setup_hook": "lightning_rlhf.cleaning.scale_steps.fork_from_a_server"}
        ray.init(runtime_env=hook, **(local if address is None else {"address": address}))
    free = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= 1 and node.get("memory", 0) >= _TASK_MEMORY * 2**30 for node in free):
        most = max((node.get("memory", 0) for node in free), default=0)
        raise RuntimeError(
            f"No machine of the Ray cluster has a CPU and {_TASK_MEMORY} GB of memory for a task; the most that one "
            f"gives is {most / 2**30:.2f} GB. Free some, add machines, or use --executor local."
        )


def _submit(stages: Sequence[tuple[str, int, list[Any]]], work: Path, cluster: Cluster) -> list[str]:
    """Sends the stages as jobs, each after the one before."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    executor = None
    path = os.environ.get("PYTHONPATH", "")
    for name, tasks, pipeline in stages:
        executor = SlurmPipelineExecutor(
            pipeline,
            tasks,
            cluster.time,
            cluster.partition,
            workers=cluster.workers,
            job_name=f"clean-{name}",
            qos=None,
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={path}",
            logging_dir=str(work / "logs" / name),
            depends=executor,
        )
    assert executor is not None
    executor.run()
    return [f"Sent {len(stages)} jobs; the last is {executor.job_id}. Logs: {work / 'logs'}"]
