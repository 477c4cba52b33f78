"""Sequence parallelism on two processes against one: models, gradients, stages, checkpoints, what is refused."""

from pathlib import Path

import pytest
import torch
from curves import curve, largest_difference
from meshes import assert_same_run, assert_same_scores, run_cases, values
from processes import run_stages
from runs import load_script

HERE = Path(__file__).parent
RUN = HERE.parent / "run.py"
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt_neox", "gemma2")
OTHERS = ["one key-value head", "checkpointing", "checkpointing in full", "value head", "z-loss", "reward"]
OTHERS += ["reward lora", "critic", "five tokens"]
REFUSALS = {
    "padded": "sp=2 cuts packed rows, but the batches of policy (LlamaForCausalLM) are padded. Set load.layout to tree",
    "heads": "sp=2 does not divide the 3 attention heads of LlamaForCausalLM. Set sp to 3.",
    "no policy": "sp=2 cuts the rows of packed batches, and ModuleDict has no model that reads them (Policy, Rew",
    "rope": "sp=2 does not support LlamaForCausalLM with rope_type 'dynamic', whose angles depend on the longest",
}


# ------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks found, by case."""
    return run_cases(HERE / "run_sequence.py", tmp_path_factory.mktemp("cases"), 1)


@pytest.mark.parametrize("name", [*FAMILIES, *(f"{family} lora" for family in FAMILIES), *OTHERS])
def test_outputs_and_gradients_equal_one_process(found, name):
    for case in values(found, name):
        assert case["outputs"] < 5e-6 and case["gradients"] < 1e-5, case
        assert case["equal"] and case["undone"] == 0.0, case


def test_a_row_is_cut_within_a_branch(found):
    assert values(found, "cut") == [True, True]


def test_double_precision_shows_that_only_rounding_differs(found):
    for case in values(found, "fp64"):
        assert case["outputs"] < 1e-13 and case["gradients"] < 1e-12, case


def test_bf16_rounds_as_usual(found):
    for case in values(found, "bf16"):
        assert case["outputs"] < 3e-2 and case["gradients"] < 3e-2, case


def test_a_rank_without_scored_tokens(found):
    """Queries see one key, so the gradients of their weights are rounding, beside those of the whole model."""
    for case in values(found, "two tokens"):
        assert case["outputs"] < 5e-6 and case["all_gradients"] < 1e-5, case


def test_dropout_differs_on_other_tokens_and_heads(found):
    for case in values(found, "dropout"):
        assert case["differ"] and case["recomputed"] and case["states"]
        assert case["seen"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_noise_on_embeddings_is_that_of_one_process(found):
    for difference, effect in values(found, "noise"):
        assert difference < 5e-6 < 1e-3 < effect


def test_a_copy_of_a_model_runs_itself(found):
    assert max(values(found, "copied")) < 5e-6


def test_a_rank_keeps_its_share_of_the_activations(found):
    for one, two in values(found, "activations"):
        assert two < 0.55 * one, (one, two)  # masks are whole


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_run_is_refused_in_a_line(found, name):
    for said in values(found, name):
        assert REFUSALS[name] in said and "\n" not in said


# ------------------------------------------------------------------------------------------------- stages

#: Few steps each: gradients are compared above, and rounding grows.
STAGES = {
    "sft": (dict(stage="sft", max_steps=3, accumulate=2, clip=0.3, validate=True, neftune_alpha=5.0), "zero1"),
    "sft lora": (dict(stage="sft", max_steps=4, lora=True, checkpointing=True, save_every=2, export=True), "ddp"),
    "reward": (dict(stage="reward", max_steps=2, lr=1e-3, clip=0.3), "zero2"),
    "dpo": (dict(stage="dpo", max_steps=2, lora=True, lr=1e-3), "zero1"),
    "kto": (dict(stage="kto", max_steps=2, lr=1e-3), "ddp"),
    # at higher rates Adam amplifies rounding to more than 1e-5
    "ppo": (dict(stage="ppo", max_steps=2, lr=5e-4, max_norm=0.5, ptx_coef=0.5), "zero1"),
    "ppo lora": (dict(stage="ppo", max_steps=2, lr=3e-3, lora=True, max_norm=0.5, checkpointing=True), "ddp"),
    "ppo head": (dict(stage="ppo", max_steps=2, lr=5e-4, max_norm=0.5, critic_kind="head"), "zero2"),
    "grpo": (dict(stage="grpo", max_steps=2, lr=3e-3), "zero2"),
}


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory):
    """Runs of one process, and of two that share each row."""
    out = tmp_path_factory.mktemp("stages")
    one = load_script(RUN)
    for name, (options, _) in STAGES.items():
        (out / name).mkdir()
        one.run(str(tiny_model_dir), str(out / name), **options)
    meshed = {
        f"{name}, sp": dict(options, devices=2, strategy={"plugin": plugin, "sp": 2, "timeout": 600})
        for name, (options, plugin) in STAGES.items()
    }
    resumed = dict(stage="sft", max_steps=4, lora=True, checkpointing=True)
    meshed["resumed on ranks"] = dict(
        resumed, devices=2, strategy={"plugin": "zero2", "sp": 2}, ckpt=str(out / "sft lora" / "step=2.ckpt")
    )
    run_stages(tiny_model_dir, out, meshed)
    (out / "resumed on one").mkdir()
    ckpt = str(out / "sft lora, sp" / "step=2.ckpt")
    one.run(str(tiny_model_dir), str(out / "resumed on one"), **resumed, ckpt=ckpt)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_stages_have_the_curves_of_one_process(runs, name):
    assert_same_run(runs / f"{name}, sp", runs / name)


