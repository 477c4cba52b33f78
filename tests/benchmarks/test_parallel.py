"""The benchmark of parallelism at smoke size: formulas by hand, an honest table, and the same work in both loops."""

from pathlib import Path

import pytest
import torch
from tables import cells

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--width", "32", "--layers", "2", "--vocab-size", "32", "--rows", "4", "--length", "8"]


@pytest.fixture(scope="module")
def parallel(load_benchmark):
    return load_benchmark("parallel")


# ---------------------------------------------------------------------------------------------- formulas, by hand


@pytest.mark.parametrize(
    ("mesh", "numbers"),
    [
        # 32 tokens of which 16 are scored, of 32 numbers; two layers of 12352 weights and 64 in norms, tables of 1024
        ("tp2", {"tensor sums": 32 * 32 * (1 + 2 * 4) + 16 * (32 + 3)}),
        ("sp2", {"sequence all-to-alls": 16 * 2 * 2 * (4 * 32), "gradients": 2 * 12416 + 2 * 1024 + 32}),
        ("pp2", {"pipeline sends": 32 * 32}),
        ("dp2", {"gradients": 2 * 12416 + 2 * 1024 + 32}),
        ("pp2_dp2", {"pipeline sends": 32 * 32, "gradients": 12416 + 1024 + 32}),
        ("tp2_dp2", {"tensor sums": 32 * 32 * 9 + 16 * 35, "gradients": 2 * (12352 // 2 + 64) + 1024 + 32}),
    ],
)
def test_bytes_by_formula(parallel, mesh, numbers):
    options = parallel.parse(["--bytes", *SMALL])
    assert parallel.model_config(options).intermediate_size == 86  # 4 * 32 * 32 + 3 * 32 * 86 = 12352
    want = {kind: 4 * number for kind, number in numbers.items()}
    assert parallel.by_formula(options, parallel.Grid.read(mesh)) == want


def test_stages_between_the_ends_send_both_ways(parallel):
    options = parallel.parse(["--bytes", *SMALL, "--layers", "3"])
    assert parallel.by_formula(options, parallel.Grid.read("pp3")) == {"pipeline sends": 2 * 4 * 32 * 32}


def test_a_table_has_the_rank_with_the_most(parallel):
    options = parallel.parse(["--bytes", *SMALL])
    found = [{"pipeline sends": [2, 4096, 4096.0]}, {"pipeline sends": [1, 1024, 1024.0], "others": [1, 64, 32.0]}]
    assert parallel.byte_rows(options, "pp2", found) == [
        ["pp2", "pipeline sends", "2", "128.0", "128.0", "128.0"],
        ["pp2", "others", "1", "2.0", "", "1.0"],
    ]


def test_copies_have_batches_of_their_own(parallel):
    options = parallel.parse(["--bytes", *SMALL])
    first, second = (parallel.batches(options, copy) for copy in (0, 1))
    assert [b.num_tokens for b in first] == [32] * 4 and [b.num_scored for b in first] == [16] * 4
    assert not torch.equal(first[0].input_ids, second[0].input_ids)
    assert parallel.weights(first[0]).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--bytes --overhead is required"),
        (["--bytes", "--meshes", "dp1"], "'dp1' is no mesh of several ranks"),
        (["--bytes", "--meshes", "xy2"], "'xy2' is no mesh of several ranks"),
        (["--bytes", "--length", "1"], "for a prompt and an answer"),
    ],
)
def test_what_can_not_be_measured_is_refused(parallel, capsys, arguments, words):
    with pytest.raises(SystemExit):
        parallel.parse(arguments)
    assert words in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- real ranks


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("mesh", ["tp2", "pp2"])
def test_overhead_is_of_the_same_work(parallel, capsys, monkeypatch, mesh):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    parallel.main([*SMALL, "--overhead", "--meshes", mesh, "--steps", "3"])
    header, line = cells(capsys.readouterr().out)
    assert header == list(parallel.OVERHEAD_COLUMNS)
    assert line[:3] == [mesh, "2", "3"] and line[5].endswith(" ms") and line[6].endswith("x")
    assert float(line[-1]) < 1e-6


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", ["dp2", "sp2"])
def test_overhead_of_gradients_over_ranks_is_of_the_same_work(parallel, capsys, monkeypatch, mesh):
    test_overhead_is_of_the_same_work(parallel, capsys, monkeypatch, mesh)
