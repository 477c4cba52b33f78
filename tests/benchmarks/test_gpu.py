"""The GPU benchmark at smoke size on the CPU: real tokens, honest figures. No time and no size is asserted."""

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu(load_benchmark):
    return load_benchmark("gpu")


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


@pytest.mark.parametrize("name", ["sft_7b_lora", "ppo_7b_nf4"])
def test_a_large_model_is_loaded_from_disk_under_adapters(gpu, worker, monkeypatch, name):
    if gpu.RECIPES[name].quantization is not None:
        pytest.importorskip("bitsandbytes")
    seen, kind = [], gpu.SFTModule if name.startswith("sft") else gpu.PPOModule
    original = kind.on_train_start
    monkeypatch.setattr(kind, "on_train_start", lambda module: (seen.append(module), original(module)))
    found = worker(name)
    frozen = {p.dtype for p in seen[0].policy.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16} | ({torch.uint8} if name == "ppo_7b_nf4" else set())
    assert {p.dtype for p in seen[0].parameters() if p.requires_grad} == {torch.float32}
    assert found["tokens"] == 2 * 20


def test_a_compiled_recipe_compiles_its_policy(gpu, worker, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **settings: compiled.append((module, settings)))
    worker("sft")
    assert not compiled
    worker("sft_compile")
    ((policy, settings),) = compiled
    assert type(policy).__name__ == "Policy" and settings == {"backend": "eager"}


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
    assert (recipe.goal, gpu.RECIPES["zero2_offload"].strategy) == (1.0, "colossalai_zero2_offload")
    sizes = {name: gpu.num_parameters(gpu.model_config(gpu.RECIPES[name], 32_000)) for name in ("sft", "sft_7b_lora")}
    assert sizes == {"sft": pytest.approx(1e9, rel=0.1), "sft_7b_lora": pytest.approx(6.7e9, rel=0.05)}
    for name in ("sft", "sft_compile", "sft_7b_lora"):
        assert gpu.RECIPES[name].length + gpu.RECIPES[name].new == 2048
    assert gpu.RECIPES["sft_compile"].compiled and gpu.RECIPES["ppo_7b_nf4"].quantization == "nf4"
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
    assert line == ["ppo_120m", "1,000,000,000", "500", "3.0%", "2.10", "1.0 GB over by 1.10 GB"]
    sft = gpu.row("sft", gpu.RECIPES["sft"]._replace(goal=2.0), 10**9, meter, 100.0)
    assert sft[5] == "2.0 GB over by 0.10 GB, MFU 45% short by 42.0%"
    meter.extra_mib = 900.0
    assert gpu.row("ppo_120m", gpu.RECIPES["ppo_120m"], 10**9, meter, 100.0)[4:] == ["0.94", "1.0 GB met"]
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


# ------------------------------------------------------------------------------------------------- --check and --all


def test_a_fault_costs_one_step_and_each_line_is_written_as_it_comes(gpu, tmp_path):
    out = tmp_path / "runs" / "gpu.jsonl"
    python, step = gpu.schedule.python, gpu.schedule.Step
    say = tmp_path / "say.py"
    say.write_text(
        "import json, sys, time\n"
        "print('RESULT ' + json.dumps({'figure': 1.5}), flush=True)\n"
        "time.sleep(float(sys.argv[1]))\n"
        f"print(len(open({str(out)!r}).readlines()))\n"
        "sys.exit(sys.argv[2])\n"
    )
    say.write_text(say.read_text().replace("sys.exit(sys.argv[2])", "sys.exit(sys.argv[2] or 0)"))
    silent = tmp_path / "silent.py"
    silent.write_text("print('nothing')")
    steps = [
        step("good", python(silent.with_name("good.py"))),
        step("faulty", python(say, "0", "a fault")),
        step("slow", python(say, "60", ""), 6.0),
        step("silent", python(silent)),
    ]
    silent.with_name("good.py").write_text("print('RESULT {\"figure\": 2}')")
    found = gpu.schedule.run_steps(steps, 5.0, out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == found
    assert [(line["step"], line["status"]) for line in found] == [
        ("good", "ok"), ("faulty", "failed"), ("slow", "timeout"), ("silent", "failed"),
    ]  # fmt: skip
    assert found[0]["figure"] == 2 and found[1]["figure"] == 1.5, "what was said before the fault is kept"
    assert found[1]["end"].splitlines() == ["1", "a fault"], "the line before was not on the disk"
    assert found[2]["seconds"] < 30 and found[3]["end"] == "nothing"


def test_what_has_no_time_is_noted(gpu, tmp_path):
    start = time.monotonic()
    steps = [gpu.schedule.Step(name, ["false"]) for name in ("one", "other")]
    found = gpu.schedule.run_steps(steps, 0.01, tmp_path / "gpu.jsonl")
    assert [line["status"] for line in found] == ["no time"] * 2 and time.monotonic() - start < 5


def test_the_most_valuable_is_first(gpu):
    check = [step.name for step in gpu.steps_of(gpu.parse(["--check", "--cpu-smoke"]))]
    every = [step.name for step in gpu.steps_of(gpu.parse(["--all", "--minutes", "8"]))]
    assert check[:2] == ["card", "trees"] and check[-1] == "gemini_offload" and "decode" not in check
    assert set(check) < set(every) and every[-1] == "gemini_offload, figures"
    assert every.index("decode") < every.index("zero2"), "what compiles for minutes comes last"
    toy = [step.name for step in gpu.steps_of(gpu.parse(["--all", "--cpu-smoke"]))]
    assert {*every} - {*toy} == {"gemini_auto"}, "which measures the card's memory"
    assert {name.removesuffix(", figures") for name in every if name.endswith("figures")} == set(gpu.RECIPES)


@pytest.mark.parametrize("given", [["--check", "--all"], ["--check", "sft"], ["--minutes", "3"]])
def test_what_does_not_go_together_is_refused(gpu, given, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(given)
    assert "--check" in capsys.readouterr().err


@pytest.fixture(scope="module")
def checks(gpu):
    spec = importlib.util.spec_from_file_location("benchmarks_gpu_checks", BENCHMARKS / "gpu_checks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", ["card", "trees", "greedy", "static", "ppo", "exports", "resume", "decode", "head", "groups", "serve_4bit"]
)
def test_a_check_runs_at_toy_size(checks, name, tmp_path):
    before = torch.are_deterministic_algorithms_enabled()
    try:
        found = {**checks.CHECKS, **checks.FIGURES}[name](checks.Place(True, tmp_path))
    finally:
        torch.use_deterministic_algorithms(before)
    assert found and json.dumps(found)


def test_a_figure_beyond_its_bound_ends_with_an_error(checks, capsys):
    with pytest.raises(SystemExit, match=r"difference is 0.2, above 0.1"):
        checks.expect({"other": 1}, "difference", 0.2, 0.1)
    assert json.loads(capsys.readouterr().out.removeprefix("RESULT ")) == {"other": 1, "difference": 0.2}
    with pytest.raises(SystemExit):
        checks.expect({}, "difference", float("nan"), 0.1)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["zero2", "zero2_offload", "gemini", "gemini_offload"])
def test_a_sharded_check_runs_at_toy_size(gpu, name, tmp_path, monkeypatch):
    pytest.importorskip("colossalai")
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    command = gpu.schedule.python(BENCHMARKS / "gpu_checks.py", name, "--cpu-smoke")
    [found] = gpu.schedule.run_steps([gpu.schedule.Step(name, command, 250.0)], 5.0, tmp_path / "gpu.jsonl")
    assert found["status"] == "ok", found
