"""What the model answers, while it learns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_rlhf.data.tokens import encode_prompt


class SampleCompletions(L.Callback):
    """Shows answers to fixed prompts before training, after each validation, and at the end.

    They go to the terminal, to loggers that take text (``log_text``, or TensorBoard's ``add_text``), and always to
    ``samples.jsonl`` under the Trainer's ``default_root_dir``.

    Args:
        prompts: User turns, or message lists; None takes the first prompts of the data module's ``sample_prompts``.
        num_prompts: How many of those.
        max_new_tokens: Length limit of an answer.
        temperature: 0 is greedy. Sampling draws from a generator of its own, keyed by seed and step.
        seed: Of the sampling.
        on_start: Show answers before the first step.
    """

    def __init__(
        self,
        prompts: Sequence[str | list[dict[str, str]]] | None = None,
        num_prompts: int = 3,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        on_start: bool = True,
    ) -> None:
        self.prompts, self.num_prompts = prompts, num_prompts
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.on_start = on_start
        self._last_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answers before training."""
        if self.on_start:
            self._show(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answers after a validation inside ``fit``."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answers at the end, unless a validation has just shown them."""
        self._show(trainer, pl_module)

    def _show(self, trainer: L.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if trainer.is_global_zero:
            prompts = self._messages(trainer)
            rows = self._generate(pl_module, prompts, step)
            self._write(trainer, rows, step)
        trainer.strategy.barrier("SampleCompletions")

    def _messages(self, trainer: Any) -> list[list[dict[str, str]]]:
        if self.prompts is not None:
            return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in self.prompts]
        if not hasattr(trainer.datamodule, "sample_prompts"):
            raise ValueError("SampleCompletions: give prompts, or use a data module that has sample_prompts(n).")
        found: list[list[dict[str, str]]] = trainer.datamodule.sample_prompts(self.num_prompts)
        return found

    def _generate(self, module: Any, prompts: list[list[dict[str, str]]], step: int) -> list[dict[str, Any]]:
        """One prompt at a time: an answer must not depend on what it is shown beside."""
        tokenizer = module.tokenizer
        stops = tuple(getattr(module, "stop_token_ids", (tokenizer.eos_token_id,)))
        how: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            how = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        rows = []
        with module.policy.native_attention() as model, torch.random.fork_rng(), torch.no_grad():
            for i, messages in enumerate(prompts):
                torch.manual_seed((self.seed * 1_000_003 + step) * 1_000_003 + i)
                ids = torch.tensor([encode_prompt(tokenizer, messages)], device=module.device)  # type: ignore[arg-type]
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=self.max_new_tokens,
                    eos_token_id=list(stops),
                    pad_token_id=tokenizer.pad_token_id,
                    **how,
                )
                answer = out[0, ids.shape[1] :].tolist()
                ended = bool(answer) and answer[-1] in stops
                text = tokenizer.decode(answer, skip_special_tokens=True)
                rows.append({"step": step, "prompt": messages[-1]["content"], "completion": text, "ended": ended})
        return rows

    def _write(self, trainer: L.Trainer, rows: list[dict[str, Any]], step: int) -> None:
        file = Path(trainer.default_root_dir) / "samples.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        blocks = [f"  > {r['prompt']}\n    {r['completion'].strip()}{'' if r['ended'] else ' …'}" for r in rows]
        print(f"\nAnswers at step {step} (… = cut at {self.max_new_tokens} tokens; all in {file})")
        print("\n".join(blocks), flush=True)
        table = [[r["prompt"], r["completion"], str(r["ended"])] for r in rows]
        for logger in trainer.loggers:
            experiment = getattr(logger, "experiment", None)
            if hasattr(logger, "log_text"):
                logger.log_text(key="samples", columns=["prompt", "completion", "ended"], data=table, step=step)
            elif experiment is not None and hasattr(experiment, "add_text"):
                experiment.add_text("samples", "\n\n".join(blocks), step)
