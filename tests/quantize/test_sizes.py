"""Bytes by formula are the bytes that are written."""

import pytest
import torch
import transformers
from safetensors import safe_open

from lightning_rlhf.quantize import Grid, quantize
from lightning_rlhf.quantize.sizes import stored_bytes

SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=400)
SHAPES = {
    "heads share keys": ("Llama", dict(**SMALL, intermediate_size=192, num_key_value_heads=2), Grid(4, 32)),
    "biases": ("Qwen2", dict(**SMALL, intermediate_size=128, num_key_value_heads=2), Grid(4, 64, sym=False)),
    "tied": ("OPT", dict(**SMALL, ffn_dim=192, word_embed_proj_dim=64, max_position_embeddings=64), Grid(4, 64)),
    "8 bits": ("Mistral", dict(**SMALL, intermediate_size=256, num_key_value_heads=4), Grid(8, 64)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_stored_bytes_are_those_of_the_formula(shape, tiny_tokenizer, tmp_path):
    family, sizes, grid = SHAPES[shape]
    config = getattr(transformers, f"{family}Config")(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    with torch.device("meta"):
        formula = stored_bytes(transformers.AutoModelForCausalLM.from_config(config), grid)
    quantize(tmp_path / "model", tmp_path / "quantized", "rtn", grid, dtype="float16")
    with safe_open(tmp_path / "quantized" / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    written = sum(tensor.nbytes for tensor in tensors.values())
    assert abs(written / formula.total - 1) < 1e-3
    assert sum(t.nbytes for name, t in tensors.items() if name.endswith("qweight")) == formula.weights
    grids = ("qzeros", "scales", "g_idx")
    assert sum(t.nbytes for name, t in tensors.items() if name.endswith(grids)) == formula.grids
