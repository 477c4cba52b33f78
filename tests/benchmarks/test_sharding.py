"""The sharding benchmark at smoke size: real storages, each once, and an honest table. No time is asserted."""

from pathlib import Path

import pytest
import torch
from tables import cells

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--width", "64", "--layers", "1", "--vocab-size", "64", "--length", "8"]


@pytest.fixture(scope="module")
def sharding(load_benchmark):
    return load_benchmark("sharding")


def case(sharding, strategy, precision="32-true"):
    return next(c for c in sharding.CASES if (c.strategy, c.precision) == (strategy, precision))


# ---------------------------------------------------------------------------------------------- counting


def test_storages_count_once_and_whole(sharding):
    weight = torch.zeros(10)
    bucket = torch.zeros(100, dtype=torch.bfloat16)
    released = torch.zeros(7)
    released.untyped_storage().resize_(0)
    found = sharding.count({"weights": [weight, weight.view(2, 5), released], "gradients": [bucket[:3], weight[:2]]})
    assert found == {"weights": (40, 10), "gradients": (200, 100)}, "a view keeps all of its storage alive"


def test_every_living_tensor_is_found(sharding):
    forgotten = torch.zeros(123_457)
    assert any(t is forgotten for t in sharding.living_tensors())


def test_tensors_of_the_compiler_are_no_memory(sharding):
    traced = []

    def keep(graph, inputs):
        traced.extend(node.meta["example_value"] for node in graph.graph.nodes if "example_value" in node.meta)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=keep)(torch.zeros(3))
    assert traced and all(t.device.type == "cpu" for t in traced)
    assert not any(t is fake for t in sharding.living_tensors() for fake in traced)


def test_plain_training_holds_what_it_must(sharding):
    """One process without a strategy: 4 bytes of weight, 4 of gradient and 8 of states a parameter."""
    options = sharding.parse([*SMALL, "--ranks", "1"])
    module, counted = sharding.Causal(options), sharding.Count(options.steps)
    sharding.common.make_trainer(options.steps, counted, accelerator="cpu", devices=1).fit(module)
    parameters = sharding.num_parameters(sharding.model_config(options))
    assert parameters == sum(p.numel() for p in module.parameters())
    held = counted.held
    assert held["weights"] == held["gradients"] == (4 * parameters, parameters)
    steps = len(list(module.parameters()))
    assert held["optimizer states"] == (8 * parameters + 4 * steps, 2 * parameters + steps)
    assert held["fp32 weights"] == (0, 0)


def test_ranks_have_batches_of_their_own(sharding):
    options = sharding.parse(SMALL)
    first, second = (sharding.batches(options, rank) for rank in (0, 1))
    assert [tuple(b.shape) for b in first] == [(1, 8)] * 4
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], first[1])
    assert torch.equal(first[0], sharding.batches(options, 0)[0])


# ---------------------------------------------------------------------------------------------- tables


def test_shares_are_held_against_the_ideal(sharding):
    ddp = {k: sharding.Held(n * 4, n) for k, n in zip(sharding.KINDS, (100, 0, 100, 200), strict=True)}
    half = {k: sharding.Held(n * 4, n) for k, n in zip(sharding.KINDS, (100, 0, 54, 100), strict=True)}
    zero2 = case(sharding, "colossalai_zero2")
    assert sharding.share_rows(zero2, 2, half, ddp)[3:] == ["1.000, 1", "none", "0.540, 0.5", "0.500, 0.5", "yes"]
    zero1 = case(sharding, "colossalai_zero1")
    assert sharding.share_rows(zero1, 2, half, ddp)[-1] == "no: gradients 0.54 times the ideal"
    assert sharding.share_rows(zero2, 4, half, ddp)[-1] == (
        "no: gradients 2.16 times the ideal, optimizer states 2.00 times the ideal"
    )
    masters = half | {"fp32 weights": sharding.Held(200, 50)}
    gemini = case(sharding, "colossalai_gemini", "bf16-mixed")
    assert sharding.share_rows(gemini, 2, masters, ddp)[3:] == [
        "1.000, 0.5",
        "0.500, 0.5",
        "0.540, 0.5",
        "0.500, 0.5",
        "no: weights 2.00 times the ideal",
    ]


