"""Models with GPTQ weights: loaded exactly, trained through, merged, and refused where they cannot be."""

import importlib.util
import json
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import FSDPStrategy
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from widened import save_widened

from lightning_rlhf import InstructionDataModule, Load, LoRA, PreferenceDataModule, RewardModule, SFTModule
from lightning_rlhf.evaluation import generate_answers
from lightning_rlhf.models import Policy, gptq, load_causal_lm, load_reward_model, load_tokenizer
from lightning_rlhf.models.loading import load_exported, quantization_of
from lightning_rlhf.models.quantization import DTYPE, is_quantized
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.quantize import Grid, quantize
from lightning_rlhf.rollout import Sampling

pytest.importorskip("gptqmodel", reason="gptqmodel isn't installed")

FP32 = {DTYPE: torch.float32}
IDS = torch.arange(1, 120)[None]
GRIDS = [Grid(4, 32, False), Grid(8, 64, True)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory, stories_model_dir):
    return save_widened(stories_model_dir, tmp_path_factory.mktemp("wide") / "stories")


@pytest.fixture(scope="module")
def directories(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq")
    return {grid: quantize(source, folder / f"{grid.bits}", "rtn", grid) for grid in GRIDS}


@pytest.fixture(scope="module", params=GRIDS, ids=str)
def grid(request):
    return request.param


@pytest.fixture
def directory(directories, grid):
    return directories[grid]


@pytest.fixture(scope="module")
def four_bits(directories):
    return directories[GRIDS[0]]


def rounded(source, grid):
    """A plain model with the weights that the grid stands for."""
    model = AutoModelForCausalLM.from_pretrained(source, **FP32)
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = grid.round(layer.weight).values()
    return model


def shaken(model, seed=0):
    """Every trainable weight has moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits.float()


def off(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def kernels(model):
    return {type(m).__name__ for m in model.modules() if gptq.is_gptq_layer(m)}


# ----------------------------------------------------------------------------------------------------------- loading


def test_weights_stay_packed_and_compute_exactly(directory, grid, source):
    wanted = logits(rounded(source, grid))
    for inference in (False, True):
        model = load_causal_lm(directory, inference=inference).eval()
        assert is_quantized(model) and kernels(model) == {f"ExactTorch{'Aten' if grid.bits == 4 else ''}Linear"}
        assert off(logits(model), wanted) < 1e-6
        layer = model.model.layers[0].mlp.up_proj
        assert layer.qweight.dtype == torch.int32 and layer.scales.dtype == torch.float16
        dense = [n for n, p in model.model.layers.named_parameters() if p.dim() > 1]
        assert not dense


def test_half_precision_is_as_exact_as_it_can_be(directory, grid, source):
    wanted = logits(rounded(source, grid))
    plain = off(logits(rounded(source, grid).bfloat16()), wanted)
    for inference in (False, True):
        model = load_causal_lm(directory, dtype="bfloat16", inference=inference).eval()
        assert off(logits(model), wanted) < 1.5 * plain
    fused = grid.bits == 4  # the kernel for inference; the one for 8 bits would compile code
    assert kernels(model) == {"TorchAtenLinear" if fused else "ExactTorchLinear"}


@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is read from /proc")
def test_weights_are_not_held_twice(stories_model_dir, tmp_path):
    """The CPU kernel has its own order; the file's pages are given back as soon as a layer is in it."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=1536, num_hidden_layers=2, head_dim=64)
    save_pretrained(LlamaForCausalLM(config).bfloat16(), load_tokenizer(stories_model_dir), tmp_path / "plain")
    directory = quantize(tmp_path / "plain", tmp_path / "packed", "rtn", Grid(4, 128))
    ids = torch.arange(3, 40)[None]
    wanted = logits(load_causal_lm(directory).eval(), ids)
    model = load_causal_lm(directory, dtype="bfloat16", inference=True)
    layers = [layer for layer in model.modules() if gptq.is_gptq_layer(layer)]
    packed = sum(layer.qweight.nbytes for layer in layers)
    assert {layer.qweight.dtype for layer in layers} == {torch.uint8} and packed > 3e6
    assert resident(directory / "model.safetensors") < 0.1 * packed
    for mode in (True, False):  # a pass in training mode reads the same weights
        assert off(logits(model.train(mode), ids), wanted) < 0.03


def resident(file):
    """Bytes of a mapped file in this process's memory."""
    maps = re.findall(
        r"(?m)^[0-9a-f]+-[0-9a-f]+ .*?(\S*)\n(?:.*\n){0,5}?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text()
    )
    return sum(1024 * int(size) for path, size in maps if path == str(file.resolve()))


def test_the_kernel_is_not_in_the_config(directory):
    model = load_causal_lm(directory)
    assert "backend" not in json.loads((directory / "config.json").read_text())["quantization_config"]
    assert quantization_of(directory) == quantization_of(model) == "gptq"


def test_no_warning_and_no_line_is_printed(directory, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of gptqmodel's own temporary folder
        load_causal_lm(directory, lora=LoRA(r=2))
    assert capfd.readouterr() == ("", "")


def test_layouts_agree(four_bits):
    """The packed tree of the stages' batches is tried against padded rows, as with any model."""
    assert Policy(load_causal_lm(four_bits, lora=LoRA(r=2))).layout == "tree"


def test_missing_weights_are_named(four_bits, tmp_path):
    for file in four_bits.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    found = load_file(four_bits / "model.safetensors")
    del found["model.layers.2.mlp.up_proj.scales"]
    save_file(found, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: model\.layers\.2\.mlp\.up_proj\.scales\."):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("package", ["gptqmodel", "optimum"])
def test_a_missing_package_is_named_with_its_install_line(package, four_bits, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(ModuleNotFoundError, match=rf"^GPTQ weights need {package}\. Install: pip install .*--no-deps"):
        load_causal_lm(four_bits)


def test_the_install_line_is_that_of_the_docs_and_of_ci():
    assert gptq.INSTALL in (ROOT / "docs" / "install.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    needs, alone = gptq.INSTALL.removeprefix("pip install ").split(" && pip install --no-deps ")
    assert re.search(r"^GPTQ := (.*)$", makefile, re.M)[1] == alone
    assert re.search(r"^GPTQ_NEEDS := (.*)$", makefile, re.M)[1] == re.sub(r"==\S+", "", needs)
    assert set(needs.split()) <= set((ROOT / "constraints.txt").read_text().split())


def test_win_rate_answers_by_a_quantized_model(four_bits, source):
    grid = GRIDS[0]
    prompts = {0: "Once upon a time", 1: "Tom had a dog"}
    found = dict(generate_answers(four_bits, prompts, Sampling(12, temperature=0.0)))
    model, tokenizer = rounded(source, grid).eval(), load_tokenizer(source)
    for i, prompt in prompts.items():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        told = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert found[i].text.strip() == tokenizer.decode(told, skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------------------------------------- training


def test_gradients_are_those_of_the_dequantized_model(directory, grid, source):
    lora = LoRA(r=4)
    model = shaken(load_causal_lm(directory, lora=lora))
    twin = load_causal_lm(rounded(source, grid), lora=lora)
    own = dict(model.named_parameters())
    trained = [name for name, p in twin.named_parameters() if p.requires_grad]
    assert set(trained) == {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if p.requires_grad:
                p.copy_(own[name])
    for m in (model, twin):
        m(input_ids=IDS, labels=IDS).loss.backward()
    found, wanted = (torch.cat([dict(m.named_parameters())[n].grad.flatten() for n in trained]) for m in (model, twin))
    assert off(found, wanted) < 1e-4


def test_gradients_pass_after_an_evaluation_in_half_precision(four_bits):
    """gptqmodel's kernel repacks in the first such pass, and then sends no gradient to its input."""
    model = shaken(load_causal_lm(four_bits, dtype="bfloat16", lora=LoRA(r=4)))
    logits(model.eval())
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    first = [p for n, p in model.named_parameters() if ".layers.0.self_attn.v_proj.lora_A" in n]
    assert first[0].grad.norm() > 0


def test_a_graph_keeps_no_dequantized_weights(four_bits):
    model = load_causal_lm(four_bits, lora=LoRA(r=2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(input_ids=IDS).logits.sum()
    assert (64, 192) not in kept and (192, 64) not in kept and kept


def test_merged_and_separate_exports_are_the_trained_model(directory, source, tmp_path):
    model = shaken(load_causal_lm(directory, lora=LoRA(r=4))).eval()
    wanted, tokenizer = logits(model), load_tokenizer(source)
    merged = save_pretrained(model, tokenizer, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(merged, **FP32).eval()
    assert quantization_of(merged) is None and off(logits(plain), wanted) < 1e-5
    apart = save_pretrained(model, tokenizer, tmp_path / "apart", adapter_only=True)
    assert quantization_of(apart) is None, "merged into a dequantized base"
    assert off(logits(load_causal_lm(apart).eval()), wanted) < 1e-5
    assert off(logits(model), wanted) == 0, "the model goes on"


def test_a_kernel_without_a_backward_pass_is_refused_by_name(four_bits):
    model = load_exported(four_bits, "bfloat16")
    logits(model)  # repacks
    name = r"model\.layers\.0\.self_attn\.\w_proj has the kernel TorchAtenLinear, which has no backward pass"
    with pytest.raises(ValueError, match=name):
        load_causal_lm(model, lora=LoRA(r=2))
    with pytest.raises(ValueError, match="TorchAtenLinear has repacked its weights"):
        save_pretrained(model, load_tokenizer(four_bits), four_bits.with_name("never"))


def test_what_would_change_quantized_weights_is_refused(four_bits, source):
    with pytest.raises(ValueError, match=r"load\.quantization='nf4': .* are already quantized \(gptq\)"):
        load_causal_lm(four_bits, quantization="nf4", lora=LoRA())
    with pytest.raises(ValueError, match=r"load\.quantization='int8': .* are already quantized \(gptq\)"):
        load_causal_lm(load_causal_lm(four_bits), quantization="int8", lora=LoRA())


# ------------------------------------------------------------------------------------------------------------ stages


def export(module, path, **options):
    return save_pretrained(module.model_to_export.model, module.tokenizer, path, **options)


def trainer(path, **settings):
    options = dict(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=path,
    )  # fmt: skip
    return L.Trainer(**{**options, **settings})


def stories(**options):
    return InstructionDataModule([{"text": f"Once there was a dog number {i}."} for i in range(8)], **options)


def test_a_stage_trains_adapters_over_gptq_weights(four_bits, tmp_path):
    module = SFTModule(four_bits, lora=LoRA(r=4))
    fit = trainer(tmp_path)
    fit.fit(module, stories(val_fraction=0.0))
    assert kernels(module.policy) == {"ExactTorchAtenLinear"}
    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved and all("lora_" in name for name in saved)
    export(module, tmp_path / "merged")
    plain = load_causal_lm(tmp_path / "merged").eval()
    assert off(logits(plain), logits(module.policy.model.eval())) < 1e-5


def test_a_stage_without_adapters_reads_and_does_not_train(four_bits, tmp_path):
    module = SFTModule(four_bits)
    data = stories(val_fraction=0.5)
    [found] = trainer(tmp_path).validate(module, data, verbose=False)
    assert found["val/loss"] > 0
    with pytest.raises(ValueError, match=r"are quantized \(gptq\) and can't be trained\. Give lora\."):
        trainer(tmp_path).fit(SFTModule(four_bits), data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(lora=LoRA(), load=Load(quantization="nf4")), r"load\.quantization='nf4': .* already quantized \(gptq\)"),
        (dict(lora=LoRA(init="pissa")), r"lora\.init='pissa' moves a part of the weights into the adapters"),
        (dict(lora=LoRA(dora=True)), r"lora\.dora changes the weights of .*, which are quantized \(gptq\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, four_bits, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(SFTModule(four_bits, **settings), stories())


def test_strategies_that_cut_weights_are_refused(four_bits):
    module = SFTModule(four_bits, lora=LoRA())
    module.trainer = kept = SimpleNamespace(strategy=FSDPStrategy(), precision_plugin=Precision())
    with pytest.raises(ValueError, match=r"is quantized \(gptq\), which runs on one device.* give a model in full"):
        module.setup("fit")
    assert kept


def test_a_reward_model_over_gptq_weights(four_bits, tmp_path):
    rows = [{"prompt": "Hi", "chosen": f"A dog {i}", "rejected": f"No {i}"} for i in range(8)]
    module = RewardModule(four_bits, lora=LoRA(r=4))
    trainer(tmp_path).fit(module, PreferenceDataModule(rows, val_fraction=0.0))
    export(module, tmp_path / "merged")
    export(module, tmp_path / "apart", adapter_only=True)
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        scores = [
            load_reward_model(tmp_path / form, needs_head=True).eval()(input_ids=ids).logits.item()
            for form in ("merged", "apart")
        ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert load_reward_model(tmp_path / "merged").score.weight.dtype == torch.float32


@pytest.mark.parametrize("apart", [False, True], ids=["side by side", "apart"])
def test_weights_are_those_of_the_format(apart):
    """Groups of inputs that do not lie side by side come from quantizers that order inputs by importance."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 8), generator=draw)
    zeros = torch.randint(0, 16, (2, 8), generator=draw)
    order = torch.randperm(64, generator=draw) % 2 if apart else torch.arange(64) // 32
    layer = SimpleNamespace(
        bits=4,
        group_size=32,
        in_features=64,
        out_features=8,
        scales=torch.rand(2, 8, generator=draw).half(),
        g_idx=order.int(),
        qweight=sum(codes[i::8] << 4 * i for i in range(8)).int(),
        qzeros=sum(zeros[:, i::8] << 4 * i for i in range(8)).int(),
        qzero_format=lambda: 2,
    )
    want = [
        [(codes[i, o] - zeros[order[i], o]).item() * layer.scales[order[i], o].item() for i in range(64)]
        for o in range(8)
    ]
    torch.testing.assert_close(gptq.weights_of(layer), torch.tensor(want), rtol=1e-6, atol=0)
