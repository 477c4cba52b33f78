"""The memory benchmark at smoke size: rows of the same size for all, and an honest table. No size is asserted."""

import mmap
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZE = ["--width", "32", "--layers", "1", "--vocab-size", "64", "--rows", "2", "--micro-batches", "2"]
SMALL = [*SIZE, "--length", "6", "--new", "4", "--steps", "2"]


@pytest.fixture(scope="module")
def memory(load_benchmark):
    return load_benchmark("memory")


@pytest.fixture
def task(memory, tmp_path):
    return memory.make_task(memory.parse(SMALL), tmp_path, memory.Meter(1))


def test_rows_and_micro_batches_have_the_same_size(memory, task):
    assert task.micro_batch_tokens() == 2 * (6 + 4)
    data = task.texts()
    data.setup("fit")
    assert [batch.num_tokens for batch in data.train_dataloader()] == [20, 20]


def test_an_iteration_is_cut_as_a_step_is(memory, task, monkeypatch):
    modules, sizes = [], []

    class Watched(memory.PPOModule):
        def micro_batches(self, experience, chosen=None):
            modules.append(self)
            for part in super().micro_batches(experience, chosen):
                sizes.append(part.batch.num_tokens)
                yield part

    monkeypatch.setattr(memory, "PPOModule", Watched)
    memory.make_reward_adapter(task)
    memory.CONTESTANTS["ppo-reward"](task)
    assert set(sizes) == {20}
    assert modules[0].policy.adapters.keys() == {"policy", "critic", "reward"}, "the backbone is not shared"
    assert len(task.meter.losses) == 2


def test_base_is_the_start_where_asked(memory):
    meter = memory.FromStart(1)
    held = mmap.mmap(-1, 64 * 2**20)  # fresh pages; the heap of a long test run may have such a hole, resident already
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    meter.ready()
    meter.finish()
    assert meter.extra_mib > 50
    plain = memory.Meter(1)
    plain.ready()
    plain.finish()
    assert plain.extra_mib < 20
    held.close()


def test_table_shows_a_shortfall(memory):
    def meters(*sizes):
        return [memory.Meter(1, extra_mib=size) for size in sizes]

    extra = {"sft": meters(100, 50, 120), "ppo": meters(130), "ppo-reward": meters(160)}
    whole = {"sft": meters(400), "ppo": meters(500), "ppo-reward": meters(600)}
    sft, ppo, reward = memory.rows(extra, whole)
    assert sft == ["sft", "100", "", "400", "", ""]
    assert ppo == ["ppo", "130", "1.30x", "500", "1.25x", "1.4x met"]
    assert reward == ["ppo-reward", "160", "1.60x", "600", "1.50x", "1.4x over by 0.20x"]


def test_command_prints_a_table(memory, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    memory.main([*SMALL, "--contestants", "sft"])
    header, _, sft = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines())
    assert header == list(memory.COLUMNS)
    assert sft[0] == "sft"


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--contestants", "ppo"], "must include sft"), (["--steps", "1"], "at least 2")]
)
def test_what_can_not_be_measured_is_refused(memory, capsys, arguments, words):
    with pytest.raises(SystemExit):
        memory.parse(arguments)
    assert words in capsys.readouterr().err
