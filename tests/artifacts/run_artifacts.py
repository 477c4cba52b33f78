"""Small fits of every stage, with what they leave: exports, samples, and the weights that these must hold.

    python run_artifacts.py MODEL_DIR OUT_DIR '{"NAME": {"stage": "sft", "kind": "lora", "strategy": "ddp"}, ...}'

Runs them one after the other. Each writes to OUT_DIR/NAME the exports ``hf`` and, of adapters, ``adapters``; samples;
and from rank 0 ``states.pt``: the weights by name, as plain tensors, when ``best`` was exported and after the fit.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import torch

from lightning_rlhf import (
    EMA,
    HFExport,
    InstructionDataModule,
    LoRA,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    SampleCompletions,
    Sampling,
    SFTModule,
)
from lightning_rlhf.strategies import whole_state_dict

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from grouping import grouped

torch.set_num_threads(1)
ROWS = [{"prompt": f"Say {i}", "completion": "dog" + f" dog {i}" * (1 + i % 3)} for i in range(8)]
PAIRS = [{"prompt": f"Say {i}", "chosen": f"fox {i}" * (1 + i % 2), "rejected": "dog"} for i in range(8)]
PROMPTS = [{"prompt": f"Say {i} " + "fox " * (i % 3)} for i in range(8)]


def letters(prompts, completions):
    return [c.count("e") + 0.1 * len(set(c)) for c in completions]


def weights(module, state):
    """Of a module's state dict the exported model's part; quantized layers as what they stand for."""
    model = module.model_to_export.model
    prefix = next(name for name, part in module.named_modules() if part is model) + "."
    mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    found = {k: v.detach().as_subclass(torch.Tensor).clone() for k, v in mine.items()}  # Gemini has a class of its own
    for name, part in model.named_modules():
        weight = getattr(part, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and not weight.is_floating_point():
            import bitsandbytes.functional as bnb

            if weight.dtype == torch.int8:
                value = bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
            else:
                value = bnb.dequantize_4bit(weight.data, weight.quant_state)
            found[f"{name}.weight"] = value.float().clone()
    return found


class Recorder(L.Callback):
    """Says that the first validation was the best, and keeps the weights of then."""

    def __init__(self):
        self.state, self.average, self.seen = None, None, 0

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("mine", float(self.seen), batch_size=1)

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        if self.seen == 0:
            state = whole_state_dict(trainer.strategy)  # all ranks must ask
            self.state = weights(pl_module, state) if trainer.is_global_zero else None
            self.average = average(trainer, pl_module)
        self.seen += 1


def average(trainer, module):
    """What EMA holds."""
    ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)
    if ema is None:
        return {}
    return {k.removeprefix("model."): v.clone() for k, v in ema.state_dict()["average"].items()}


def run(model_dir, out, stage="sft", kind="lora", strategy="auto", devices=1, precision="32-true", reward=None,
        ema=None, lr=2e-2, checkpointing=False, lora=None, **options):  # fmt: skip
    """One fit; returns the trainer and the module."""
    L.seed_everything(0, verbose=False)
    out = Path(out)
    lora = None if kind == "full" else LoRA(**{"r": 4, "alpha": 8, **(lora or {})})
    common = dict(
        lora=lora,
        quantization=kind if kind in ("nf4", "int8") else None,
        gradient_checkpointing=checkpointing,
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr if lora else lr / 4),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        **options,
    )
    files = dict(cache_dir=out / "cache", batch_size=4)
    if stage == "sft":
        module, data = SFTModule(model_dir, **grouped(**common)), InstructionDataModule(ROWS, val=ROWS[:4], **files)
    elif stage == "reward":
        module, data = RewardModule(model_dir, **grouped(**common)), PreferenceDataModule(PAIRS, val=PAIRS[:4], **files)
    else:
        sampling = Sampling(max_new_tokens=8, temperature=0.7)
        module = PPOModule(
            model_dir, reward or letters, **grouped(sampling=sampling, epochs=2, max_norm=None, **common)
        )
        data = PromptDataModule(PROMPTS, val=PROMPTS[:4], **files)
    recorder = Recorder()
    callbacks = [recorder, HFExport(str(out / "hf"), monitor="mine")]
    if lora is not None:
        callbacks.append(HFExport(str(out / "adapters"), monitor="mine", adapter_only=True))
    if stage != "reward":
        callbacks.append(SampleCompletions(["Say 1", "Say 2 fox"], max_new_tokens=6, on_start=False))
    if ema is not None:
        callbacks.append(EMA(ema))
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=made(strategy), precision=precision, max_epochs=2, logger=False,
        callbacks=callbacks, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=out, num_sanity_val_steps=1,
    )  # fmt: skip
    trainer.fit(module, data)
    if trainer.is_global_zero:
        last = weights(module, module.state_dict())
        best = {**recorder.state, **recorder.average}
        state = {"best": best, "last": {**last, **average(trainer, module)}, "stops": list(module.stop_token_ids)}
        torch.save(state, out / "states.pt")
    return trainer, module


def made(strategy):
    if strategy != "gemini":
        return strategy
    from lightning_rlhf.strategies import ColossalAIStrategy

    return ColossalAIStrategy("gemini", min_chunk_elements=2**10)  # of a small model's weights: else none is split


if __name__ == "__main__":
    for name, settings in json.loads(sys.argv[3]).items():
        run(sys.argv[1], Path(sys.argv[2]) / name, **settings)
