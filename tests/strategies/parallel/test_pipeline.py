"""Pipeline parallelism on two processes against one: models, gradients, stages, checkpoints, bad ends."""

from pathlib import Path

import pytest
import torch
from curves import curve, largest_difference
from meshes import assert_same_run, assert_same_scores, run_cases, values
from processes import run_stages
from runs import load_script
from transformers import AutoModelForCausalLM

from lightning_rlhf.data.packed import Branch, Tree, deal, pack
from lightning_rlhf.strategies import ColossalAIStrategy
from lightning_rlhf.strategies.parallel.pipeline import stage_layers

HERE = Path(__file__).parent
cases = load_script(HERE / "run_pipeline.py")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
REFUSALS = {
    "too many stages": "pp=3 is more than the 2 layers of LlamaForCausalLM. Set pp to 2.",
    "no model": "pp=2 runs models that read packed batches (lightning_rlhf.models.Policy, RewardModel and others), and "
    "ModuleList has none. Leave out pp, or use tp, which cuts any transformers model.",
    "foreign": "and ModuleList has none.",
    "quantized": "pp does not cut LlamaForCausalLM, because its weights are quantized.",
    "encoder": "BertForSequenceClassification has no 'score' head behind its layers, so pp cannot cut it.",
    "unlike layers": "LlamaForCausalLM has no plain list of 2 layers, which pp could deal to ranks.",
    "half cut": "pp=9 is more than the 2 layers of LlamaForCausalLM. Set pp to 2.",
    "idle stage": "Stage 0 of pp=2 (from 0) trains none of its parameters, which plugin='ddp' does not support.",
    "shared layers": "pp cannot train model.model.layers.0.self_attn.q_proj.weight of LlamaForCausalLM, which several",
}
TIED = ("gemma2", "gemma2 lora", "checkpointing", "one micro-batch", "fp64")
EXACT = [name for name in cases.CASES if name not in (*REFUSALS, "bf16", "dropout", "noise")]


def test_layers_are_dealt_to_stages():
    for layers in range(2, 12):
        for stages in range(2, layers + 1):
            dealt = stage_layers(layers, stages)
            assert [i for start, end in dealt for i in range(start, end)] == list(range(layers))
            sizes = [end - start for start, end in dealt]
            assert min(sizes) == sizes[-1] >= 1 and max(sizes) - min(sizes) <= 1


def test_a_batch_is_dealt_to_micro_batches():
    trees = [
        Tree(range(3, 3 + i), [Branch(range(10, 12 + i), [True] * (1 + i) + [False]) for _ in range(k)], weight=i)
        for i, k in enumerate((1, 2, 4, 1, 3), 1)
    ]
    batch = pack(trees)
    for parts in range(1, 7):
        found = deal(batch, parts)
        assert 1 <= len(found) <= min(parts, 5) and len(found) >= min(parts, 3)
        start = 0
        for part in found:
            want = pack(trees[start : start + len(part.forest.trees)])
            start += len(part.forest.trees)
            for name in ("input_ids", "position_ids", "predictor", "target", "sequence", "last", "weight"):
                assert torch.equal(getattr(part, name), getattr(want, name)), name
            assert part.forest.trees == want.forest.trees and part.totals == batch.totals
        assert start == 5


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(plugin="gemini", pp=2), "pp deals layers to ranks, and Gemini's chunks span them. Use plugin zero1 or"),
        (dict(plugin="zero1", pp=2, checkpoint="sharded"), "Use checkpoint='full'."),
        (dict(plugin="zero1", pp=2, sp=2), "pp and sp do not go together, since both cut rows. Leave out one; tp goes"),
        (dict(plugin="zero1", pp=0), "pp must be a whole number from 1 on; got 0."),
        (dict(plugin="zero1", pp=2, micro_batches=0), "micro_batches must be a whole number from 1 on; got 0."),
    ],
)
def test_arguments_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        ColossalAIStrategy(**options)


# ------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks found, by case."""
    return run_cases(HERE / "run_pipeline.py", tmp_path_factory.mktemp("cases"))


