"""Quantizing a model: what is written is what was computed, whoever reads it; and what is refused."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import cache

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPTQConfig

from lightning_rlhf import LoRA
from lightning_rlhf.models import load_causal_lm, load_reward_model, load_tokenizer
from lightning_rlhf.models.loading import load_exported, load_stop_token_ids
from lightning_rlhf.models.quantization import DTYPE
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.quantize import Grid, methods, quantize
from lightning_rlhf.quantize.autoround import of_one_length

pytest.importorskip("gptqmodel", reason="gptqmodel isn't installed")

GRIDS = [Grid(4, group, sym) for group in (32, 64) for sym in (True, False)]
FP32 = {DTYPE: torch.float32}


@pytest.fixture(scope="session")
def made(wide_stories, calibration, tmp_path_factory):
    """Quantized stories by method and grid, each made once."""

    @cache
    def make(method, grid):
        pytest.importorskip({"gptq": "gptqmodel", "autoround": "auto_round"}.get(method, "torch"))
        out = tmp_path_factory.mktemp("made") / "model"
        return quantize(wide_stories, out, method, grid, calibration, steps=2)

    return make


def tensors(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def stored(directory, name, bits, group):
    """A layer's weights by the format's definition, a code at a time."""
    found = {k.rpartition(".")[2]: v for k, v in tensors(directory).items() if k.startswith(f"{name}.")}
    count, mask = 32 // bits, 2**bits - 1
    inputs, outputs = found["qweight"].shape[0] * count, found["qweight"].shape[1]
    words, zeros = found["qweight"].tolist(), found["qzeros"].tolist()
    assert found["g_idx"].tolist() == [i // group for i in range(inputs)] and found["scales"].dtype == torch.float16
    weight = torch.empty(outputs, inputs)
    for i in range(inputs):
        codes = [(word >> bits * (i % count)) & mask for word in words[i // count]]
        zero = [((zeros[i // group][o // count] >> bits * (o % count)) & mask) + 1 for o in range(outputs)]
        weight[:, i] = (torch.tensor(codes) - torch.tensor(zero)) * found["scales"][i // group].float()
    return weight


def dense(source, directory, grid):
    """The source with the weights that a directory holds."""
    model = AutoModelForCausalLM.from_pretrained(source, **FP32).eval()
    for name, layer in model.model.layers.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = stored(directory, f"model.layers.{name}", grid.bits, grid.group_size)
    return model


def reloaded(directory, bits=4, **arguments):
    """By transformers alone, with the kernel that the machine needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = GPTQConfig(bits=bits, backend="gptq_torch_aten")
        return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, **FP32, **arguments).eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def kl(model, original, ids):
    p, q = (logits(m, ids).log_softmax(-1) for m in (original, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def off(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("method", ["rtn", "gptq", "autoround"])
def test_a_reloaded_model_is_the_one_that_was_quantized(method, grid, made, wide_stories, held_out):
    directory = made(method, grid)
    wanted = logits(dense(wide_stories, directory, grid), held_out)
    assert off(logits(reloaded(directory), held_out), wanted) < 1e-3
    assert off(logits(load_exported(directory), held_out), wanted) < 1e-6


def test_rounding_alone_writes_the_nearest_numbers(made, wide_stories):
    model = AutoModelForCausalLM.from_pretrained(wide_stories, **FP32)
    for grid in GRIDS:
        for name in ("model.layers.0.self_attn.k_proj", "model.layers.4.mlp.down_proj"):
            wanted = grid.round(model.get_submodule(name).weight).values()
            assert torch.equal(stored(made("rtn", grid), name, 4, grid.group_size), wanted)


def test_eight_bits(wide_stories, calibration, held_out, tmp_path):
    grid = Grid(8, 64, sym=False)
    original = AutoModelForCausalLM.from_pretrained(wide_stories, **FP32).eval()
    for method in ("rtn", "gptq"):
        directory = quantize(wide_stories, tmp_path / method, method, grid, calibration)
        found, wanted = load_exported(directory), dense(wide_stories, directory, grid)
        assert off(logits(found, held_out), logits(wanted, held_out)) < 1e-6
        assert kl(found, original, held_out) < 1e-3


@torch.no_grad()
def by_hand(model, rows, grid, damp=0.05):
    """GPTQ by its paper, in fp64: layer by layer, columns one by one, in groups and in them by their Hessian."""

    def quantized(weight, hessian):
        size = grid.group_size
        hessian = hessian.clone()
        dead = hessian.diagonal() == 0
        hessian[dead, dead], weight = 1, weight.double().masked_fill(dead, 0)
        groups = hessian.diagonal().view(-1, size)  # columns with much weight in the loss first, whole groups at a time
        order = (torch.arange(len(hessian)).view(-1, size).gather(1, groups.argsort(1, True)))[
            groups.amax(1).argsort(0, True)
        ]
        order = order.flatten()
        weight, hessian = weight[:, order], hessian[order][:, order]
        hessian += damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.double)
        factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
        result = torch.empty_like(weight)
        for i in range(len(hessian)):
            if i % size == 0:
                scale, zero = (t.double() for t in grid.fit(weight[:, i : i + size]))
            code = ((weight[:, i] / scale).round() + zero).clamp(0, grid.top)
            result[:, i] = (code - zero) * scale
            weight[:, i:] -= ((weight[:, i] - result[:, i]) / factor[i, i])[:, None] * factor[i, i:]
        return result[:, order.argsort()].float()

    for layer in model.model.layers:
        for names in ("qkv", "o", ("gate", "up"), ("down",)):
            parts = [m for n, m in layer.named_modules() if isinstance(m, nn.Linear) and n.split(".")[1][:-5] in names]
            seen = []
            handle = parts[0].register_forward_pre_hook(
                lambda m, x, seen=seen: seen.append(x[0].flatten(0, 1).double())
            )
            model(torch.stack(rows), use_cache=False)
            handle.remove()
            for part in parts:
                part.weight.data = quantized(part.weight, 2 * seen[0].T @ seen[0] / len(seen[0]))
    return model


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_is_the_papers_within_2_percent_of_kl(grid, made, wide_stories, calibration, held_out):
    original = AutoModelForCausalLM.from_pretrained(wide_stories, **FP32).eval()
    own = by_hand(AutoModelForCausalLM.from_pretrained(wide_stories, **FP32).eval(), calibration, grid)
    found = kl(load_exported(made("gptq", grid)), original, held_out)
    assert found == pytest.approx(kl(own, original, held_out), rel=0.02)
    assert found < 0.9 * kl(load_exported(made("rtn", grid)), original, held_out)


def test_the_config_names_no_kernel_and_everything_else_survives(made, wide_stories):
    directory = made("rtn", GRIDS[0])
    config, source = (json.loads((d / "config.json").read_text()) for d in (directory, wide_stories))
    own = config.pop("quantization_config")
    assert (own["quant_method"], own["bits"], own["group_size"], own["sym"]) == ("gptq", 4, 32, True)
    assert own["checkpoint_format"] == "gptq" and own["desc_act"] is False
    assert not own.keys() & {"backend", "use_exllama", "kernel"}
    assert config == source
    assert load_stop_token_ids(directory) == load_stop_token_ids(wide_stories)
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (directory / name).read_text() == (wide_stories / name).read_text()
    kept, before = tensors(directory), tensors(wide_stories)
    rest = [name for name in before if "proj" not in name]
    assert rest and all(torch.equal(kept[name], before[name]) for name in rest)


def test_what_is_not_quantized_gets_the_asked_data_type(wide_stories, tmp_path, held_out):
    grid = Grid(4, 32)
    directory = quantize(wide_stories, tmp_path / "half", "rtn", grid, dtype="float16")
    found = tensors(directory)
    assert found["model.embed_tokens.weight"].dtype == torch.float16
    assert torch.equal(found["model.layers.0.mlp.up_proj.qweight"], tensors_of_full(wide_stories, grid))
    assert json.loads((directory / "config.json").read_text())["dtype"] == "float16"


def tensors_of_full(source, grid):
    """A layer that was cast to fp16 first, on its grid."""
    from lightning_rlhf.quantize.packing import pack_words

    weight = AutoModelForCausalLM.from_pretrained(source, **FP32).model.layers[0].mlp.up_proj.weight
    return pack_words(grid.round(weight.half()).codes.T, grid.bits)


@pytest.fixture(scope="session")
def adapters(wide_stories, tmp_path_factory):
    """Adapters of the stories, whose updates are not zero."""
    torch.manual_seed(0)
    model = load_causal_lm(wide_stories, lora=LoRA(r=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=generator)
    out = tmp_path_factory.mktemp("adapters") / "model"
    return save_pretrained(model, load_tokenizer(wide_stories), out, adapter_only=True)


def test_adapters_are_merged_first(adapters, held_out, tmp_path):
    grid = Grid(8, 32)
    found = load_exported(quantize(adapters, tmp_path / "out", "rtn", grid))
    wanted = load_exported(adapters)
    assert off(logits(found, held_out), logits(wanted, held_out)) < 0.01
    for layer in wanted.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = grid.round(layer.weight).values()
    assert off(logits(found, held_out), logits(wanted, held_out)) < 1e-6


@pytest.fixture(scope="session")
def reward_model(wide_stories, tmp_path_factory):
    """A reward model with an offset, whole and as adapters."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    model = load_reward_model(wide_stories, lora=LoRA(r=4), pad_token_id=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=generator)
    model.get_base_model().config.score_offset = 1.5
    tokenizer = load_tokenizer(wide_stories)
    whole = save_pretrained(model, tokenizer, folder / "whole")
    return whole, save_pretrained(model, tokenizer, folder / "adapters", adapter_only=True)


@pytest.mark.parametrize("form", [0, 1], ids=["whole", "adapters"])
@pytest.mark.parametrize("method", ["gptq", "rtn", "nf4"])
def test_reward_models_keep_their_head_and_offset(method, form, reward_model, calibration, held_out, tmp_path):
    pytest.importorskip("bitsandbytes" if method == "nf4" else "gptqmodel")
    directory = quantize(reward_model[form], tmp_path / "out", method, Grid(4, 32), calibration)
    source = load_reward_model(reward_model[form], needs_head=True).eval()
    found = load_reward_model(directory, needs_head=True).eval()
    assert found.config.score_offset == 1.5 and type(found).__name__ == "LlamaForSequenceClassification"
    assert found.score.weight.dtype == torch.float32 and torch.equal(found.score.weight, source.score.weight)
    if method == "nf4":
        source = load_reward_model(reward_model[form], quantization="nf4", lora=LoRA(r=1)).eval()
    else:
        for name, layer in source.model.layers.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = stored(directory, f"model.layers.{name}", 4, 32)
    with torch.no_grad():
        scores, wanted = (m(input_ids=held_out).logits[:, 0] for m in (found, source))
    assert off(scores, wanted) < 1e-5
    if method != "nf4":
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            config = GPTQConfig(bits=4, backend="gptq_torch_aten")
            plain = AutoModelForSequenceClassification.from_pretrained(directory, quantization_config=config, **FP32)
            assert off(plain.eval()(input_ids=held_out).logits[:, 0], scores) < 1e-3


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_bitsandbytes_formats_are_those_of_training(method, wide_stories, held_out, tmp_path, capfd):
    pytest.importorskip("bitsandbytes")
    directory = quantize(wide_stories, tmp_path / "out", method, Grid(4, 32))
    assert "Loading weights" not in capfd.readouterr().err  # a line for each step in a file
    trained = load_causal_lm(wide_stories, quantization=method).eval()
    found = load_causal_lm(directory).eval()
    assert torch.equal(logits(found, held_out), logits(trained, held_out))
    size = (directory / "model.safetensors").stat().st_size
    assert size < 0.6 * (wide_stories / "model.safetensors").stat().st_size


SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=400)
FAMILIES = {
    "OPT": dict(ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64),
    "Gemma2": dict(intermediate_size=128, num_key_value_heads=2, head_dim=16, sliding_window=8),
    "GPTNeoX": dict(intermediate_size=128),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, tiny_tokenizer, tmp_path):
    """Biases, masks that differ between layers, parallel layers: GPTQ in 8 bits is closer than rounding, and near."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    source = save_pretrained(model, tiny_tokenizer, tmp_path / "model")
    rows = [torch.randint(3, 400, (40,)) for _ in range(24)]
    ids = torch.stack(rows[:4])
    far = [
        off(
            logits(load_exported(quantize(source, tmp_path / method, method, Grid(8, 32), rows)), ids),
            logits(model, ids),
        )
        for method in ("gptq", "rtn")
    ]
    assert far[0] < far[1] < 0.03
    load_causal_lm(tmp_path / "gptq", lora=LoRA(r=2))(input_ids=ids, labels=ids).loss.backward()


def test_rows_of_several_lengths(wide_stories, calibration, held_out, tmp_path):
    """GPTQ runs each as it is; auto-round, which does not, gets them joined and cut."""
    rows = [row[: 128 - 7 * (i % 5)] for i, row in enumerate(calibration)]
    original = AutoModelForCausalLM.from_pretrained(wide_stories, **FP32).eval()
    grid = Grid(4, 32)
    plain = kl(load_exported(quantize(wide_stories, tmp_path / "rtn", "rtn", grid)), original, held_out)
    for method in ("gptq", "autoround"):
        directory = quantize(wide_stories, tmp_path / method, method, grid, rows, steps=3)
        assert kl(load_exported(directory), original, held_out) < plain
    joined = of_one_length([torch.arange(5), torch.arange(5, 8), torch.arange(8, 14)])
    assert [row.tolist() for row in joined] == [[*range(6)], [*range(6, 12)]]


def test_half_precision_models_are_calibrated_in_fp32(wide_stories, calibration, held_out, tmp_path):
    """On a CPU 16 bits crawl, and their Hessians are noise."""
    grid, seen = Grid(4, 32), []
    half = AutoModelForCausalLM.from_pretrained(wide_stories, **{DTYPE: torch.bfloat16})
    save_pretrained(half, load_tokenizer(wide_stories), tmp_path / "half")
    solve = methods.solve

    def watched(run, i, block, grid):
        seen.extend({p.dtype for p in block.parameters()} | {run.hidden[0].dtype})
        return solve(run, i, block, grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "solve", watched)
        directory = quantize(tmp_path / "half", tmp_path / "out", "gptq", grid, calibration)
    assert set(seen) == {torch.float32}
    found = tensors(directory)
    assert found["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert found["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16, "not cast with the norms"
    wanted = logits(dense(tmp_path / "half", directory, grid), held_out)
    assert off(logits(load_exported(directory, "float32"), held_out), wanted) < 1e-6


def test_memory_is_the_models_and_one_layers(made, wide_stories, calibration, tmp_path, monkeypatch):
    """Each layer's dense weights are gone before the next layer is quantized."""
    alive = []

    def watched(run, i, block, grid):
        alive.append([any(isinstance(m, nn.Linear) for m in b.modules()) for b in run.blocks])
        return solve(run, i, block, grid)

    solve = methods.solve
    monkeypatch.setattr(methods, "solve", watched)
    quantize(wide_stories, tmp_path / "out", "gptq", GRIDS[0], calibration)
    assert alive == [[j >= i for j in range(5)] for i in range(5)]


def test_nothing_stands_between_our_lines(wide_stories, calibration, tmp_path, capfd, caplog):
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of gptqmodel's own temporary folder
        for method in ("gptq", "autoround"):
            load_exported(quantize(wide_stories, tmp_path / method, method, Grid(4, 32), calibration, steps=1))
    out, err = capfd.readouterr()
    assert out == ""
    lines = [f"{method}: layers  {i}/5" for method in ("gptq", "autoround") for i in (2, 3, 4, 5)]
    assert err.splitlines() == lines
    assert not caplog.records


def test_the_global_random_state_is_untouched(wide_stories, calibration, tmp_path):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    quantize(wide_stories, tmp_path / "out", "autoround", Grid(4, 32), calibration, steps=1)
    assert torch.equal(torch.rand(3), wanted)


def test_nothing_is_compiled(wide_stories, calibration, held_out, tmp_path, monkeypatch):
    """Neither C++, for which there may be no compiler, nor by torch: both take minutes where a pass takes none."""
    from torch.utils import cpp_extension

    def refuse(*args, **kwargs):
        raise AssertionError("something is compiled")

    for name in ("load", "load_inline", "_jit_compile", "_write_ninja_file_and_build_library"):
        monkeypatch.setattr(cpp_extension, name, refuse)
    monkeypatch.setenv("PATH", str(tmp_path))
    torch._dynamo.utils.counters.clear()
    for bits in (4, 8):
        directory = quantize(wide_stories, tmp_path / f"{bits}", "gptq", Grid(bits, 32), calibration)
        for dtype in ("float32", "bfloat16"):
            logits(load_exported(directory, dtype), held_out)
    assert not torch._dynamo.utils.counters["frames"]


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(wide_stories, tmp_path):
    code = (
        "import sys, torch; from lightning_rlhf.quantize import Grid, methods\n"
        "solve = methods.solve\n"
        "def watched(run, i, *rest):\n"
        "    print('layer', i, flush=True)\n"
        "    return solve(run, i, *rest)\n"
        "methods.solve = watched\n"
        "rows = [torch.randint(3, 500, (256,)) for _ in range(64)]\n"
        "methods.quantize(sys.argv[1], sys.argv[2], 'gptq', Grid(4, 32), rows)\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(wide_stories), str(tmp_path / "out")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "layer 1":
            process.send_signal(signal.SIGINT)
            break
    sent = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode not in (0, None) and time.monotonic() - sent < 30
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="gpqt"), "there is no method gpqt; did you mean gptq? All: gptq, autoround, rtn, nf4, int8."),
        (dict(rows=()), "gptq needs calibration rows, and there are none."),
        (dict(rows=[torch.arange(64)]), "64 calibration tokens are too few for model.layers.0.mlp.down_proj"),
        (
            dict(grid=Grid(4, 128)),
            "model.layers.0.self_attn.q_proj has 64 inputs, which groups of 128 do not divide. Sizes that fit all "
            "layers: 32, 64.",
        ),
    ],
    ids=["method", "no rows", "few tokens", "group"],
)
def test_bad_input_is_named(change, message, wide_stories, calibration, tmp_path):
    given = dict(method="gptq", grid=Grid(4, 32), rows=calibration, **{}) | change
    with pytest.raises(ValueError) as error:
        quantize(wide_stories, tmp_path / "out", given["method"], given["grid"], given["rows"])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_is_not_quantized_again(made, tmp_path):
    source = made("rtn", GRIDS[0])
    with pytest.raises(ValueError, match=r"is already quantized \(gptq\)\. Give the model that it was made from\."):
        quantize(source, tmp_path / "out", "rtn", GRIDS[0])
    with pytest.raises(ValueError, match="is already quantized"):
        quantize(source, tmp_path / "out", "nf4", GRIDS[0])


def test_a_directory_with_something_else_is_left_alone(wide_stories, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="Choose another directory"):
        quantize(wide_stories, tmp_path, "rtn", GRIDS[0])
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_named_before_any_work(wide_stories, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"out needs \d+ MB, but .* has 0 MB free\. Free some"):
        quantize(wide_stories, tmp_path / "out", "rtn", GRIDS[0])


def test_weights_that_are_not_finite_are_named(wide_stories, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(wide_stories, **FP32)
    model.model.layers[3].mlp.up_proj.weight.data[5, 7] = torch.inf
    model.save_pretrained(tmp_path / "bad")
    AutoTokenizer.from_pretrained(wide_stories).save_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.up_proj has weights that are not finite"):
        quantize(tmp_path / "bad", tmp_path / "out", "rtn", GRIDS[0])


@pytest.mark.parametrize(("method", "package"), [("gptq", "gptqmodel"), ("autoround", "auto_round")])
def test_a_missing_package_is_named_with_its_install_line(
    method, package, wide_stories, calibration, tmp_path, monkeypatch
):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(ModuleNotFoundError) as error:
        quantize(wide_stories, tmp_path / "out", method, GRIDS[0], calibration)
    assert str(error.value).startswith(f"GPTQ weights need {package.replace('_', '-')}. Install: pip install ")
    assert "\n" not in str(error.value)
