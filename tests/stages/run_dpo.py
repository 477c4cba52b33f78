"""A small DPO run as a process of its own, for tests of several processes and of resume.

    python run_dpo.py MODEL_DIR OUT_DIR '{"devices": 2, "accumulate": 1, ...}'

Writes to OUT_DIR gradients.pt (the first step's, as the optimizer got them), weights.pt (trained) and metrics.json.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

from lightning_rlhf import DPOModule, Load, LoRA, PairShaping, PreferenceDataModule, ReferenceUpdate
from lightning_rlhf.models import load_causal_lm, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from grouping import grouped
from runs import train

torch.set_num_threads(1)
BUNDLED = Path(__file__).parents[2] / "lightning_rlhf" / "data" / "bundled"


def real_pairs(n=8, longest=400, files=None):
    """The first pairs with at most so many bytes, in English and in Chinese; by default of the bundled data."""
    found = []
    for file in files or (BUNDLED / f"preferences.{language}.jsonl" for language in ("en", "zh")):
        found += map(json.loads, Path(file).read_text(encoding="utf-8").splitlines())
    found = [r for r in found if sum(len(str(r[k]).encode()) for k in ("prompt", "chosen", "rejected")) < longest]
    found = [row for language in ("en", "zh") for row in [r for r in found if r["lang"] == language][: n // 2]]
    assert len(found) == n
    return found


def rounded_weights(model_dir):
    """The weights of a model that was loaded in NF4, dequantized by bitsandbytes' own function."""
    bnb = pytest.importorskip("bitsandbytes")
    load = Load(quantization="nf4")
    model = load_causal_lm(model_dir, **load.options(None, load_tokenizer(model_dir), ()))
    found = {}
    for name, p in model.named_parameters():
        four_bits = isinstance(p, bnb.nn.Params4bit)
        found[name] = bnb.functional.dequantize_4bit(p.data, p.quant_state) if four_bits else p.detach()
    assert sum(isinstance(p, bnb.nn.Params4bit) for p in model.parameters()) == 14  # of two layers
    return found


def merge(model, start):
    """Merges adapters at their values of ``start`` into a plain model; returns a function that gives their gradients.

    They are made of those of the merged weights, which the model must have by then.
    """
    scale, own = 32.0 / 4, dict(model.named_parameters())
    layers = [name.removesuffix(".lora_A.default.weight") for name in start if ".lora_A." in name]
    merged = {layer: own[f"{layer.removeprefix('model.base_model.model.')}.weight"] for layer in layers}
    a, b = ({n: start[f"{n}.lora_{x}.default.weight"].double() for n in layers} for x in "AB")
    for layer, weight in merged.items():
        weight.data += scale * b[layer] @ a[layer]

    def gradients():
        found = {}
        for layer, weight in merged.items():
            found[f"{layer}.lora_A.default.weight"] = scale * b[layer].T @ weight.grad
            found[f"{layer}.lora_B.default.weight"] = scale * weight.grad @ a[layer].T
        return found

    return gradients


def rows(n=24, words="dog 你好 "):
    """Pairs with margins, and rankings of three, of mixed length."""
    out = []
    for i in range(n):
        row = {"prompt": f"Say {i} " + "fox " * (i % 5), "source": "books" if i % 2 else "hh"}
        answers = [f"{i} " + words * (1 + i % 7), f"Paris {i}", "fine " * (1 + i % 4)]
        if i % 3 == 0:
            row |= {"ranked": answers, "scores": [3.5, 2.5, 2.25]}
        else:
            row |= {"chosen": answers[i % 2], "rejected": answers[1 - i % 2], "margin": 0.1 * i}
        out.append(row)
    return out


def reordered(data, order):
    """Rows in another order; 0 leaves them."""
    if not order:
        return data
    return [data[i] for i in torch.randperm(len(data), generator=torch.Generator().manual_seed(order))]


class First(L.Callback):
    """Keeps what the optimizer is first handed and what the last step logs; fills adapters, which begin as zeros."""

    def on_fit_start(self, trainer, pl_module):
        generator = torch.Generator().manual_seed(3)
        for name, p in pl_module.policy.named_parameters():
            if "lora_B" in name and self.fill:
                p.data = 0.05 * torch.randn(p.shape, generator=generator)

    def __init__(self, fill):
        self.fill = fill

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not trainer.global_step:
            named = pl_module.policy.named_parameters()
            self.gradients = {k: p.grad.clone() for k, p in named if p.grad is not None}
            self.start = {k: p.detach().clone() for k, p in pl_module.policy.named_parameters()}

    def on_train_end(self, trainer, pl_module):
        self.metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}


def run(model_dir, out_dir, devices=1, accumulate=1, workers=0, lora=False, layout="auto", max_epochs=2, ckpt=None,
        max_steps=-1, save_every=0, batch_size=12, seed=0, order=0, lr=1e-2, val_fraction=0.3, real=False,
        fill=False, checkpointing=False, quantization=None, use_margin=False, pair_weight="pair", shaping=None,
        max_tokens=None, reference_update=None, callbacks=(), data=None, **settings):  # fmt: skip
    """One run; returns the trainer, the module, and what the first step was."""
    L.seed_everything(seed, verbose=False)
    module = DPOModule(
        model_dir,
        **grouped(
            lora=LoRA(r=4) if lora else None,
            layout=layout,
            gradient_checkpointing=checkpointing,
            quantization=quantization,
            optimizer=lambda params: torch.optim.AdamW(params, lr=lr),
        ),
        **({"shaping": PairShaping(**shaping)} if shaping else {}),
        reference_update=ReferenceUpdate(**reference_update) if reference_update else None,
        **settings,
    )
    data = PreferenceDataModule(
        reordered(data or (real_pairs() if real else rows()), order),
        val_fraction=val_fraction,
        batch_size=batch_size,
        eval_batch_size=8,
        max_tokens=max_tokens,
        num_workers=workers,
        use_margin=use_margin,
        pair_weight=pair_weight,
        cache_dir=Path(out_dir) / "cache",
    )
    first = First(fill)
    trainer = train(
        module,
        data,
        out_dir,
        lambda module: module.policy.named_parameters(),
        [*callbacks, first],
        devices,
        save_every,
        ckpt,
        accumulate_grad_batches=accumulate,
        max_epochs=max_epochs,
        max_steps=max_steps,
    )
    if trainer.is_global_zero and hasattr(first, "gradients"):
        torch.save(first.gradients, Path(out_dir) / "gradients.pt")
    return trainer, module, first


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
