"""Workers: deadlines, faults of all kinds, and that none outlives its parent."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lightning_rlhf.rewards.workers import Outcome, Workers


@pytest.fixture(scope="module")
def pool():
    pool = Workers(count=2)
    yield pool
    pool.close()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def test_tasks_are_dealt_and_outcomes_are_in_order(pool):
    found = pool.run("worker_jobs:double", [[i] for i in range(200)], 5)
    assert found == [Outcome(2 * i) for i in range(200)]
    assert pool.run("worker_jobs:double", [], 5) == []


def test_a_worker_is_light(pool):
    assert pool.run("lightning_rlhf.rewards.jobs.texts:search", [["a", "a", False]], 5) == [Outcome("a")]
    assert pool.run("worker_jobs:modules", [[]] * 2, 5) == [Outcome([]), Outcome([])]


@pytest.mark.parametrize(
    ("job", "fault", "why"),
    [("spin", "timeout", "took too long"), ("power", "timeout", "took too long"), ("die", "error", "died by SIGKILL"),
     ("leave", "error", "died with exit code 0"), ("stop", "error", "exit code 3"), ("eat", "error", "MemoryError"),
     ("much", "error", "more than 16 MiB"), ("no_json", "error", "TypeError"), ("fails", "error", "KeyError: 'a'"),
     ("talk", None, "")],
)  # fmt: skip
def test_what_goes_wrong_is_an_outcome_and_the_others_go_on(job, fault, why, pool):
    limit = 0.2 if fault == "timeout" else 20
    (outcome,) = pool.run(f"worker_jobs:{job}", [[]], limit)
    assert outcome.fault == fault and why in outcome.why
    assert pool.run("worker_jobs:double", [[4], [5]], 5) == [Outcome(8), Outcome(10)]


def test_what_a_job_forks_does_not_answer_for_it_and_dies_with_the_worker():
    own = Workers(count=1)
    found = own.run("worker_jobs:forks", [[]] * 5, 5)
    worker = own._idle[0].process.pid
    assert found == [Outcome(worker)] * 5
    assert own.run("worker_jobs:double", [[i] for i in range(50)], 5) == [Outcome(2 * i) for i in range(50)]
    (left,) = own.run("worker_jobs:leaves_a_child", [[]], 5)
    assert alive(left.value)
    own.close()
    wait_until(lambda: not alive(left.value))


def test_waiting_has_a_limit_too(pool):
    assert pool.run("worker_jobs:sleep", [[]], 5, wall=0.2)[0].fault == "timeout"


def test_a_worker_that_was_killed_while_idle_is_replaced(pool):
    (found,) = pool.run("worker_jobs:pid", [[]], 5)
    os.kill(found.value, signal.SIGKILL)
    (again,) = pool.run("worker_jobs:pid", [[]], 5)
    assert again.fault is None and again.value != found.value


def test_a_job_that_is_not_there(pool):
    with pytest.raises(RuntimeError, match="can't start worker_jobs:nothing: AttributeError"):
        pool.run("worker_jobs:nothing", [[]], 5)


def test_threads_share_it(pool):
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: pool.run("worker_jobs:double", [[n]] * 3, 5)}))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [Outcome(2 * n)] * 3 for n in range(4)}


def test_a_thread_that_started_workers_may_end(pool):
    """A death signal bound to the parent would come when that thread ends."""
    own = Workers(count=1)
    thread = threading.Thread(target=own.run, args=("worker_jobs:double", [[1]], 5))
    thread.start()
    thread.join()
    pid = own._idle[0].process.pid
    assert own.run("worker_jobs:pid", [[]], 5) == [Outcome(pid)]
    own.close()
    assert not alive(pid)


def test_a_fork_has_workers_of_its_own(tmp_path):
    code = (
        "import os, sys; from lightning_rlhf.rewards import workers as w\n"
        "a = w.run('worker_jobs:pid', [[]], 5)[0].value\n"
        "if os.fork() == 0: b = w.run('worker_jobs:pid', [[]], 5)[0].value; w._pool.close(); os._exit(a == b)\n"
        "status = os.wait()[1]; again = w.run('worker_jobs:pid', [[]], 5)[0].value\n"
        "print(status, a == again)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert found.stdout == "0 True\n"


@pytest.mark.parametrize("job", ["sleepy_pid", "double"], ids=["busy", "idle"])
def test_none_outlives_a_parent_that_is_killed(job, tmp_path):
    path = tmp_path / "pids"
    path.touch()
    code = (
        "import sys, time; from lightning_rlhf.rewards import workers as w\n"
        f"w.run('worker_jobs:{job}', [[sys.argv[1]]], 5, wall=50)\n"
        "open(sys.argv[1], 'a').write(f'{w._pool._idle[0].process.pid}\\n'); time.sleep(50)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code, str(path)], env=env)
    wait_until(lambda: path.read_text().endswith("\n"))
    pid = int(path.read_text())
    assert alive(pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: not alive(pid))


def test_ctrl_c_ends_what_is_busy(tmp_path):
    path = tmp_path / "pids"
    path.touch()
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from lightning_rlhf.rewards import workers as w\n"
        "try: w.run('worker_jobs:sleepy_pid', [[sys.argv[1]]], 5, wall=50)\n"
        "except KeyboardInterrupt: print(len(w._pool._idle), w.run('worker_jobs:double', [[1]], 5)[0].value)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code, str(path)], env=env, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: path.read_text().endswith("\n"))
    parent.send_signal(signal.SIGINT)
    assert parent.communicate(timeout=60)[0] == "0 2\n"
    assert not alive(int(path.read_text()))
