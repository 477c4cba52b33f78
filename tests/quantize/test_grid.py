"""Grids against their definition, and layers that cannot be packed."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from widened import WIDTH, save_widened, widen

from lightning_rlhf.models.quantization import DTYPE
from lightning_rlhf.quantize.grid import Grid, blocks_of, check_shapes, linear_layers

FP32 = {DTYPE: torch.float32}
GRIDS = [Grid(bits, group, sym) for bits in (4, 8) for group in (32, 64) for sym in (True, False)]


def by_definition(weight, bits, group, sym):
    """Rounds one group after another: scale, zero and codes of each, in the words of the format."""
    top, half = 2**bits - 1, 2 ** (bits - 1)
    codes, scales, zeros = torch.empty_like(weight, dtype=torch.long), [], []
    for row, values in enumerate(weight):
        for start in range(0, len(values), group):
            part = values[start : start + group]
            low, high = min(0.0, part.min().item()), max(0.0, part.max().item())
            if sym:
                low, high = -max(-low, high), max(-low, high)
            if low == high:
                low, high = -1.0, 1.0
            scale = ((torch.tensor(high) - low) / top).half().float()
            zero = half if sym else int((torch.tensor(-low) / scale).round())
            codes[row, start : start + group] = ((part / scale).round() + zero).clamp(0, top).long()
            scales.append(scale.item())
            zeros.append(zero)
    shape = (len(weight), -1)
    return codes, torch.tensor(scales).view(shape), torch.tensor(zeros).view(shape)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_is_the_definition_to_the_bit(grid, stories_model_dir):
    model = widen(AutoModelForCausalLM.from_pretrained(stories_model_dir))
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"):
        weight = model.model.layers[2].get_submodule(name).weight.detach()
        found = grid.round(weight)
        codes, scales, zeros = by_definition(weight, grid.bits, grid.group_size, grid.sym)
        assert torch.equal(found.codes.long(), codes)
        assert torch.equal(found.scales.float(), scales) and torch.equal(found.zeros.long(), zeros)
        want = (codes - zeros.repeat_interleave(grid.group_size, 1)) * scales.repeat_interleave(grid.group_size, 1)
        assert torch.equal(found.values(), want)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0], ids=["negative", "around 0", "positive"])
def test_a_weight_moves_by_half_a_step(grid, shift):
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)) + shift
    found = grid.round(weight)
    steps = found.scales.float().repeat_interleave(grid.group_size, 1)
    moved = (found.values() - weight).abs() / steps
    inner = (found.codes > 0) & (
        found.codes < grid.top
    )  # the ends are clipped: a symmetric grid has one number less above
    assert moved[inner].max() <= 0.501 and moved.max() <= 1.1


def test_groups_of_zeros_stay_zero():
    weight = torch.zeros(8, 64)
    weight[:, 32:] = torch.linspace(-1, 1, 32)
    for sym in (True, False):
        assert Grid(4, 32, sym).round(weight).values()[:, :32].abs().max() == 0


def test_the_widened_model_is_the_same_function(stories_model_dir, tmp_path):
    ids = torch.arange(1, 200)[None]
    narrow = AutoModelForCausalLM.from_pretrained(stories_model_dir, **FP32)
    wide = AutoModelForCausalLM.from_pretrained(save_widened(stories_model_dir, tmp_path / "wide"), **FP32)
    assert wide.config.intermediate_size == WIDTH
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, narrow(ids).logits, rtol=0, atol=1e-5)


def llama(width=64, inner=192):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=width, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4
        )
    )


def test_layers_are_those_of_the_blocks():
    name, blocks = blocks_of(llama())
    assert name == "model.layers" and len(blocks) == 2
    assert set(linear_layers(blocks[0])) == {
        *(f"self_attn.{n}_proj" for n in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "grid", "message"),
    [
        (
            lambda: llama(576, 1536),
            Grid(4, 128),
            "model.layers.0.self_attn.q_proj has 576 inputs, which groups of 128 do not divide. Sizes that fit all "
            "layers: 32, 64.",
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4)),
            Grid(4, 32),
            "GPT2LMHeadModel has no layers of the class Linear in transformer.h: it cannot be quantized.",
        ),
        (lambda: llama(64, 200), Grid(4, 32), "down_proj has 200 inputs, which no group size divides. Use nf4"),
        (
            lambda: llama(64, 172),
            Grid(4, 128),  # which does not fit the first layer either, but 32 and 64 would
            "model.layers.0.mlp.gate_proj has 172 outputs, but 4-bit codes need a multiple of 8. Use nf4 or int8, "
            "which take any shape, or add zero rows to this layer.",
        ),
        (
            lambda: llama(64, 200),
            Grid(8, 128),
            "model.layers.0.mlp.down_proj has 200 inputs, which no group size divides. Use nf4 or int8, which take "
            "any shape, or add zero rows to the layer before.",
        ),
    ],
)
def test_layers_that_cannot_be_packed_are_named(model, grid, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        check_shapes(model(), grid)


def test_other_grids_are_refused():
    with pytest.raises(ValueError, match="bits must be 4 or 8; got 3"):
        Grid(3)
    with pytest.raises(ValueError, match="group_size must be one of 32, 64, 128, 256; got 48"):
        Grid(4, 48)


def test_experts_in_one_tensor_are_refused():
    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    if any(isinstance(p, nn.Parameter) and p.dim() == 3 for p in model.parameters()):  # since transformers 5
        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.\w+ holds several layers in one tensor"):
            check_shapes(model, Grid(4, 32))
