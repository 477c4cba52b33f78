"""The metrics of a stage in one place: declared, updated and logged by part of the data and name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric


class StageMetrics(nn.Module):
    """Metrics by part of the data (train, val, test) and name, which are logged as ``part/name``.

    Args:
        shown: Names that the progress bar shows.
    """

    def __init__(self, *shown: str) -> None:
        super().__init__()
        self.shown, self._metrics = shown, nn.ModuleDict()

    def declare(self, part: str, **metrics: Metric) -> None:
        """Adds metrics by name."""
        self._metrics.update({f"{part}/{name}": metric for name, metric in metrics.items()})

    def get(self, part: str, name: str) -> Any:
        """Returns a metric."""
        return self._metrics[f"{part}/{name}"]

    def update(self, part: str, weight: Tensor, **values: Tensor) -> None:
        """Adds (N,) values by name, with their common (N,) weights."""
        for name, value in values.items():
            self.get(part, name).update(value, weight)

    def report(self, part: str, log: Callable[..., None]) -> dict[str, Tensor]:
        """Logs what was found since the last report, over all ranks, and starts anew. All ranks must call it.

        Args:
            part: Part of the data.
            log: The stage's ``log``.

        Returns:
            The values by name; a metric that computes several gives them by their own names.
        """
        found: dict[str, Tensor] = {}
        for name, metric in self._of(part).items():
            value = metric.compute()
            found |= value if isinstance(value, dict) else {name: value}
            metric.reset()
        for name, value in found.items():
            log(f"{part}/{name}", value, prog_bar=name in self.shown, batch_size=1)
        return found

    def log_epoch(self, part: str, log: Callable[..., None]) -> None:
        """Lets Lightning compute, log and reset the metrics at the end of the epoch."""
        for name, metric in self._of(part).items():
            log(f"{part}/{name}", metric, on_epoch=True, prog_bar=name in self.shown, batch_size=1)

    def _of(self, part: str) -> dict[str, Any]:
        start = f"{part}/"
        return {key.removeprefix(start): metric for key, metric in self._metrics.items() if key.startswith(start)}
