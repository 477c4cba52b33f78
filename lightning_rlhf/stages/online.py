"""What the stages that learn from their own samples share: rollouts, minibatches, what is logged of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lightning_rlhf.data.experience import Experience
from lightning_rlhf.data.formats import Message
from lightning_rlhf.data.packed import Branch, PackedBatch, Tree, pack
from lightning_rlhf.data.prompts import PromptBatch, PromptDataModule
from lightning_rlhf.data.templates import turn_end
from lightning_rlhf.functional.kl import k1, k3
from lightning_rlhf.rewards import Samples
from lightning_rlhf.rollout import Completion, Request, RolloutEngine, Sampling, as_answers, sample_key
from lightning_rlhf.rollout.detokenizer import tail, tokens_of
from lightning_rlhf.stages.updates import ManualStage
from lightning_rlhf.strategies import ColossalAIStrategy, whole_weights
from lightning_rlhf.utils.collectives import gather_objects
from lightning_rlhf.utils.random import generator

#: Keys of validation samples: they must not follow the iteration, so that validations can be compared.
VALIDATION = -1


class OnlineStage(ManualStage):
    """Base of the stages whose data are samples of the policy: an iteration is a rollout and its updates."""

    works_on = "prompts"
    sampling: Sampling
    samples_per_prompt: int
    engine: RolloutEngine
    seed: int
    micro_batch_tokens: int | None

    @property
    def prompt_limit(self) -> int | None:
        """Most tokens of a prompt that leave room for a completion; data modules ask.

        Raises:
            ValueError: None does.
        """
        if self.context_length is None:
            return None
        room = self.context_length - self.sampling.max_new_tokens
        if room < 1:
            raise ValueError(
                f"sampling.max_new_tokens={self.sampling.max_new_tokens} leaves no room for a prompt in the model's "
                f"context of {self.context_length} tokens. Set it to at most {self.context_length - 1}."
            )
        return room

    def limits(self) -> dict[str, int]:
        """Most tokens of a prompt with its completion, by what sets the limit; known once models are loaded."""
        return {}

    def check_lengths(self, *parts: str) -> None:
        """Refuses, before the first rollout, prompts that could have completions which a model can't read.

        Args:
            parts: Of the data: ``train``, ``val``, ``test``, ``predict``.

        Raises:
            ValueError: There are such prompts; the message says which settings would do.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PromptDataModule):
            return  # who brings loaders of their own knows the lengths of their prompts
        new, longest = self.sampling.max_new_tokens, max(map(data.longest, parts))
        limits = self.limits()
        if "train" in parts and self.micro_batch_tokens is not None:
            limits["micro_batch_tokens"] = self.micro_batch_tokens
        for name, limit in limits.items():
            if longest and longest + new > limit:
                do = [f"sampling.max_new_tokens to at most {limit - longest}"] if limit > longest else []
                do += [f"data.max_length (of prompts) to at most {limit - new}"] if limit > new else []
                do += [f"{name} to at least {longest + new}"] if name == "micro_batch_tokens" else []
                raise ValueError(
                    f"A prompt of {longest} tokens and a completion of sampling.max_new_tokens={new} have "
                    f"{longest + new}, over {limit}: {name}. Set {', or '.join(do) or 'shorter ones'}."
                )

    def setup(self, stage: str) -> None:
        """Refuses, before anything is loaded, a module that was compiled as a whole.

        Raises:
            ValueError: It was.
        """
        super().setup(stage)
        if getattr(self, "_compiler_ctx", None) is not None:  # Lightning has no public name for it
            raise ValueError(
                f"torch.compile({type(self).__name__}) would compile the loops of rollouts and updates anew for each "
                "batch: compile the model alone, by module.configure_model() and module.policy.compile()."
            )

    def on_fit_start(self) -> None:
        """Refuses what can't sample, and lengths that would end the run, before the first step.

        Raises:
            ValueError: The strategy can't, or completions could be too long.
        """
        super().on_fit_start()
        self.check_lengths("train", "val")
        off = Sampling()
        names = ("top_k", "top_p", "repetition_penalty", "min_new_tokens")
        if changed := [name for name in names if getattr(self.sampling, name) != getattr(off, name)]:
            given = ", ".join(f"sampling.{name}={getattr(self.sampling, name)}" for name in changed)
            rank_zero_warn(
                f"{given}: completions are drawn from another distribution than log-probs, ratios and KL are of, so "
                "that gradients and the KL are biased (docs/ppo.md, Sampling). To train without bias leave "
                f"{'it' if len(changed) == 1 else 'them'} out."
            )
        if isinstance(self.strategy, ColossalAIStrategy) and self.strategy.placement == "auto":
            raise ValueError(
                f"{type(self).__name__} samples before its first training step, which Gemini's placement='auto' can't "
                "have: set the strategy's placement to static."
            )

    def on_validation_start(self) -> None:
        """As before a fit."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self.check_lengths("val")

    def on_test_start(self) -> None:
        """As before a fit."""
        self.check_lengths("test")

    def on_predict_start(self) -> None:
        """As before a fit."""
        self.check_lengths("predict")

    # ------------------------------------------------------------------------------------------------- rollout

    def rollout(self, prompts: PromptBatch, iteration: int) -> tuple[Experience, Samples | None]:
        """Samples completions of this rank's prompts.

        Args:
            prompts: B prompts, possibly none.
            iteration: Decides the samples, with the module's seed and the prompts' rows. All ranks must call, but for
                :data:`VALIDATION`.

        Returns:
            The experience, without columns yet, and what rewards read; None where there is no prompt.
        """
        before = self._times_before(prompts.rows, iteration)
        if not prompts.prompts:
            with whole_weights(self.strategy, self.model_to_export):  # the other ranks enter it
                return Experience([], (), {"rollout_logprobs": torch.zeros(0)}), None
        count = self.samples_per_prompt
        requests = [
            Request(ids, [sample_key(self.seed, iteration, row, i) for i in range(times * count, (times + 1) * count)])
            for ids, row, times in zip(prompts.prompts, prompts.rows, before, strict=True)
        ]
        with whole_weights(self.strategy, self.model_to_export):
            found = self.engine.generate(
                self.model_to_export, self.tokenizer, requests, self.sampling, self.stop_token_ids
            )
        return self.collect(prompts, as_answers(self.tokenizer, prompts.messages, found))

    def _times_before(self, rows: Sequence[int], iteration: int) -> list[int]:
        """How often each row stands before its place among those of all ranks: a row's copies get unlike samples."""
        everyone = gather_objects(tuple(rows)) if iteration != VALIDATION else [tuple(rows)]
        rank = self.global_rank if len(everyone) > 1 else 0
        seen = Counter(row for earlier in everyone[:rank] for row in earlier)
        times = []
        for row in rows:
            times.append(seen[row])
            seen[row] += 1
        return times

    def collect(self, prompts: PromptBatch, found: Sequence[Sequence[Completion]]) -> tuple[Experience, Samples]:
        """Prompts with their completions, as the losses and as rewards read them.

        Args:
            prompts: At least one.
            found: Completions of each, at least one.

        Returns:
            The experience, without columns yet, and the samples.
        """
        trees, read = [], []
        for ids, prompt, completions in zip(prompts.prompts, prompts.messages, found, strict=True):
            trees.append(Tree(ids, [Branch(c.input_ids) for c in completions]))
            read.append(Tree(ids, [Branch(self._read(ids, prompt, c)) for c in completions]))
        every = [completion for completions in found for completion in completions]
        logprobs = torch.tensor([logprob for completion in every for logprob in completion.logprobs])

        def each(values: Iterable[Any]) -> list[Any]:
            return [v for v, completions in zip(values, found, strict=True) for _ in completions]

        samples = Samples(
            batch=pack(read, rows=prompts.rows).to(self.device),
            prompts=each(prompts.messages),
            completions=[completion.text for completion in every],
            truncated=[completion.truncated for completion in every],
            columns={name: each(column) for name, column in prompts.columns.items()},
        )
        return Experience(trees, prompts.rows, {"rollout_logprobs": logprobs}), samples

    def _read(self, ids: list[int], prompt: list[Message] | str, completion: Completion) -> list[int]:
        """A completion's tokens for who scores it: one that a stop string ended ends before it, by a stop token."""
        if completion.truncated or completion.input_ids[-1] in self.stop_token_ids:
            return completion.input_ids
        end = None if isinstance(prompt, str) else turn_end(self.tokenizer)
        text = tokens_of(self.tokenizer, completion.input_ids, completion.text, tail(self.tokenizer, ids))
        return [*text, self.stop_token_ids[0] if end is None else end]

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
        everyone = enumerate(gather_objects(experience.rows))
        places = sorted((row, rank, i) for rank, rows in everyone for i, row in enumerate(rows))
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
        most = self.count_micro_batches(experience, chosen)
        return experience.micro_batches(chosen, self.micro_batch_tokens, self.device, at_least=most)

    def count_micro_batches(self, experience: Experience, chosen: Sequence[int]) -> int:
        """How many the rank with the most of them makes; all ranks must ask."""
        parts = len(experience.parts(chosen, self.micro_batch_tokens))
        return int(self.all_reduce(torch.tensor(float(parts)), dist.ReduceOp.MAX))

    @torch.no_grad()
    def measure(self, experience: Experience, model: Callable[[PackedBatch], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Runs a model over all of an experience; (N,) or (S,) tensors in its order, on the CPU."""
        parts = []
        for batch, _ in self.micro_batches(experience):
            found = model(batch)
            keep = len(batch.rows) > 0  # else a filler
            parts.append(tuple((t if keep else t[:0]).detach().cpu() for t in found))
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

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
            score: (S,) raw scores; NaN where a sample was dropped, whose reward counts nowhere either.
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
        every = torch.cat(gather_objects(table))
        _, _, cut_off, errors, kl, kl_k3, entropy, lengths = every.unbind(1)
        kept = every[every[:, 0].isfinite(), :2]
        scores, rewards = (kept if len(kept) else every[:1, :2] * torch.nan).unbind(1)
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
            "dropped_samples": torch.tensor(float(len(every) - len(kept))),
            "length_mean": lengths.mean(),
            "length_min": lengths.min(),
            "length_max": lengths.max(),
            "stopped": 1 - cut_off.mean(),
            "rollout_error": errors.max(),
            "tokens": lengths.sum(),
        }
        return {name: value.item() for name, value in found.items()}


def disable_dropout(model: nn.Module) -> None:
    """Takes all that is random in training out of a model, whatever mode it is in: ratios would differ from 1.

    Evaluation mode would do so too, but transformers checkpoints activations in training mode only. Dropout is a
    module, or a number of an attention layer, a block or the config that it reads, named so by all families; layerdrop
    is such a number too. Routers of experts draw by their mode, not by a number alone: they are evaluated as they run.
    """
    silent: dict[int, Any] = {}  # a config of its own for what reads its config: the model's own is exported
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _set_to_zero(module)
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and not isinstance(module, PreTrainedModel):
            if id(config) not in silent:
                silent[id(config)] = copy.deepcopy(config)
                _set_to_zero(silent[id(config)])
            module.config = silent[id(config)]
        if any("jitter" in name for name in vars(module)):
            module.register_forward_pre_hook(_evaluate)


def _set_to_zero(holder: Any) -> None:
    for name, value in vars(holder).items():
        if isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "layerdrop")):
            setattr(holder, name, 0.0)


def _evaluate(module: nn.Module, args: Any) -> None:
    module.eval()
