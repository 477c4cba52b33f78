"""What the stages that learn from their own samples share: rollouts, minibatches, updates that ranks take together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rlhf.data.experience import Experience, cut
from lightning_rlhf.data.packed import Branch, PackedBatch, Tree, pack
from lightning_rlhf.data.planner import generator
from lightning_rlhf.data.prompts import PromptBatch
from lightning_rlhf.functional.advantages import merge_moments, moments
from lightning_rlhf.functional.kl import k1, k3
from lightning_rlhf.functional.precision import wide
from lightning_rlhf.rewards import Samples
from lightning_rlhf.rollout import Completion, Request, RolloutEngine, Sampling, sample_key
from lightning_rlhf.stages.base import Stage
from lightning_rlhf.strategies import ColossalAIStrategy, whole_weights
from lightning_rlhf.strategies.sharded import ShardedOptimizer

#: Keys of validation samples: they must not follow the iteration, so that validations can be compared.
VALIDATION = -1


class OnlineStage(Stage):
    """Base of the stages whose data are samples of the policy; one ``training_step`` is one iteration.

    An iteration is a rollout and its updates. Exactly one of its optimizer steps goes through Lightning's counters, so
    that ``global_step``, ``max_steps``, schedules and checkpoints are in iterations.

    Losses are divided by the whole minibatch's totals, so that the sum of all ranks' gradients is exact. One collective
    an update makes it, not backward passes, except where the strategy shards gradients.

    Attributes:
        iteration: Iterations done.
        dropped: Updates in a row that were dropped because something in them was not finite.
    """

    sampling: Sampling
    samples_per_prompt: int
    engine: RolloutEngine
    seed: int
    micro_batch_tokens: int | None
    max_norm: float | None
    max_dropped: int
    automatic_optimization: ClassVar[bool] = False
    iteration: int = 0
    dropped: int = 0

    @property
    def prompt_limit(self) -> int | None:
        """Most tokens of a prompt that leave room for a completion; data modules ask."""
        return None if self.context_length is None else self.context_length - self.sampling.max_new_tokens

    def on_fit_start(self) -> None:
        """Refuses strategies that would not sum gradients as this stage does; silences a warning that misleads.

        Raises:
            ValueError: It is one.
        """
        super().on_fit_start()
        if isinstance(self.trainer.strategy, ColossalAIStrategy) and self.trainer.strategy.placement == "auto":
            raise ValueError(
                f"{type(self).__name__} samples before its first training step, which Gemini's placement='auto' can't "
                "have: set the strategy's placement to static."
            )
        if not isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"{type(self).__name__} runs on one device, under DDP and under colossalai_..., not under "
                f"{type(self.trainer.strategy).__name__}: set trainer.strategy to one of these."
            )
        # Its advice is for one optimizer step a batch; here a checkpoint after the iteration is what resumes exactly.
        warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization", UserWarning)

    # ------------------------------------------------------------------------------------------------- rollout

    def rollout(self, prompts: PromptBatch, iteration: int) -> tuple[Experience, Samples | None]:
        """Samples completions of this rank's prompts.

        Args:
            prompts: B prompts, possibly none.
            iteration: Decides the samples, with the module's seed and the prompts' rows.

        Returns:
            The experience, without columns yet, and what rewards read; None where there is no prompt.
        """
        if not prompts.prompts:
            with whole_weights(self.strategy, self.exportable):  # the other ranks enter it
                return Experience([], (), {"rollout_logprobs": torch.zeros(0)}), None
        numbers = range(self.samples_per_prompt)
        requests = [
            Request(ids, [sample_key(self.seed, iteration, row, i) for i in numbers])
            for ids, row in zip(prompts.prompts, prompts.rows, strict=True)
        ]
        with whole_weights(self.strategy, self.exportable):
            found = self.engine.generate(self.exportable, self.tokenizer, requests, self.sampling, self.stop_token_ids)
        return self.collect(prompts, found)

    def collect(self, prompts: PromptBatch, found: Sequence[Sequence[Completion]]) -> tuple[Experience, Samples]:
        """Prompts with their completions, as the losses and as rewards read them.

        Args:
            prompts: At least one.
            found: Completions of each, at least one.

        Returns:
            The experience, without columns yet, and the samples.
        """
        trees = [
            Tree(ids, [Branch(c.input_ids) for c in completions])
            for ids, completions in zip(prompts.prompts, found, strict=True)
        ]
        every = [completion for completions in found for completion in completions]
        logprobs = torch.tensor([logprob for completion in every for logprob in completion.logprobs])

        def each(values: Iterable[Any]) -> list[Any]:
            return [v for v, completions in zip(values, found, strict=True) for _ in completions]

        samples = Samples(
            batch=pack(trees, rows=prompts.rows).to(self.device),
            prompts=each(prompts.messages),
            completions=[completion.text for completion in every],
            truncated=[completion.truncated for completion in every],
            columns={name: each(column) for name, column in prompts.columns.items()},
        )
        return Experience(trees, prompts.rows, {"rollout_logprobs": logprobs}), samples

    # ------------------------------------------------------------------------------------------------- minibatches

    def minibatches(self, experience: Experience, parts: int, epoch: int) -> list[list[int]]:
        """Deals the prompts of all ranks into minibatches, by a shuffle of its own for each epoch.

        The deal goes by the prompts' rows, not by who holds them: it is the same on one rank and on several.

        Args:
            experience: This rank's.
            parts: Minibatches.
            epoch: Of this iteration.

        Returns:
            For each minibatch, this rank's trees in it.
        """
        everyone: list[Any] = [experience.rows]
        if self._ranks() > 1:
            everyone = [None] * self._ranks()
            dist.all_gather_object(everyone, experience.rows)
        places = sorted((row, rank, i) for rank, rows in enumerate(everyone) for i, row in enumerate(rows))
        order = torch.randperm(len(places), generator=generator(self.seed, self.iteration, epoch)).tolist()
        edges = [len(places) * part // parts for part in range(parts + 1)]
        mine = self.global_rank if self._ranks() > 1 else 0
        dealt = [[places[j] for j in order[a:b]] for a, b in pairwise(edges)]
        # in the order of the experience: then a single minibatch is cut as `measure` cuts, and rounds alike
        return [sorted(i for _, rank, i in part if rank == mine) for part in dealt if part]

    def micro_batches(
        self, experience: Experience, chosen: Sequence[int] | None = None
    ) -> Iterator[tuple[PackedBatch, dict[str, Tensor]]]:
        """This rank's part of a minibatch, or all it has, packed; all ranks make the same number."""
        chosen = range(len(experience.trees)) if chosen is None else chosen
        parts = len(cut([experience.trees[i].num_tokens for i in chosen], self.micro_batch_tokens))
        most = int(self.all_reduce(torch.tensor(float(parts)), dist.ReduceOp.MAX))
        return experience.micro_batches(chosen, self.micro_batch_tokens, self.device, at_least=most)

    @torch.no_grad()
    def measure(self, experience: Experience, model: Callable[[PackedBatch], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Runs a model over all of an experience; (N,) or (S,) tensors in its order, on the CPU."""
        parts = []
        for batch, _ in self.micro_batches(experience):
            found = model(batch)
            keep = len(batch.rows) > 0  # else a filler
            parts.append(tuple((t if keep else t[:0]).cpu() for t in found))
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    # ------------------------------------------------------------------------------------------------- ranks

    def _ranks(self) -> int:
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def all_reduce(self, values: Tensor, operation: Any = None) -> Tensor:
        """The sum over ranks (or what else ``operation`` is) of a small tensor."""
        if self._ranks() == 1:
            return values
        values = values.to(self.device, copy=True)
        dist.all_reduce(values, operation or dist.ReduceOp.SUM)
        return values.cpu()

    def all_gather_rows(self, values: Tensor) -> Tensor:
        """(R, ...) a small tensor of each rank."""
        if self._ranks() == 1:
            return values[None]
        values = values.to(self.device)
        found = [torch.empty_like(values) for _ in range(self._ranks())]
        dist.all_gather(found, values)
        return torch.stack(found).cpu()

    def moments(self, values: Tensor) -> Tensor:
        """(3,) moments of values over all ranks; see :func:`~lightning_rlhf.functional.advantages.moments`."""
        return merge_moments(self.all_gather_rows(moments(values)))

    def summary(
        self,
        score: Tensor,
        reward: Tensor,
        truncated: Tensor,
        sequence: Tensor,
        log_ratio: Tensor,
        entropies: Tensor,
        drift: Tensor,
    ) -> dict[str, float]:
        """What is logged of an iteration's completions, over all ranks.

        Args:
            score: (S,) raw scores.
            reward: (S,) sums of tokens' rewards.
            truncated: (S,) whether the length limit cut it.
            sequence: (N,) each token's completion.
            log_ratio: (N,) policy's minus reference's log-probs.
            entropies: (N,) in nats.
            drift: (N,) log-probs computed anew minus those kept by the engine.

        Returns:
            Means, spreads and extremes by name.
        """
        by_token = torch.stack([k1(log_ratio), k3(log_ratio), entropies, torch.ones_like(entropies)], 1)
        by_sequence = torch.zeros(len(score), 4).to(by_token).index_add(0, sequence, by_token)
        error = torch.zeros(len(score)).to(drift).scatter_reduce(0, sequence, drift.abs(), "amax")
        table = torch.cat([torch.stack([score, reward, truncated, error], 1).to(by_token), by_sequence], 1)
        everyone: list[Any] = [table]
        if self._ranks() > 1:
            everyone = [None] * self._ranks()
            dist.all_gather_object(everyone, table)
        scores, rewards, cut_off, errors, kl, kl_k3, entropy, lengths = torch.cat(everyone).unbind(1)
        found = {
            "score": scores.mean(),
            "score_std": scores.std(correction=0),
            "score_min": scores.min(),
            "score_max": scores.max(),
            "reward_mean": rewards.mean(),
            "reward_std": rewards.std(correction=0),
            "reward_min": rewards.min(),
            "reward_max": rewards.max(),
            "kl": kl.mean(),
            "kl_k3": kl_k3.mean(),
            "entropy": entropy.sum() / lengths.sum(),
            "length_mean": lengths.mean(),
            "length_min": lengths.min(),
            "length_max": lengths.max(),
            "stopped": 1 - cut_off.mean(),
            "rollout_error": errors.max(),
            "tokens": lengths.sum(),
        }
        return {name: value.item() for name, value in found.items()}

    # ------------------------------------------------------------------------------------------------- updates

    @property
    def strategy(self) -> Strategy | None:
        """The Trainer's; None without a Trainer, where rollouts and scores serve a project's own loop."""
        try:
            return self.trainer.strategy
        except RuntimeError:  # the one public way to ask
            return None

    @property
    def _sharded(self) -> ColossalAIStrategy | None:
        """The strategy, where ranks hold parts of gradients."""
        strategy = self.strategy
        return strategy if isinstance(strategy, ColossalAIStrategy) and strategy.sharded else None

    def apart(self) -> AbstractContextManager[None]:
        """Within it backward passes leave gradients to this rank, unless the strategy shards them."""
        strategy = self.strategy
        if isinstance(strategy, DDPStrategy) and not self._sharded:
            return strategy.block_backward_sync()
        return nullcontext()

    def accumulate(self, loss: Tensor) -> None:
        """A backward pass: adds a part of a minibatch's loss to its gradients."""
        self.manual_backward(loss * self._ranks() if self._sharded else loss)  # those that shard them average

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
        """As ``torch.nn.utils.clip_grad_norm_``, wherever the gradients are; None only measures."""
        if self._sharded:
            return self._sharded.clip_grad_norm(list(parameters), max_norm)
        return nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)

    def drop_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sets gradients to none."""
        for p in parameters:
            p.grad = None
        if self._sharded:
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()

    def update(self, parameters: Sequence[nn.Parameter], loss: float, first: bool) -> bool:
        """Sums gradients over ranks and steps all optimizers, or drops the update, on all ranks alike.

        Args:
            parameters: What the optimizers train.
            loss: The whole loss, the same on all ranks.
            first: Whether no update of this iteration was taken yet; the first is the one that Lightning counts.

        Returns:
            Whether it was taken.

        Raises:
            RuntimeError: ``max_dropped`` updates in a row were dropped.
        """
        if self._ranks() > 1 and not self._sharded:
            for p in parameters:  # ranks whose part was empty
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            for dtype in {p.dtype for p in parameters}:
                gradients = [p.grad for p in parameters if p.dtype == dtype and p.grad is not None]
                flat = torch.cat([g.flatten() for g in gradients])
                dist.all_reduce(flat)
                for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                    gradient.copy_(summed.view_as(gradient))
        norm = self.clip(parameters, None) if self._sharded else gradient_norm(parameters)
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # it looks for overflow itself
        scaled = scaled or (self._sharded is not None and self._sharded.scales_losses)
        finite = math.isfinite(loss) and (scaled or bool(norm.isfinite()))
        if finite:
            self._step(count=first)
            self.dropped = 0
        else:
            self.dropped += 1
        self.drop_gradients(parameters)
        if self.dropped >= self.max_dropped:
            raise RuntimeError(
                f"{self.dropped} updates in a row had a loss or gradient that was not finite (iteration "
                f"{self.iteration}), and were dropped. Lower the learning rate, look at the rewards, or resume from "
                "the last checkpoint with another seed."
            )
        return finite

    def count_iteration(self, parameters: Sequence[nn.Parameter]) -> None:
        """A step without gradients, which changes nothing, for an iteration that took no update."""
        self.drop_gradients(parameters)
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # it asserts that there are gradients
            self._step(count=True)

    def _step(self, count: bool) -> None:
        found: Any = self.optimizers()
        for i, optimizer in enumerate(found if isinstance(found, list) else [found]):
            if count and i == 0:
                optimizer.step()
            else:
                self.trainer.strategy.optimizer_step(optimizer.optimizer, closure=lambda: None)

    def step_schedules(self) -> None:
        """One step of each schedule, once an iteration."""
        found: Any = self.lr_schedulers()
        for scheduler in found if isinstance(found, list) else [found] if found is not None else []:
            scheduler.step()

    # ------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the iteration and what it counts."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["online"] = {"iteration": self.iteration, "dropped": self.dropped}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["online"]
        self.iteration, self.dropped = state["iteration"], state["dropped"]


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """The model's own parameters that an optimizer trains, also where it steps shards of them."""
    if isinstance(optimizer, ShardedOptimizer):
        return optimizer.parameters
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """2-norm of all gradients, in fp32 at least."""
    norms = [wide(p.grad).norm() for p in parameters if p.grad is not None]
    return torch.stack([norm.float() for norm in norms]).norm() if norms else torch.zeros(())


def disable_dropout(model: nn.Module) -> None:
    """Takes all dropout out of a model, whatever mode it is in: in RL it would make ratios differ from 1.

    Evaluation mode would do so too, but transformers checkpoints activations in training mode only. Dropout is a
    module, or a number of an attention layer or block, named so by all families.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
                setattr(module, name, 0.0)
