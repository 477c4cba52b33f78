"""Learning results: what each stage learns on small real models.

    python benchmarks/learning.py sft_smollm2            # seeds 0, 1, 2; a table, and a line a run in results/
    python benchmarks/learning.py sft_stories260k --seeds 0

Settings and seeds stand in this file and were committed before the runs that the README reports. Every finished run
adds a line to ``benchmarks/results/learning.jsonl``; none is left out.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from lightning_rlhf import InstructionDataModule, LoRA, PreferenceDataModule, RewardModule, SaveOnInterrupt, SFTModule
from lightning_rlhf.models.pretrained import obtain

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "learning.jsonl"
ASSETS = Path(os.environ.get("LIGHTNING_RLHF_ASSETS", ROOT.parent / "shared"))
STORIES = ASSETS / "models" / "stories260K"


def sft_smollm2(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """SmolLM2-135M-Instruct by LoRA on the bundled data, both languages, 1 epoch; a tenth held out by the seed."""
    module = SFTModule(
        obtain("smollm2-135m-instruct"),
        lora=LoRA(r=16, alpha=32),
        optimizer=lambda params: torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0),
    )
    return _held_out(module, InstructionDataModule(batch_size=8, seed=seed), epochs=1, max_steps=max_steps)


def sft_stories260k(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """stories260K in full on the bundled English data, 10 epochs; rows over its 512 tokens are skipped and counted."""
    return _sft_stories(seed, 10, max_steps)


def sft_stories260k_short(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """The same for 2 epochs: a hundred rows are over-fitted in 10."""
    return _sft_stories(seed, 2, max_steps)


def _sft_stories(seed: int, epochs: int, max_steps: int) -> dict[str, Any]:
    module = SFTModule(
        STORIES,
        chat_template="plain",
        optimizer=lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=0.01),
    )
    english = importlib.resources.files("lightning_rlhf.data") / "bundled" / "instructions.en.jsonl"
    data = InstructionDataModule(str(english), batch_size=8, max_length=512, on_bad_row="skip", seed=seed)
    return _held_out(module, data, epochs, max_steps)


def reward_stories260k(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """stories260K in full on pairs of its own samples, of which VADER finds one happier; 4 epochs, a fifth held out."""
    module = RewardModule(
        STORIES,
        chat_template="plain",
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01),
    )
    data = PreferenceDataModule(_happier(seed, pairs=3000), batch_size=64, val_fraction=0.2, seed=seed)
    return _held_out(module, data, epochs=4, max_steps=max_steps)


def reward_smollm2(seed: int, max_steps: int = -1) -> dict[str, Any]:
    """SmolLM2-135M-Instruct by LoRA on 40 x 8 real preferences up to 384 tokens; 15 % held out by first user turn."""
    module = RewardModule(
        obtain("smollm2-135m-instruct"),
        lora=LoRA(r=16, alpha=32),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0),
    )
    real = str(ASSETS / "data" / "preference.jsonl")
    data = PreferenceDataModule(real, batch_size=16, max_length=384, on_bad_row="skip", val_fraction=0.15, seed=seed)
    return _held_out(module, data, epochs=1, max_steps=40 if max_steps < 0 else max_steps)


OPENINGS = [
    f"{start} {who}"
    for start in ("Once upon a time,", "One day,", "Yesterday,", "In the morning,", "At night,", "After lunch,")
    for who in (
        "a little girl",
        "a boy",
        "a dog",
        "the cat",
        "Lily",
        "Tom",
        "Mom",
        "a big bear",
        "the old man",
        "a bird",
    )
]


def _happier(seed: int, pairs: int) -> list[dict[str, str]]:
    """Pairs of samples of 48 tokens that open alike, whose sentiments differ by at least 0.2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    judge = SentimentIntensityAnalyzer()
    torch.manual_seed(seed)
    rows: list[dict[str, str]] = []
    while len(rows) < pairs:
        for opening in OPENINGS:
            ids = torch.tensor([tokenizer(opening).input_ids] * 32)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=48, pad_token_id=0
            )
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for one, other in zip(texts[::2], texts[1::2], strict=True):
                chosen, rejected = sorted((one, other), key=lambda t: -judge.polarity_scores(t)["compound"])
                apart = judge.polarity_scores(chosen)["compound"] - judge.polarity_scores(rejected)["compound"]
                if apart >= 0.2 and rejected.strip():
                    # numbered openings: the split goes by them, and pairs must not all fall on one side
                    rows.append({"prompt": f"{len(rows)}. {opening}", "chosen": chosen, "rejected": rejected})
    return rows[:pairs]


def _held_out(
    module: SFTModule | RewardModule,
    data: InstructionDataModule | PreferenceDataModule,
    epochs: int,
    max_steps: int,
) -> dict[str, Any]:
    """Trains between two measurements of what validation logs."""
    quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = L.Trainer(
        max_epochs=epochs,
        max_steps=max_steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        default_root_dir=ROOT / "runs" / "learning",
        **quiet,
    )

    def measure() -> dict[str, float]:
        # a Trainer of its own: the training one is told to validate nothing
        found = L.Trainer(**quiet).validate(module, data, verbose=False)[0]
        return {name.removeprefix("val/"): value for name, value in found.items()}

    before = measure()
    trainer.fit(module, data)
    if any(isinstance(c, SaveOnInterrupt) and c.interrupted for c in trainer.callbacks):
        raise SystemExit("Interrupted: a run cut short is no result.")
    after = measure()
    fixed = [name for name in before if name in ("length_accuracy", "matched_pairs")]
    shown = {
        f"{n} {when}": v[n] for n in before if n not in fixed for when, v in (("before", before), ("after", after))
    }
    return {"steps": trainer.global_step, **{n: after[n] for n in fixed}, **shown}


STUDIES: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f for f in (sft_smollm2, sft_stories260k, sft_stories260k_short, reward_stories260k, reward_smollm2)
}


def main() -> None:
    """Runs a study for each seed, and prints every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=-1, help="cut short, to try it; such runs are not recorded")
    options = parser.parse_args()
    study = STUDIES[options.study]
    print(f"{options.study}: {study.__doc__}")
    rows = []
    for seed in options.seeds:
        L.seed_everything(seed, verbose=False)
        began = time.process_time()
        found = study(seed, options.max_steps)
        rows.append({"seed": seed, **found, "CPU seconds": time.process_time() - began})
        print(json.dumps(rows[-1]), flush=True)
        if options.max_steps < 0:
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps({"study": options.study, **rows[-1]}) + "\n")
    print(f"\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(f'{v:.3f}' if isinstance(v, float) else str(v) for v in row.values())} |")


if __name__ == "__main__":
    main()
