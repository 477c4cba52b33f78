"""Counters that Prometheus reads at ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lightning_rlhf.rollout import Completion

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counters of one server.

    Args:
        load: Returns the numbers of answers that are being generated and that wait.
    """

    def __init__(self, load: Callable[[], tuple[int, int]]) -> None:
        self.registry = CollectorRegistry()
        name = "lightning_rlhf"
        self._requests = Counter(
            f"{name}_requests", "Requests by route and status.", ("path", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            f"{name}_request_seconds", "Time from a request to its end.", ("path",), buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._prompt = Counter(f"{name}_prompt_tokens", "Tokens of prompts.", ("model",), registry=self.registry)
        self._answer = Counter(f"{name}_completion_tokens", "Tokens of answers.", ("model",), registry=self.registry)
        self._finished = Counter(
            f"{name}_answers", "Finished answers by what ended them.", ("model", "reason"), registry=self.registry
        )
        for i, state in enumerate(("running", "waiting")):
            gauge = Gauge(f"{name}_rows_{state}", f"Answers that are {state}.", registry=self.registry)
            gauge.set_function(lambda i=i: load()[i])  # type: ignore[misc]

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def answers(self, model: str, prompt_tokens: int, completions: Sequence[Completion]) -> None:
        """Counts finished answers."""
        self._prompt.labels(model).inc(prompt_tokens)
        for completion in completions:
            self._answer.labels(model).inc(len(completion.input_ids))
            self._finished.labels(model, completion.finish_reason).inc()

    def text(self) -> bytes:
        """All counters in Prometheus' format."""
        return generate_latest(self.registry)
