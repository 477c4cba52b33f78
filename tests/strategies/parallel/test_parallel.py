"""Tensor parallelism on two processes against one: models, gradients, samples, stages, checkpoints, bad ends."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from curves import curve, largest_difference
from meshes import assert_same_run, assert_same_scores, run_cases, values
from processes import run_stages
from runs import load_script
from transformers import AutoModelForCausalLM

from lightning_rlhf.strategies import ColossalAIStrategy
from lightning_rlhf.strategies.parallel import check_world
from lightning_rlhf.strategies.parallel.functions import part_of
from lightning_rlhf.utils.collectives import Ranks

HERE = Path(__file__).parent
RUN = HERE.parent / "run.py"
cases = load_script(HERE / "run_parallel.py")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
#: Mistral's layers are Llama's, and "checkpointing" is Qwen 2 with LoRA.
FAMILIES = [*cases.FAMILIES, *(f"{family} lora" for family in cases.FAMILIES if family not in ("mistral", "qwen2"))]
OTHERS = ["checkpointing", "lora on the head", "value head", "padded", "reward", "reward lora", "critic", "new tokens"]
RUNS_HERE = "Llama, Mistral, Qwen 2, Qwen 3, Gemma, Gemma 2, GPT-NeoX, Phi, Granite and Cohere run, for instance."
REFUSALS = {
    "no plan": f"GPT2LMHeadModel cannot be cut: transformers has no tensor-parallel plan for it. {RUNS_HERE}",
    "fused": "Phi3ForCausalLM cannot be cut: transformers' plan has layers.0.self_attn.",
    "heads": "tp=2 does not divide the 3 attention heads and the 3 key-value heads of LlamaForCausalLM. No tp does",
    "width": "tp=2 does not divide the 57 features of the inner layers of LlamaForCausalLM.",
    "dora": "Tensor parallelism does not cut DoRA's adapters (layers.0.self_attn.q_proj)",
    "no model": "tp=2 cuts transformers models, and ModuleList has none. Leave out tp.",
    "incomplete plan": "transformers' plan leaves out layers.0.mlp.down_proj.weight.",
}


@pytest.mark.parametrize(
    "sizes, world, said",
    [
        (dict(tp=2, sp=1), 3, "tp=2 does not divide the 3 processes"),
        (dict(tp=2, sp=2), 6, "tp=2 x sp=2 does not divide the 6 processes"),
        (dict(tp=1, sp=4), 6, "Use a multiple of 4 processes, or a product of 1 or 2 or 3 or 6."),
    ],
)
def test_a_copy_that_does_not_divide_the_world(sizes, world, said):
    with pytest.raises(ValueError, match=said):
        check_world(sizes, world)
    check_world(sizes, 4 * world)


def test_parts_cover_a_dimension():
    for size in range(4, 12):
        for count in (1, 2, 3, 4):
            ranks = Ranks(tuple(range(count)), 0)
            parts = [part_of(size, ranks, i) for i in range(count)]
            assert parts[0][0] == 0 and sum(length for _, length in parts) == size
            assert all(a + n == b for (a, n), (b, _) in pairwise(parts))
            lengths = [length for _, length in parts]
            assert max(lengths) - min(lengths) <= 1 and max(lengths) == -(-size // count)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(plugin="gemini", tp=2), "tp cuts layers, and Gemini's chunks hold whole ones. Use plugin zero1 or zero2"),
        (dict(plugin="zero1", tp=2, checkpoint="sharded"), "Use checkpoint='full'."),
        (dict(plugin="zero1", tp=0), "tp must be a whole number from 1 on; got 0."),
        (dict(plugin="gemini", sp=2), "sp does not support Gemini's chunks. Use plugin ddp, zero1 or zero2 with sp."),
        (dict(plugin="zero1", sp=True), "sp must be a whole number from 1 on; got True."),
        (dict(plugin="zero1", tp=1.5), "tp must be a whole number from 1 on; got 1.5."),
        (dict(plugin="hybrid"), "Tensor parallelism is tp, an argument of the first three."),
    ],
)
def test_arguments_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        ColossalAIStrategy(**options)


# ------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks found, by case."""
    return run_cases(HERE / "run_parallel.py", tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_outputs_gradients_and_norms_equal_one_process(found, name):
    for case in values(found, name):
        assert case["outputs"] < 5e-6 and case["gradients"] < 1e-5, case
        assert case["norm"] < 5e-6 and case["clipped"] < 1e-5, case
        assert case["layout"] == ("padded" if name == "padded" else "tree")
        # embeddings and head are whole where rows of new tokens are trained
        assert case["share"] < (0.7 if name == "new tokens" else 0.56)
        assert case["whole"] and case["undone"] == 0.0, "the weights, or what they give, changed"


def test_bf16_rounds_as_usual(found):
    for case in values(found, "bf16"):
        assert case["outputs"] < 3e-2 and case["gradients"] < 3e-2


def test_scored_head_over_an_uneven_vocabulary(found):
    assert max(values(found, "scored head")) < 1e-12


def test_a_transformers_model_of_ones_own_has_whole_logits(found):
    assert max(values(found, "foreign")) < 1e-5


@pytest.mark.parametrize("name", ["rollout llama", "rollout qwen3 lora", "generate"])
def test_samples_are_those_of_one_process(found, name):
    for case in values(found, name):
        assert case["equal"] and case["ranks"] and case["finite"] and case["tokens"] > 50


def test_dropout_differs_where_activations_are_cut_only(found):
    for case in values(found, "dropout"):
        assert case["same"] and case["differ"] and case["recomputed"] and case["states"]
        assert case["seen"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_groups_of_a_mesh(found):
    for rank, members in enumerate(values(found, "grid")):
        assert members["data"] == members["tensor"] == members["pipe"] == (rank,)
        assert members["sequence"] == members["copy"] == members["replicas"] == (0, 1)


def test_one_rank_decides_for_its_copy(found):
    assert values(found, "verdicts") == [
        ((40, 0), "IndexError: list index out of range"),
        ((40, 0), "RuntimeError: Rank 0 failed. IndexError: list index out of range"),
    ]


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_cut_is_refused_in_a_line(found, name):
    for said in values(found, name):
        assert REFUSALS[name] in said and "\n" not in said


# ------------------------------------------------------------------------------------------------- stages

#: Few steps each: gradients are compared above, and rounding grows.
STAGES = {
    "sft": (dict(stage="sft", max_steps=4, accumulate=2, clip=0.3, validate=True, win_rate=2), "zero1"),
    "sft lora": (dict(stage="sft", max_steps=4, lora=True, checkpointing=True, save_every=2, export=True), "ddp"),
    "reward": (dict(stage="reward", max_steps=3, lr=1e-3), "ddp"),
    "dpo": (dict(stage="dpo", max_steps=2, lora=True, lr=1e-3), "zero1"),
    "kto": (dict(stage="kto", max_steps=2, lr=1e-3), "ddp"),
    # at higher rates Adam amplifies rounding to more than 1e-5
    "ppo": (dict(stage="ppo", max_steps=2, lr=5e-4, max_norm=0.5, ptx_coef=0.5), "zero2"),
    "ppo lora": (dict(stage="ppo", max_steps=2, lr=3e-3, lora=True, max_norm=0.5, checkpointing=True), "ddp"),
    "grpo": (dict(stage="grpo", max_steps=2, lr=3e-3), "zero1"),
}


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory):
    """Runs of one process, and of two that hold the model together."""
    out = tmp_path_factory.mktemp("stages")
    one = load_script(RUN)
    for name, (options, _) in STAGES.items():
        (out / name).mkdir()
        one.run(str(tiny_model_dir), str(out / name), **options)
    meshed = {
        f"{name}, tp": dict(options, devices=2, strategy={"plugin": plugin, "tp": 2, "timeout": 600})
        for name, (options, plugin) in STAGES.items()
    }
    resumed = dict(stage="sft", max_steps=4, lora=True, checkpointing=True, devices=2)
    for name, plugin in (("sft lora", "zero1"), ("sft lora, tp", "zero2")):
        meshed[f"{name}, resumed on ranks"] = dict(
            resumed, strategy={"plugin": plugin, "tp": 2, "timeout": 600}, ckpt=str(out / name / "step=2.ckpt")
        )
    run_stages(tiny_model_dir, out, meshed)
    (out / "resumed on one").mkdir()
    one.run(
        str(tiny_model_dir), str(out / "resumed on one"),
        **dict(resumed, devices=1, ckpt=str(out / "sft lora, tp" / "step=2.ckpt")),
    )  # fmt: skip
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_stages_have_the_curves_of_one_process(runs, name):
    assert_same_run(runs / f"{name}, tp", runs / name)


@pytest.mark.slow
def test_validation_and_win_rates_are_those_of_one_process(runs):
    assert_same_scores(runs / "sft, tp", runs / "sft")
    pairs = [(runs / name / "win_rate.jsonl").read_text() for name in ("sft, tp", "sft")]
    assert pairs[0] == pairs[1] and len(pairs[0].splitlines()) == 6


@pytest.mark.slow
def test_a_checkpoint_is_whole_and_goes_on_anywhere(runs):
    one, two = (torch.load(runs / name / "step=2.ckpt", weights_only=True) for name in ("sft lora", "sft lora, tp"))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():
        assert torch.allclose(value, two["state_dict"][key], atol=1e-5), key
    states = [c["optimizer_states"][0]["state"] for c in (one, two)]
    assert states[0].keys() == states[1].keys()
    for number, entry in states[0].items():
        for key, value in entry.items():
            assert torch.allclose(value.float(), states[1][number][key].float(), atol=1e-5), (number, key)
    whole = curve(runs / "sft lora")
    for name in ("sft lora, resumed on ranks", "sft lora, tp, resumed on ranks", "resumed on one"):
        assert largest_difference(curve(runs / name)[1:], whole[-1:]) < 1e-5, name


@pytest.mark.slow
def test_an_export_is_whole(runs):
    one, two = (
        AutoModelForCausalLM.from_pretrained(runs / name / "hf" / "last") for name in ("sft lora", "sft lora, tp")
    )
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


# ------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_four_ranks(tmp_path):
    names = ["llama on four", "qwen3 on four", "scored head", "rollout on four", "grid"]
    for rank, found in enumerate(run_cases(HERE / "run_parallel.py", tmp_path, *names, ranks=4)):
        assert not any("Traceback" in str(value) for value in found.values()), found
        for name in names[:2]:
            assert found[name]["gradients"] < 1e-5 and found[name]["clipped"] < 1e-5 and found[name]["share"] < 0.3
        assert found["scored head"] < 1e-12 and found["rollout on four"]["equal"] and found["rollout on four"]["ranks"]
        first, place = rank // 2 * 2, rank % 2
        copy, replicas, data = (first, first + 1), (0, 1, 2, 3), (place, place + 2)
        want = dict(data=data, pipe=(rank,), sequence=copy, tensor=(rank,), copy=copy, replicas=replicas)
        assert found["grid"] == want


@pytest.mark.slow
def test_copies_with_different_data(tiny_model_dir, tmp_path):
    """Two copies of two ranks: the same curves as one process on the same global batches."""
    chosen = {name: STAGES[name][0] for name in ("sft", "reward", "ppo", "ppo lora", "grpo", "kto")}
    run_stages(tiny_model_dir, tmp_path, chosen)
    plugins = {"sft": "zero2", "reward": "ddp", "ppo": "zero1", "ppo lora": "zero2", "grpo": "ddp", "kto": "zero1"}
    meshed = {
        f"{name}, tp": dict(options, devices=4, strategy={"plugin": plugins[name], "tp": 2, "timeout": 600})
        for name, options in chosen.items()
    }
    run_stages(tiny_model_dir, tmp_path, meshed)
    for name in chosen:
        assert largest_difference(curve(tmp_path / f"{name}, tp"), curve(tmp_path / name)) < 1e-5, name


@pytest.mark.slow
def test_twenty_steps_in_double_precision(tiny_model_dir, tmp_path):
    run = dict(stage="sft", max_steps=20, clip=0.3, precision="64-true", lr=1e-2)
    both = {"full": run, "lora": dict(run, lora=True)}
    run_stages(tiny_model_dir, tmp_path, both)
    mesh = dict(devices=2, strategy={"plugin": "ddp", "tp": 2, "timeout": 600})
    run_stages(tiny_model_dir, tmp_path, {f"{name}, tp": dict(options, **mesh) for name, options in both.items()})
    for name in both:
        a, b = (torch.load(tmp_path / place / "weights.pt") for place in (f"{name}, tp", name))
        assert max((a[k].double() - b[k].double()).abs().max().item() for k in a) < 1e-9


@pytest.mark.slow
def test_bf16_curves(tiny_model_dir, tmp_path):
    run = dict(stage="sft", max_steps=8, lr=1e-3, precision="bf16-mixed")
    run_stages(tiny_model_dir, tmp_path, {"one": run})
    mesh = {p: dict(run, devices=2, strategy={"plugin": p, "tp": 2, "timeout": 600}) for p in ("ddp", "zero2")}
    run_stages(tiny_model_dir, tmp_path, mesh)
    for name in mesh:
        assert largest_difference(curve(tmp_path / name), curve(tmp_path / "one")) < 3e-2


@pytest.mark.slow
def test_a_killed_rank_ends_the_others(tiny_model_dir, tmp_path):
    mesh = dict(devices=2, strategy={"plugin": "zero1", "tp": 2, "timeout": 30})
    run = dict(stage="sft", max_steps=20, save_every=2, kill=[1, 5], **mesh)
    done = run_stages(tiny_model_dir, tmp_path, {"killed": run}, check=False)
    assert done.returncode != 0 and not (tmp_path / "killed" / "curve.json").exists()
    assert "Connection closed by peer" in done.stderr or "Connection reset" in done.stderr, done.stderr[-2000:]
    checkpoint = torch.load(sorted((tmp_path / "killed").glob("step=*.ckpt"))[-1], weights_only=True)
    assert checkpoint["global_step"] == 4


@pytest.mark.slow
def test_a_world_that_the_ranks_of_a_copy_do_not_divide(tiny_model_dir, tmp_path):
    run = dict(stage="sft", max_steps=2, strategy={"plugin": "ddp", "tp": 2, "timeout": 600})
    done = run_stages(tiny_model_dir, tmp_path, {"one": run}, check=False)
    assert (
        "tp=2 does not divide the 1 processes of the run (trainer.devices x trainer.num_nodes). Use a multiple of 2 "
        "processes, or a product of 1." in done.stderr
    )