def assert_exact(name, sides):
    """What each rank found is what one process finds."""
    for case in sides:
        assert case["outputs"] < 5e-6 and case["gradients"] < 1e-5, case
        assert case["without gradients"] < 5e-6 and case["again"] < 5e-6
        assert (case["layout"] == "padded") == (name == "padded")
        assert case["names"] and case["whole"] and case["alone"] == case["undone"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_results_and_gradients_equal_one_process(found, name):
    assert_exact(name, values(found, name))
    # a weight that is embeddings and head lies at both ends
    assert found[0][name]["share"] + found[1][name]["share"] < (1.2 if name in TIED else 1.001)


@pytest.mark.slow
def test_bf16_rounds_as_usual(found):
    for case in values(found, "bf16"):
        assert case["outputs"] < 3e-2 and case["gradients"] < 3e-2


@pytest.mark.slow
def test_stages_and_micro_batches_drop_out_apart(found):
    for case in values(found, "dropout"):
        assert case["parts"] and case["stages"] and case["recomputed"] and case["states"], case
        assert case["seen"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.slow
def test_noise_on_embeddings_is_distributed_as_in_one_process(found):
    first, _ = values(found, "noise")
    assert 0.99 < first["most"] <= 1 + 1e-5 and first["square"] == pytest.approx(1 / 3, rel=0.1) and first["parts"]
    for case in values(found, "noise"):
        assert case["effect"] > 1e-3 and case["alike"] and case["states"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_cut_is_refused_in_a_line(found, name):
    for said in values(found, name):
        assert REFUSALS[name] in said and "\n" not in said


# ------------------------------------------------------------------------------------------------- stages

#: Few steps each: gradients are compared above, and rounding grows.
STAGES = {
    "sft": (dict(stage="sft", max_steps=4, accumulate=2, clip=0.3, validate=True, win_rate=2), "zero1"),
    "sft lora": (dict(stage="sft", max_steps=4, lora=True, checkpointing=True, save_every=2, export=True), "ddp"),
    "reward": (dict(stage="reward", max_steps=3, lr=1e-3, clip=0.1), "ddp"),
    "dpo": (dict(stage="dpo", max_steps=2, lora=True, lr=1e-3), "zero1"),
    "kto": (dict(stage="kto", max_steps=2, lr=1e-3), "zero2"),
    # at higher rates Adam amplifies rounding to more than 1e-5
    "ppo": (dict(stage="ppo", max_steps=2, lr=5e-4, max_norm=0.5, ptx_coef=0.5), "zero2"),
    "ppo head": (dict(stage="ppo", max_steps=2, lr=5e-4, critic_kind="head", trunk_grad=0.5, max_norm=0.5), "zero1"),
    "ppo lora": (dict(stage="ppo", max_steps=2, lr=3e-3, lora=True, max_norm=0.5, checkpointing=True), "ddp"),
    "grpo": (dict(stage="grpo", max_steps=2, lr=3e-3), "zero1"),
}


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory):
    """Runs of one process, and of two that hold the model together."""
    out = tmp_path_factory.mktemp("stages")
    run_stages(tiny_model_dir, out, {name: options for name, (options, _) in STAGES.items()})
    mesh = {"timeout": 600, "micro_batches": 3}
    meshed = {
        f"{name}, pp": dict(options, devices=2, strategy={"plugin": plugin, "pp": 2, **mesh})
        for name, (options, plugin) in STAGES.items()
    }
    resumed = dict(stage="sft", max_steps=4, lora=True, checkpointing=True, devices=2)
    for written, axis, plugin in (
        ("sft lora", "pp", "zero1"),
        ("sft lora, pp", "pp", "ddp"),
        ("sft lora, pp", "tp", "zero2"),
    ):
        meshed[f"{written}, resumed on {axis}"] = dict(
            resumed, strategy={"plugin": plugin, axis: 2, **mesh}, ckpt=str(out / written / "step=2.ckpt")
        )
    run_stages(tiny_model_dir, out, meshed)
    alone = dict(resumed, devices=1, ckpt=str(out / "sft lora, pp" / "step=2.ckpt"))
    run_stages(tiny_model_dir, out, {"resumed on one": alone})
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_stages_have_the_curves_of_one_process(runs, name):
    assert_same_run(runs / f"{name}, pp", runs / name)


@pytest.mark.slow
def test_validation_and_win_rates_are_those_of_one_process(runs):
    assert_same_scores(runs / "sft, pp", runs / "sft")
    pairs = [(runs / name / "win_rate.jsonl").read_text() for name in ("sft, pp", "sft")]
    assert pairs[0] == pairs[1] and len(pairs[0].splitlines()) == 6


@pytest.mark.slow
def test_a_checkpoint_is_whole_and_goes_on_anywhere(runs):
    one, two = (torch.load(runs / name / "step=2.ckpt", weights_only=True) for name in ("sft lora", "sft lora, pp"))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():
        assert torch.allclose(value, two["state_dict"][key], atol=1e-5), key
    states = [c["optimizer_states"][0]["state"] for c in (one, two)]
    assert list(states[0]) == list(states[1])
    for number, entry in states[0].items():
        for key, value in entry.items():
            assert torch.allclose(value.float(), states[1][number][key].float(), atol=1e-5), (number, key)
    whole = curve(runs / "sft lora")
    for name in (
        "sft lora, resumed on pp",
        "sft lora, pp, resumed on pp",
        "sft lora, pp, resumed on tp",
        "resumed on one",
    ):
        assert largest_difference(curve(runs / name)[1:], whole[-1:]) < 1e-5, name


@pytest.mark.slow
def test_an_export_is_whole(runs):
    one, two = (
        AutoModelForCausalLM.from_pretrained(runs / name / "hf" / "last") for name in ("sft lora", "sft lora, pp")
    )
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


# ------------------------------------------------------------------------------------------------- more ranks, bad ends


@pytest.mark.slow
@pytest.mark.parametrize("stages", [3, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_stages_between_the_ends(tmp_path, stages):
    """Those neither embed nor score: they run what they receive, and send it on."""
    found = run_cases(HERE / "run_pipeline.py", tmp_path, ranks=stages)
    for name in cases.SEVERAL:
        assert_exact(name, values(found, name))


@pytest.mark.slow
def test_four_ranks(tiny_model_dir, tmp_path):
    """tp x pp, and pp with two copies: the same curves as one process on the same global batches."""
    chosen = {name: STAGES[name][0] for name in ("sft", "sft lora", "reward", "ppo")}
    run_stages(tiny_model_dir, tmp_path, chosen)
    meshes = {
        "sft": {"plugin": "zero2", "pp": 2},
        "sft lora": {"plugin": "zero1", "pp": 2, "tp": 2},
        "reward": {"plugin": "ddp", "pp": 2},
        "ppo": {"plugin": "zero1", "pp": 2, "tp": 2},
    }
    meshed = {
        f"{name}, pp": dict(chosen[name], devices=4, strategy={**mesh, "timeout": 600}) for name, mesh in meshes.items()
    }
    run_stages(tiny_model_dir, tmp_path, meshed)
    for name in chosen:
        assert largest_difference(curve(tmp_path / f"{name}, pp"), curve(tmp_path / name)) < 1e-5, name
    one, two = (torch.load(tmp_path / n / "step=2.ckpt", weights_only=True) for n in ("sft lora", "sft lora, pp"))
    for key, value in one["state_dict"].items():
        assert torch.allclose(value, two["state_dict"][key], atol=1e-5), key


@pytest.mark.slow
def test_twenty_steps_in_double_precision(tiny_model_dir, tmp_path):
    run = dict(stage="sft", max_steps=20, clip=0.3, precision="64-true", lr=1e-2)
    both = {"full": run, "lora": dict(run, lora=True)}
    run_stages(tiny_model_dir, tmp_path, both)
    mesh = dict(devices=2, strategy={"plugin": "ddp", "pp": 2, "timeout": 600})
    run_stages(tiny_model_dir, tmp_path, {f"{name}, pp": dict(options, **mesh) for name, options in both.items()})
    for name in both:
        a, b = (torch.load(tmp_path / place / "weights.pt") for place in (f"{name}, pp", name))
        assert max((a[k].double() - b[k].double()).abs().max().item() for k in a) < 1e-9


@pytest.mark.slow
def test_a_killed_rank_ends_the_others(tiny_model_dir, tmp_path):
    mesh = dict(devices=2, strategy={"plugin": "zero1", "pp": 2, "timeout": 120})
    run = dict(stage="sft", max_steps=20, save_every=2, kill=[1, 5], **mesh)
    done = run_stages(tiny_model_dir, tmp_path, {"killed": run}, check=False)
    assert done.returncode != 0 and not (tmp_path / "killed" / "curve.json").exists()
    assert "Connection closed by peer" in done.stderr or "Connection reset" in done.stderr, done.stderr[-2000:]
    checkpoint = torch.load(sorted((tmp_path / "killed").glob("step=*.ckpt"))[-1], weights_only=True)
    assert checkpoint["global_step"] == 4


@pytest.mark.slow
def test_a_world_that_stages_do_not_divide(tiny_model_dir, tmp_path):
    run = dict(stage="sft", max_steps=2, strategy={"plugin": "ddp", "pp": 2, "timeout": 600})
    done = run_stages(tiny_model_dir, tmp_path, {"one": run}, check=False)
    assert "pp=2 does not divide the 1 processes of the run" in done.stderr