def test_bytes_are_a_parameter(sharding):
    held = {k: sharding.Held(n, 0) for k, n in zip(sharding.KINDS, (200, 200, 100, 400), strict=True)}
    line = sharding.byte_rows(
        case(sharding, "colossalai_zero2"), 2, held | {"others": sharding.Held(1234, 1)}, 100, 18.0
    )
    assert line == ["colossalai_zero2", "32-true", "2", "2.00", "2.00", "1.00", "4.00", "9.00", "0.500", "1,234"]


def test_overhead_is_the_median_of_pairs(sharding):
    def pairs(*seconds, difference=0.0):
        return [sharding.Pair(ours, bare, difference) for ours, bare in seconds]

    # together 11/10, 12/10, 30/10
    ranks = [pairs((5, 4), (6, 4), (20, 5)), pairs((6, 6), (6, 6), (10, 5), difference=1e-6)]
    line = sharding.overhead_row(2, ranks)
    assert line[:5] == ["2", "3", "12.0000 s", "10.0000 s", "+2000.0 ms"]
    assert line[5] == "1.200x"
    assert line[6:] == ["1.100 to 3.000", "1.100 to 3.000", "1.0e-06"]
    low, high = sharding.bootstrap([1.0] * 20 + [1.1] * 20)
    assert low == 1.0 and high == 1.1


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--steps", "1"], "at least 2"), (["--overhead", "--warmup", "0"], "at least 1")]
)
def test_what_can_not_be_measured_is_refused(sharding, capsys, arguments, words):
    with pytest.raises(SystemExit):
        sharding.parse(arguments)
    assert words in capsys.readouterr().err


def test_failed_ranks_say_why(sharding, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    with pytest.raises(RuntimeError, match="no_such_strategy"):
        sharding.launch(sharding.parse(SMALL), 1, ["--worker", "no_such_strategy", "--precision", "32-true"])


# ---------------------------------------------------------------------------------------------- real ranks


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_share_all_under_gemini(sharding, capsys, monkeypatch):
    pytest.importorskip("colossalai")
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    small = [*SMALL, "--ranks", "2", "--min-chunk-elements", "8192"]
    sharding.main([*small, "--strategies", "colossalai_gemini"])
    header, ddp, gemini, header_of_shares, shares = cells(capsys.readouterr().out)
    assert (header, header_of_shares) == (list(sharding.BYTE_COLUMNS), list(sharding.SHARE_COLUMNS))
    assert ddp[:8] == ["ddp", "32-true", "2", "4.00", "0.00", "4.00", "8.00", "16.00"]
    assert gemini[0] == shares[0] == "colossalai_gemini"
    assert shares[-1] == "yes"
    assert float(gemini[7]) == pytest.approx(8, rel=0.1)
    assert int(gemini[-1].replace(",", "")) < 10_000, "tensors that nobody counts"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.exhaustive
def test_two_ranks_share_states_alone_under_zero1(sharding, monkeypatch):
    pytest.importorskip("colossalai")
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    options = sharding.parse(SMALL)
    held = sharding.measure(options, case(sharding, "colossalai_zero1"), 2)
    parameters = sharding.num_parameters(sharding.model_config(options))
    elements = {kind: held[kind].elements / parameters for kind in sharding.KINDS}
    assert elements == pytest.approx({"weights": 1, "fp32 weights": 0, "gradients": 1, "optimizer states": 1}, rel=0.01)
    assert held["others"].bytes < 10_000, "tensors that nobody counts"


@pytest.mark.slow
@pytest.mark.distributed
def test_overhead_is_of_the_same_work(sharding, capsys, monkeypatch):
    pytest.importorskip("colossalai")
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    sharding.main([*SMALL, "--overhead", "--ranks", "2", "--steps", "3", "--rows", "2"])
    header, line = cells(capsys.readouterr().out)
    assert header == list(sharding.OVERHEAD_COLUMNS)
    assert line[:2] == ["2", "3"] and line[4].endswith(" ms") and line[5].endswith("x")
    assert float(line[-1]) < 1e-6
