"""Rewards by a trained reward model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data import Branch, Conversation, Message, Tree, pack, unpack
from lightning_rlhf.data.packed import within_budget
from lightning_rlhf.data.templates import set_chat_template
from lightning_rlhf.data.tokens import TokenizeError, encode, encode_prompt
from lightning_rlhf.models import RewardModel, load_reward_model, load_tokenizer
from lightning_rlhf.models.backbone import LayoutChoice
from lightning_rlhf.models.loading import Dtype
from lightning_rlhf.models.roles import RoleModel
from lightning_rlhf.rewards.base import Reward, Samples, Scores, check_scores


class RewardModelReward(Reward):
    """Scores by a reward model, normalized by its ``score_offset``.

    A reward model that reads as the policy writes (tokenizer and chat template alike) gets the very tokens that were
    sampled. Another gets each conversation by its own chat template and tokenizer: with the stop token behind a
    completion that ended by itself, without one behind a completion that was cut.

    Args:
        pretrained: Directory or hub id of a reward model, or of a reward model's adapters.
        tokenizer: The policy's.
        dtype: Of the weights; the head is fp32.
        max_tokens: Most tokens of one forward pass.
        layout: See :class:`~lightning_rlhf.models.backbone.Backbone`.
        chat_template: Preset name or path of a Jinja file for a reward model that has no template of its own.
        trust_remote_code: Run code that comes with the model.

    Attributes:
        model: The frozen reward model, from :meth:`load` on.
        same_tokens: Whether it gets the sampled tokens.
        shared: The backbone that plays the reward model instead, after :meth:`share`.

    Raises:
        OSError: Nothing is there.
        ValueError: A chat template whose tokens the model does not know.
    """

    model: RewardModel
    shared: RoleModel | None

    def __init__(
        self,
        pretrained: str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase,
        dtype: Dtype = "float32",
        *,
        max_tokens: int = 8192,
        layout: LayoutChoice = "auto",
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.pretrained, self.dtype_of_weights, self.max_tokens = os.fspath(pretrained), dtype, max_tokens
        self.layout, self.trust_remote_code = layout, trust_remote_code
        self.tokenizer = load_tokenizer(pretrained, trust_remote_code)
        if chat_template is not None and set_chat_template(self.tokenizer, chat_template):
            raise ValueError(
                f"The reward model {self.pretrained} does not know the tokens of chat_template={chat_template!r}. Name "
                "the template that it was trained with."
            )
        self.same_tokens = same_tokens(tokenizer, self.tokenizer)
        object.__setattr__(self, "shared", None)

    def load(self) -> None:
        """Loads the model, once; none where a shared backbone plays it.

        Raises:
            OSError: Nothing is there.
            ValueError: A model without a trained head.
        """
        if self.shared is not None or hasattr(self, "model"):
            return
        model = load_reward_model(
            self.pretrained, dtype=self.dtype_of_weights, needs_head=True, trust_remote_code=self.trust_remote_code
        )
        self.model = RewardModel(model, self.layout).requires_grad_(False).eval()

    def share(self, backbone: RoleModel) -> None:
        """Scores by the role ``reward`` of the policy's backbone, which has this model's adapter, from now on."""
        object.__setattr__(self, "shared", backbone)  # the stage's child already

    @property
    def context(self) -> int | None:
        """Most tokens that the model reads, where it says."""
        transformer = (self.model if self.shared is None else self.shared).transformer
        return getattr(transformer.config.get_text_config(), "max_position_embeddings", None)

    @property
    def limits(self) -> dict[str, int]:  # type: ignore[override]
        """Its context and ``max_tokens``, where it gets the sampled tokens."""
        if not self.same_tokens:
            return {}
        context = {} if self.context is None else {f"the context of the reward model {self.pretrained}": self.context}
        return {**context, f"max_tokens of the reward model {self.pretrained}": self.max_tokens}

    @torch.no_grad()
    def forward(self, samples: Samples) -> Scores:
        """Scores the samples, in forward passes of at most ``max_tokens`` tokens.

        Args:
            samples: At least one.

        Returns:
            Scores minus the offset.

        Raises:
            BadScores: Some scores are not finite numbers.
            ValueError: A conversation that is longer than ``max_tokens`` or the model's context, or that its chat
                template refuses.
        """
        trees = unpack(samples.batch) if self.same_tokens else self._rendered(samples)
        device = samples.batch.input_ids.device
        context = self.context
        longest = max(len(tree.prompt) + len(branch.input_ids) for tree in trees for branch in tree.branches)
        if context is not None and longest > context:
            raise ValueError(
                f"The reward model {self.pretrained} reads {context} tokens, and a conversation has {longest}: lower "
                "max_new_tokens, or shorten prompts."
            )
        scores = []
        for part in within_budget(trees, self.max_tokens, "the reward's max_tokens"):
            batch = pack(part).to(device)
            scores.append(self.model(batch, normalize=True) if self.shared is None else self.shared(batch, "reward"))
        return Scores(check_scores(torch.cat(scores), samples, f"The reward model {self.pretrained}"))

    def _rendered(self, samples: Samples) -> list[Tree]:
        try:
            return render(self.tokenizer, samples.prompts, samples.completions, samples.truncated, turns=samples.turns)
        except TokenizeError as error:
            raise ValueError(f"The reward model {self.pretrained} can't read {error}.") from error


def render(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message] | str],
    completions: Sequence[str],
    truncated: Sequence[bool],
    turns: Sequence[list[Message]] | None = None,
) -> list[Tree]:
    """Conversations in a tokenizer's tokens: the stop token ends a completion, unless it was cut.

    Args:
        tokenizer: With its chat template.
        prompts: (S,) messages or plain texts.
        completions: (S,) texts.
        truncated: (S,) whether the length limit ended them.
        turns: (S,) what each is in place of one answer, where an environment took part.

    Returns:
        Trees with S branches in the same order; completions of one prompt that follow each other share it.

    Raises:
        TokenizeError: The chat template refuses a conversation.
    """
    trees: list[Tree] = []
    for i, sample in enumerate(zip(prompts, completions, truncated, strict=True)):
        try:
            prompt, completion = _encoded(tokenizer, *sample, None if turns is None else turns[i])
        except TokenizeError as error:
            raise TokenizeError(error.kind, f"completion {i}: {error}") from error
        if trees and trees[-1].prompt == prompt and sample[0] == prompts[i - 1]:
            trees[-1] = trees[-1]._replace(branches=[*trees[-1].branches, Branch(completion)])
        else:
            trees.append(Tree(prompt, [Branch(completion)]))
    return trees


def _encoded(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message] | str,
    completion: str,
    truncated: bool,
    turns: list[Message] | None,
) -> tuple[list[int], list[int]]:
    """Tokens of the prompt, and of the completion up to its stop token."""
    if isinstance(prompt, str):
        ids = encode(tokenizer, Conversation(text=prompt + completion)).input_ids
        start, end = len(encode_prompt(tokenizer, prompt)), len(ids)
        if ids[:start] != encode_prompt(tokenizer, prompt):
            start = 1  # a token reaches over the border: nothing to share
    else:
        answer: list[Message] = turns or [{"role": "assistant", "content": completion}]
        tokens = encode(tokenizer, Conversation((*prompt, *answer)), "last")
        ids, start = tokens.input_ids, tokens.scored.index(True)
        end = len(ids) - tokens.scored[::-1].index(True)
    end -= truncated  # the stop token, which the template writes behind any answer
    start = min(start, end - 1)
    return ids[:start], ids[start:end]


def same_tokens(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> bool:
    """Returns whether a reward model reads the policy's tokens as the policy does.

    Every token of the policy must be the reward model's too, under the same id, and text, BOS, eos and chat template
    must become the same ids. The reward model may know further tokens, such as a pad token of its own.

    Args:
        policy: The policy's tokenizer.
        reward: The reward model's.

    Returns:
        False also where nobody can tell: then conversations are tokenized again, which is never wrong.
    """
    added = [{i: str(token) for i, token in t.added_tokens_decoder.items()} for t in (policy, reward)]
    return (
        policy.get_vocab().items() <= reward.get_vocab().items()
        and added[0].items() <= added[1].items()
        and (policy.bos_token, policy.eos_token) == (reward.bos_token, reward.eos_token)
        and policy.chat_template == reward.chat_template
        and _pipeline(policy) == _pipeline(reward)
    )


def _pipeline(tokenizer: Any) -> object:
    """How text becomes tokens, but for added tokens and for padding and truncation, which calls set."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer)
    parts = json.loads(backend.to_str())
    return {name: parts[name] for name in ("normalizer", "pre_tokenizer", "post_processor", "model")}
