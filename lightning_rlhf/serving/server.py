"""What the routes share: the models, the reward, the limits and the metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, TypeVar

from lightning_rlhf.arguments import did_you_mean
from lightning_rlhf.serving.errors import ApiError
from lightning_rlhf.serving.limits import Limits
from lightning_rlhf.serving.metrics import Metrics
from lightning_rlhf.serving.models import Served
from lightning_rlhf.serving.scoring import Scorer
from lightning_rlhf.serving.votes import Votes
from lightning_rlhf.serving.weights import WeightHashes
from lightning_rlhf.serving.worker import Worker

Made = TypeVar("Made")
Given = ParamSpec("Given")
_prompts_log = logging.getLogger("lightning_rlhf.serving.prompts")


@dataclass
class Server:
    """What the routes share.

    Attributes:
        models: The models by name, the default one first.
        limits: Limits of what is taken on.
        scorer: The reward, if there is one.
        log_prompts: Log prompts and answers.
        votes: Where votes on answers go.
        hashes: Hashes of the models' weights, for votes.
        metrics: Counters for Prometheus.
    """

    models: Mapping[str, Served]
    limits: Limits = field(default_factory=Limits)
    scorer: Scorer | None = None
    log_prompts: bool = False
    votes: Votes = field(default_factory=Votes)
    hashes: WeightHashes = field(default_factory=WeightHashes)
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self._load)
        # one thread, because a fast tokenizer must not be used by two at once
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")

    @property
    def workers(self) -> list[Worker]:
        """The workers of all models, each once."""
        return list({id(served.worker): served.worker for served in self.models.values()}.values())

    def _load(self) -> tuple[int, int]:
        running, waiting = zip(*(worker.load for worker in self.workers), strict=True)
        return sum(running), sum(waiting)

    def find(self, name: str | None) -> Served:
        """Returns the model of a name, or the default one.

        Raises:
            ApiError: There is no such model.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            near = did_you_mean(name, self.models)
            raise ApiError(404, f"There is no model {name!r}{near}", "model", "model_not_found")
        return self.models[name]

    async def in_thread(self, function: Callable[Given, Made], *args: Given.args, **kwargs: Given.kwargs) -> Made:
        """Tokenizes without holding up the streams."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, partial(function, *args, **kwargs))

    def note(self, prompt: object, answers: list[str]) -> None:
        """Logs a prompt with its answers, if that is asked for."""
        if self.log_prompts:
            _prompts_log.info("prompt %r answers %r", prompt, answers)

    def start(self) -> None:
        """Starts the workers."""
        for worker in self.workers:
            worker.start()

    async def close(self) -> None:
        """Ends the workers."""
        for worker in self.workers:
            await worker.close()
        if self.scorer is not None:
            self.scorer.close()
        self._tokenizing.shutdown()
        self.hashes.close()
