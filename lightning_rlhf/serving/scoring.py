"""Scores conversations with a reward, in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.formats import Message
from lightning_rlhf.data.packed import pack
from lightning_rlhf.data.prompts import PromptBatch
from lightning_rlhf.data.tokens import TokenizeError
from lightning_rlhf.rewards import BadScores, Reward, Samples, Scores, render
from lightning_rlhf.rl.experience import to_experience
from lightning_rlhf.rollout import Completion
from lightning_rlhf.serving.errors import ApiError
from lightning_rlhf.serving.lengths import far_over
from lightning_rlhf.serving.limits import Limits


class Scorer:
    """A reward, and the name that requests call it by. Its scores are those that PPO gets.

    Args:
        name: The reward's name in requests.
        reward: The reward.
        tokenizer: The tokenizer of the policy that the reward was made for.
        device: Device on which the reward works.
        max_queue: Number of requests that may wait. Beyond it they get status 429.
    """

    def __init__(
        self,
        name: str,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase,
        device: str = "cpu",
        max_queue: int = Limits.max_queue,
    ) -> None:
        if reward.needs:
            raise ValueError(f"The reward needs the columns {', '.join(sorted(reward.needs))}, which requests lack.")
        reward.load()
        self.name, self.reward, self.tokenizer = name, reward.to(device), tokenizer
        self.device = torch.device(device)
        self._thread, self._max_queue, self._waiting = ThreadPoolExecutor(1, "reward"), max_queue, 0

    async def score(
        self, prompts: list[list[Message] | str], answers: list[str], truncated: list[bool]
    ) -> tuple[Scores, int]:
        """Scores texts.

        Args:
            prompts: (S,) messages or plain texts.
            answers: (S,) texts.
            truncated: (S,) whether the length limit cut them.

        Returns:
            The scores, and the number of tokens that were read.

        Raises:
            ApiError: The reward cannot read or score a conversation.
        """

        def samples() -> Samples:
            for prompt, answer in zip(prompts, answers, strict=True):
                asked = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
                for name, most in self.reward.limits.items():
                    if far_over(self.tokenizer, [*asked, answer], most):
                        raise _too_long(f"more than {2 * most}", name, most)
            trees = render(self.tokenizer, prompts, answers, truncated)
            return Samples(pack(trees).to(self.device), prompts, answers, truncated, {})

        return await self._run(samples)

    async def score_completions(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[int],
        prompt: list[Message],
        ids: list[int],
        completions: Sequence[Completion],
    ) -> Scores:
        """Scores answers by the very tokens that were sampled.

        Args:
            tokenizer: The policy's tokenizer.
            stops: Tokens that end an answer.
            prompt: The messages.
            ids: Their tokens.
            completions: The answers.

        Raises:
            ApiError: The reward cannot read or score the conversation.
        """
        batch = PromptBatch([ids], [prompt], (0,), {}, 1)
        scores, _ = await self._run(lambda: to_experience(tokenizer, stops, batch, [completions], self.device)[1])
        return scores

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    async def _run(self, make: Callable[[], Samples]) -> tuple[Scores, int]:
        if self._waiting > self._max_queue:
            message = f"{self._waiting} requests wait for the reward. Try again later."
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": "1"})
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._score, make)
        finally:
            self._waiting -= 1

    @torch.no_grad()
    def _score(self, make: Callable[[], Samples]) -> tuple[Scores, int]:
        try:
            samples = make()
            self._check_length(samples)
            return self.reward(samples), samples.batch.num_tokens
        except BadScores as error:
            raise ApiError(500, f"{error}", code="reward_failed") from error
        except (TokenizeError, ValueError) as error:
            raise ApiError(400, f"The reward cannot score this: {error}", "conversations") from error

    def _check_length(self, samples: Samples) -> None:
        trees = samples.batch.forest.trees
        longest = max(prompt.length + branch.length for prompt, branches in trees for branch in branches)
        for name, most in self.reward.limits.items():
            if longest > most:
                raise _too_long(f"{longest}", name, most)


def _too_long(length: str, name: str, most: int) -> ApiError:
    message = f"A conversation has {length} tokens, but {name} is {most} tokens. Shorten it."
    return ApiError(400, message, "conversations", "context_length_exceeded")
