"""Memory of a 4-bit model: a random checkpoint of a 7B's shape is written, loaded and asked for a few tokens.

    pip install -e '.[gptq]'                                     # docs/quantize.md has the whole line
    python benchmarks/four_bits.py                               # Llama-2-7B
    python benchmarks/four_bits.py --shape mistral-7b --folder mistral    # keeps the checkpoint
    python benchmarks/four_bits.py --path exact --tokens 2                # the layers of training
    python benchmarks/four_bits.py --table                       # bytes by formula alone, of all shapes

The checkpoint is written one layer at a time, so no dense model exists at any time, and nothing is downloaded: memory
depends on shapes and not on values. Loading and generating happen in a process of its own. "peak" is the most resident
memory of that process less what it held before it loaded the model, with its libraries already imported; pages of
mapped files count. On a card the peak of its own memory stands beside it. "fused" is how serve and predict compute,
"exact" how a stage trains adapters: with weights that are turned back into numbers, a layer at a time, which is slow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lightning_rlhf.quantize.grid import Grid, Rounded, blocks_of, linear_layers
from lightning_rlhf.quantize.measure import storage_bytes
from lightning_rlhf.quantize.packing import PackedLinear, gptq_config
from lightning_rlhf.quantize.sizes import stored_bytes
from lightning_rlhf.utils.memory import PeakMemory

FUSED, EXACT = "fused", "exact"
GOAL_GB = 4.8
"""Llama-2-7B should be served in at most so much."""
LLAMA_2 = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": dict(**LLAMA_2, intermediate_size=11008, num_key_value_heads=32, vocab_size=32_000),
    "llama-3-8b": dict(**LLAMA_2, intermediate_size=14336, num_key_value_heads=8, vocab_size=128_256),
    "mistral-7b": dict(
        **LLAMA_2 | {"model_type": "mistral"}, intermediate_size=14336, num_key_value_heads=8, vocab_size=32_000
    ),
    "qwen2.5-7b": dict(
        model_type="qwen2",
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152_064,
    ),
}
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=96)
TINY |= dict(num_attention_heads=4, num_key_value_heads=2)


def make_config(shape: str, tiny: bool = False) -> PretrainedConfig:
    """The published shape, with embeddings and head apart."""
    settings = SHAPES[shape] | (TINY if tiny else {})
    special = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
    return AutoConfig.for_model(**settings, **special, dtype="float16")


def empty_model(config: PretrainedConfig) -> Any:
    """A model that has shapes and no weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


# ---------------------------------------------------------------------------------------------- a checkpoint


