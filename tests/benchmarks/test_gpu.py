"""The GPU benchmark at smoke size on the CPU: real tokens, honest figures. No time and no size is asserted."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture
def worker(gpu, capsys, monkeypatch):
    """Measures a recipe in this process; what a worker hands back."""

    def run(name):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        gpu.main(["--cpu-smoke", "--worker", name])
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(gpu.common._MARK))
        return json.loads(line.removeprefix(gpu.common._MARK))

    return run


def test_sft_counts_real_tokens(gpu, worker, monkeypatch):
    original, seen = gpu.SFTModule.training_step, []

    def watched(module, batch, batch_idx):
        seen.append((module, batch.num_tokens))
        return original(module, batch, batch_idx)

    monkeypatch.setattr(gpu.SFTModule, "training_step", watched)
    found = worker("sft")
    assert [tokens for _, tokens in seen] == [2 * (6 + 4)] * 3
    assert all(p.requires_grad for p in seen[0][0].policy.parameters())
    assert found["tokens"] == 2 * 20, "the warm-up counts"
    assert found["seconds"] > 0 and len(set(found["losses"])) == 3


def test_ppo_counts_real_tokens(gpu, worker, monkeypatch):
    original, seen = gpu.PPOModule.micro_batches, []

    def watched(module, experience, chosen=None):
        seen.append((module, sum(tree.num_tokens for tree in experience.trees)))
        return original(module, experience, chosen)

    monkeypatch.setattr(gpu.PPOModule, "micro_batches", watched)
    found = worker("ppo_120m")
    assert {tokens for _, tokens in seen} == {2 * (6 + 4)}
    module = seen[0][0]
    assert module.policy.adapters.keys() == {"policy", "critic"}, "the backbone is not shared"
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert found["tokens"] == 2 * 20


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["zero2_offload", "gemini_offload"])
def test_offloading_runs(gpu, capsys, monkeypatch, name):
    pytest.importorskip("colossalai")
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    gpu.main([name, "--cpu-smoke"])
    header, _, line = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines())
    assert header == list(gpu.COLUMNS)
    assert line[0] == name
    assert int(line[1].replace(",", "")) > 2**20, "Gemini would make no chunks"


def test_recipes_are_of_the_size_they_say(gpu):
    recipe = gpu.RECIPES["ppo_120m"]
    parameters = gpu.num_parameters(gpu.model_config(recipe, 32_000))
    assert parameters == pytest.approx(120e6, rel=0.01)
    assert (recipe.goal, gpu.RECIPES["zero2_offload"].strategy) == (1.62, "colossalai_zero2_offload")
    options = gpu.parse(["ppo", "--width", "128", "--rows", "3"])
    assert gpu.recipe_of(options, "ppo")[3:6] == (128, 24, 3)


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_peaks_are_found_by_whole_words(gpu, card, peak):
    assert gpu.peak_of(card) == peak


def test_figures_follow_from_what_was_measured(gpu):
    meter = gpu.Clock(1, tokens=1000, seconds=2.0, extra_mib=2000.0)
    line = gpu.row("ppo_120m", gpu.RECIPES["ppo_120m"], 10**9, meter, 100.0)
    # 500 tokens/s * 6e9 operations = 3e12 of 1e14; 2000 MiB = 2.097e9 bytes
    assert line == ["ppo_120m", "1,000,000,000", "500", "3.0%", "2.10", "1.62 GB over by 0.48 GB"]
    meter.extra_mib = 1000.0
    assert gpu.row("ppo_120m", gpu.RECIPES["ppo_120m"], 10**9, meter, 100.0)[4:] == ["1.05", "1.62 GB met"]
    assert gpu.row("sft", gpu.RECIPES["sft"], 10**9, meter, None)[3:] == ["", "", ""]


def test_without_a_card_it_says_so(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"needs a CUDA card.*--cpu-smoke"):
        gpu.main(["sft"])


def test_unknown_card_needs_its_peak(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X1")
    with pytest.raises(SystemExit, match=r"NVIDIA X1.*--peak-tflops"):
        gpu.find_peak(gpu.parse([]))
    assert gpu.find_peak(gpu.parse(["--peak-tflops", "50"])) == 50
    assert "NVIDIA X1, 50" in capsys.readouterr().out


def test_worthless_training_is_refused(gpu):
    meter = gpu.Clock(1, losses=[1.0, float("nan")])
    with pytest.raises(RuntimeError, match="nan"):
        meter.finish()


@pytest.mark.parametrize(("arguments", "words"), [(["rlhf"], "no recipe rlhf"), (["--warmup", "0"], "at least 1")])
def test_what_can_not_be_measured_is_refused(gpu, capsys, arguments, words):
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert words in capsys.readouterr().err