@pytest.mark.slow
def test_validation_is_that_of_one_process(runs):
    assert_same_scores(runs / "sft, sp", runs / "sft")


@pytest.mark.slow
def test_a_checkpoint_is_ordinary_and_goes_on_anywhere(runs):
    one, two = (torch.load(runs / name / "step=2.ckpt", weights_only=True) for name in ("sft lora", "sft lora, sp"))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():
        assert torch.allclose(value, two["state_dict"][key], atol=1e-5), key
    whole = curve(runs / "sft lora")
    for name in ("resumed on ranks", "resumed on one"):
        assert largest_difference(curve(runs / name)[1:], whole[-1:]) < 1e-5, name
    assert list((runs / "sft lora, sp" / "hf" / "last").iterdir())


# ------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_fewer_tokens_than_ranks(tmp_path):
    names = ("llama", "one key-value head", "two tokens", "five tokens", "critic")
    for side in run_cases(HERE / "run_sequence.py", tmp_path, 1, *names, ranks=4):
        for name, case in side.items():
            assert "Traceback" not in str(case), case
            gradients = case["all_gradients" if name == "two tokens" else "gradients"]
            assert case["outputs"] < 5e-6 and gradients < 1e-5, (name, case)


@pytest.mark.slow
def test_slices_of_layers_and_stretches_of_rows(tmp_path):
    names = ["llama", "qwen3 lora", "value head", "checkpointing", "two tokens", "reward lora"]
    for side in run_cases(HERE / "run_sequence.py", tmp_path, 2, *names, ranks=4):
        for name, case in side.items():
            assert "Traceback" not in str(case), case
            gradients = case["all_gradients" if name == "two tokens" else "gradients"]
            assert case["outputs"] < 5e-6 and gradients < 1e-5, (name, case)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_copies_with_different_data(tiny_model_dir, tmp_path):
    """Two copies of two ranks: the same curves as one process on the same global batches."""
    plugins = {"sft": "zero2", "reward": "ddp", "ppo": "zero1", "ppo lora": "ddp", "grpo": "ddp"}
    chosen = {name: {k: v for k, v in STAGES[name][0].items() if k != "neftune_alpha"} for name in plugins}
    run_stages(tiny_model_dir, tmp_path, chosen)
    axes = {f"{name}, sp": (name, {"sp": 2}) for name in chosen} | {"sft, both": ("sft", {"sp": 2, "tp": 2})}
    axes["ppo, both"] = ("ppo", {"sp": 2, "tp": 2})
    meshed = {
        place: dict(chosen[name], devices=4, strategy={"plugin": plugins[name], **sizes, "timeout": 600})
        for place, (name, sizes) in axes.items()
    }
    run_stages(tiny_model_dir, tmp_path, meshed)
    for place, (name, _) in axes.items():
        assert largest_difference(curve(tmp_path / place), curve(tmp_path / name)) < 1e-5, place


@pytest.mark.slow
def test_twenty_steps_in_double_precision(tiny_model_dir, tmp_path):
    run = dict(stage="sft", max_steps=20, clip=0.3, precision="64-true", lr=1e-2)
    both = {"full": run, "lora": dict(run, lora=True)}
    run_stages(tiny_model_dir, tmp_path, both)
    mesh = dict(devices=2, strategy={"plugin": "ddp", "sp": 2, "timeout": 600})
    run_stages(tiny_model_dir, tmp_path, {f"{name}, sp": dict(options, **mesh) for name, options in both.items()})
    for name in both:
        a, b = (torch.load(tmp_path / place / "weights.pt") for place in (f"{name}, sp", name))
        assert max((a[k].double() - b[k].double()).abs().max().item() for k in a) < 1e-9