def random_layer(layer: nn.Linear, grid: Grid) -> PackedLinear:
    """Random weights about as large as trained ones."""
    outputs, inputs = layer.weight.shape
    groups = (outputs, inputs // grid.group_size)
    codes = torch.randint(0, grid.top + 1, (outputs, inputs), dtype=torch.uint8)
    scales = torch.full(groups, 0.2 * inputs**-0.5, dtype=torch.float16)
    middle = torch.full(groups, (grid.top + 1) // 2, dtype=torch.uint8)
    bias = None if layer.bias is None else torch.zeros(outputs, dtype=torch.float16)
    return PackedLinear(Rounded(codes, scales, middle), grid, bias)


def write_checkpoint(config: PretrainedConfig, grid: Grid, folder: Path) -> int:
    """Writes it one layer at a time, and returns the bytes of its tensors."""
    torch.manual_seed(0)
    model = empty_model(config)
    blocks, layers = blocks_of(model)
    quantized = {f"{blocks}.{name}": layer for name, layer in linear_layers(layers).items()}
    inside = {f"{name}.{part}" for name in quantized for part in ("weight", "bias")}
    shards: dict[str, dict[str, Any]] = {}  # shard -> its tensors: a quantized layer, or a plain tensor's shape
    for name, layer in quantized.items():
        shards.setdefault(_shard(name), {})[name] = layer
    for name, weight in model.named_parameters():
        if name not in inside:
            shards.setdefault(_shard(name), {})[name] = weight.shape
    index, total = {}, 0
    for shard, parts in shards.items():
        tensors: dict[str, Tensor] = {}
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                tensors |= {f"{name}.{key}": value for key, value in random_layer(part, grid).state_dict().items()}
            else:
                tensors[name] = torch.ones(part).half() if len(part) == 1 else torch.randn(part).mul_(0.02).half()
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, shard)
        total += sum(t.nbytes for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.quantization_config = gptq_config(grid, "random", blocks)
    config.save_pretrained(folder)
    return total


def _shard(name: str) -> str:
    """A file for each layer, and one for the rest."""
    parts = name.split(".")
    return f"model-{int(parts[2]):05d}.safetensors" if parts[1] == "layers" else "model-rest.safetensors"


# ---------------------------------------------------------------------------------------------- a process


def work(folder: Path, tokens: int, path: str) -> dict[str, float]:
    """Loads and generates in this process."""
    from lightning_rlhf.models.gptq import import_gptqmodel
    from lightning_rlhf.models.loading import load_causal_lm

    import_gptqmodel()
    import optimum.gptq  # noqa: F401 -- libraries are no part of a model

    card = torch.cuda.is_available()
    torch.set_num_threads(1)
    began, peak, on_card = time.perf_counter(), PeakMemory("cpu"), PeakMemory("cuda") if card else None
    with torch.device("cuda" if card else "cpu"), torch.no_grad():
        model: Any = load_causal_lm(folder, dtype="float16" if card else "bfloat16", inference=path == FUSED)
        loaded = time.perf_counter() - began
        prompt = torch.tensor([[1, 5, 9]])
        options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        ids = model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert ids.shape[1] == 3 + tokens
    most = peak.bytes()
    if most is None:
        raise OSError("This system does not tell the peak memory of a process.")
    return {
        "peak": most,
        "storages": storage_bytes(model),
        "card_peak": on_card.bytes() or 0 if on_card else 0,
        "seconds_to_load": loaded,
        "seconds_to_generate": time.perf_counter() - began - loaded,
    }


# ---------------------------------------------------------------------------------------------- the command


def table(grid: Grid) -> str:
    """Bytes of every shape by formula."""
    lines = []
    for name in SHAPES:
        model = empty_model(make_config(name))
        parts = stored_bytes(model, grid)
        sizes = [f"{value / 1e9:.2f}" for value in (parts.total, *parts)]
        lines.append([name, f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}", *sizes])
    columns = (
        "shape",
        "parameters, 1e9",
        "GB",
        "packed weights",
        "scales, zero points, index",
        "embeddings, head, norms",
    )
    return common.markdown(lines, columns)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b", help="default: %(default)s")
    parser.add_argument("--group-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--path", choices=(FUSED, EXACT), default=FUSED, help="kernels; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate; default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is written and stays; default: a temporary one"
    )
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, to try the script")
    parser.add_argument("--table", action="store_true", help="print bytes by formula, and measure nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Writes, measures, prints."""
    options = parse(arguments)
    if options.worker:
        print(json.dumps(work(options.worker, options.tokens, options.path)))
        return
    grid = Grid(bits=4, group_size=32 if options.tiny else options.group_size, sym=True)
    if options.table:
        print(table(grid))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        config = make_config(options.shape, options.tiny)
        formula = stored_bytes(empty_model(config), grid).total
        if not (folder / "config.json").exists():
            print(f"Writing {formula / 1e9:.2f} GB to {folder}", file=sys.stderr, flush=True)
            write_checkpoint(config, grid, folder)
        command = [sys.executable, __file__, "--worker", str(folder), *common.flags(options, ["tokens", "path"])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    lines = [
        ["by formula", f"{formula / 1e9:.4g}"],
        ["stored (storages of the loaded model)", f"{found['storages'] / 1e9:.4g}"],
        [f"peak, {options.path}: loading and {options.tokens} tokens", f"{found['peak'] / 1e9:.4g}"],
    ]
    if found["card_peak"]:
        lines.append(["peak on the card", f"{found['card_peak'] / 1e9:.4g}"])
    print(common.markdown(lines, (options.shape + (", tiny" if options.tiny else ""), "GB")))
    print(
        f"loaded in {found['seconds_to_load']:.0f} s, {options.tokens} tokens in {found['seconds_to_generate']:.0f} s"
    )
    peak = found["card_peak"] or found["peak"]
    if not options.tiny and options.shape == "llama-2-7b":
        over = peak / 1e9 - GOAL_GB
        print(f"goal {GOAL_GB} GB: " + ("met" if over <= 0 else f"over by {over:.2f} GB"))


if __name__ == "__main__":
    main()
