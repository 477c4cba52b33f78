"""One decoding step in which nothing depends on what a device has computed, so that a CUDA graph can repeat it.

All shapes are fixed. Tokens, penalties, noise and stops stay on the device; the host reads them some steps later.

Shapes: R rows, V vocabulary, N steps of a block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rlhf.rollout.kv_cache import Decoder, Shared
from lightning_rlhf.rollout.sampling import NUCLEUS, Cut, draw, draw_likeliest
from lightning_rlhf.rollout.sequence import ActiveSequence
from lightning_rlhf.rollout.token_edits import TokenEdits
from lightning_rlhf.rollout.transfer import to_device
from lightning_rlhf.rollout.types import Sampling
from lightning_rlhf.utils.random import next_sample_keys, sample_state, signed

log = logging.getLogger(__name__)


class RowState(NamedTuple):
    """What a device knows of rows.

    Attributes:
        token: (R,) the last token.
        position: (R,) its position.
        base: (R,) number of first tokens that are no columns of the row's own.
        sampled: (R,) number of tokens of the completion.
        most: (R,) maximum of that number.
        least: (R,) number of tokens before which it cannot stop.
        noise: (R,) state of the noise keys.
        done: (R,) whether it has ended. Such a row goes on with its last position.
        prompted: (R, V) whether the prompt has a token; (R, 0) where no penalty asks.
        counted: (R, V) how often the completion has it; (R, 0) likewise.
    """

    token: Tensor
    position: Tensor
    base: Tensor
    sampled: Tensor
    most: Tensor
    least: Tensor
    noise: Tensor
    done: Tensor
    prompted: Tensor
    counted: Tensor

    def joined(self, rows: Sequence[int], other: RowState | None) -> RowState:
        """Returns some rows and all of another state, in memory of their own."""
        at = to_device(list(rows), self.token.device)
        parts = [
            (mine[at],) if other is None else (mine[at], its) for mine, its in zip(self, other or self, strict=True)
        ]
        return RowState(*map(torch.cat, parts))


def first_state(rows: Sequence[ActiveSequence], device: torch.device, penalized: int) -> RowState:
    """Makes the state of rows whose prompts have run.

    Args:
        rows: Rows without tokens.
        device: The model's.
        penalized: V, or 0 if no penalty asks which tokens a row has.
    """
    numbers = []
    for row in rows:
        most, least = row.sampling.max_new_tokens, row.sampling.min_new_tokens
        numbers.append((0, len(row.prompt) - 1, row.base, 0, most, least, signed(sample_state(row.key))))
    prompted = torch.zeros(len(rows), penalized, dtype=torch.bool, device=device)
    if penalized:
        at = [i * penalized + token for i, row in enumerate(rows) for token in {*row.prompt}]
        prompted.view(-1).index_fill_(0, to_device(at, device), True)
    table = to_device(list(zip(*numbers, strict=True)), device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    token, position, base, sampled, most, least, noise = (column.clone() for column in table)
    counted = torch.zeros_like(prompted, dtype=torch.int32)
    return RowState(token, position, base, sampled, most, least, noise, done, prompted, counted)


class TokenChooser:
    """Samples the next token of every row as :func:`~lightning_rlhf.rollout.sampling.sample_tokens` does.

    Args:
        sampling: The settings of all rows, but for their lengths.
        stops: Tokens that end a completion.
        vocabulary: V.
        device: The model's.
    """

    def __init__(self, sampling: Sampling, stops: Collection[int], vocabulary: int, device: torch.device) -> None:
        self._sampling = s = sampling
        self.penalized = vocabulary if TokenEdits.needed(s) else 0

        def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return to_device([[value]], device, dtype)

        self._temperature, self._penalty = column(s.temperature or 1.0), column(s.repetition_penalty)
        self._stops, self._is_stop = (
            to_device(sorted(stops), device),
            torch.zeros(vocabulary, dtype=torch.bool, device=device),
        )
        self._is_stop.index_fill_(0, self._stops, True)
        self._cut = Cut(column(s.top_k or vocabulary, torch.long), column(s.top_p), column(s.min_p))
        # a nucleus may need any number of tokens, and only the device knows how many
        self._width = min(vocabulary, max(NUCLEUS, s.top_k)) if s.top_k else vocabulary
        self._bias = torch.zeros(self.penalized, dtype=torch.float64, device=device)
        if s.logit_bias:
            self._bias[to_device(list(s.logit_bias), device)] = to_device(
                list(s.logit_bias.values()), device, torch.float64
            )

    def advance(self, logits: Tensor, rows: RowState) -> tuple[Tensor, Tensor]:
        """Samples a token of each row, and writes to its state what follows from it.

        Args:
            logits: (R, V) of the next tokens.
            rows: The state.

        Returns:
            (R,) tokens, and (R,) log-probs as :func:`~lightning_rlhf.rollout.sampling.sample_tokens` returns them.
        """
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._sampling.temperature not in (0, 1):
            scaled = scaled / self._temperature.to(scaled.dtype)
        token = self._choose(self._processed(scaled, rows), rows)
        logprob = scaled.log_softmax(-1).gather(1, token[:, None])[:, 0]
        runs = ~rows.done
        rows.token.copy_(token)
        rows.position.add_(runs)
        rows.sampled.add_(runs)
        if self.penalized:
            rows.counted.scatter_add_(1, token[:, None], runs[:, None].to(rows.counted.dtype))
        rows.done.logical_or_(self._is_stop[token]).logical_or_(rows.sampled >= rows.most)
        return token, logprob

    def _processed(self, scaled: Tensor, rows: RowState) -> Tensor:
        """Returns scores with penalties, biases and minimum length applied."""
        s, scores = self._sampling, scaled
        if self.penalized:
            had = rows.counted > 0
            penalty = torch.where(rows.prompted | had, self._penalty.to(scaled.dtype), 1.0)
            shift = self._bias - s.presence_penalty * had.double() - s.frequency_penalty * rows.counted.double()
            scores = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = scores + shift.to(scaled.dtype) / self._temperature.to(scaled.dtype)
        if s.min_new_tokens and len(self._stops):
            short = (rows.sampled < rows.least)[:, None]
            scores = scores.index_copy(1, self._stops, scores[:, self._stops].masked_fill(short, -torch.inf))
        return scores

    def _choose(self, scores: Tensor, rows: RowState) -> Tensor:
        s = self._sampling
        if s.temperature == 0:
            return scores.argmax(-1)
        keys = next_sample_keys(rows.noise, rows.sampled)[:, None]
        if s.top_k or s.top_p < 1 or s.min_p:
            return draw_likeliest(scores, keys, self._cut, self._width)[0]
        return draw(scores, keys)


class StaticStep:
    """A step of rows that stay where they are in the cache.

    The first step runs as it is; on a CUDA device it is then captured in a graph, which runs in its place. A graph is
    tied to the tensors that it was captured with, so it serves for as long as no row moves.

    Args:
        decoder: The model with its cache.
        chooser: Samples the tokens.
        rows: State of the rows. Steps write to it.
        shared: The prompt that each row continues, or None.
        width: Number of columns that are read.
        longest: A bound of the positions.
        steps: N, the most steps of a block.
    """

    def __init__(
        self,
        decoder: Decoder,
        chooser: TokenChooser,
        rows: RowState,
        shared: Sequence[Shared | None],
        width: int,
        longest: int,
        steps: int,
    ) -> None:
        self.rows = rows
        self._decoder, self._chooser = decoder, chooser
        self._places = (width, longest, list(shared) if any(shared) else [])
        device, count = rows.token.device, len(rows.token)
        self._slot = torch.zeros(1, dtype=torch.long, device=device)
        # log-probs and tokens, which fp64 holds exactly
        self._found = torch.zeros(2, steps, count, dtype=torch.float64, device=device)
        self._once: Callable[[], None] | None = None

    def run(self, steps: int) -> Tensor:
        """Queues a block of at most N steps.

        Returns:
            (2, steps, R) tokens and log-probs, to be copied before the next block is queued.
        """
        self._slot.zero_()
        for _ in range(steps):
            if self._once is not None:
                self._once()
            else:
                self.step()
                self._once = capture(self.step, self._slot.device)
        return self._found[:, :steps]

    def step(self) -> None:
        """One step, without a copy to the device or a wait for it."""
        rows = self.rows
        logits = self._decoder.step(rows.token, rows.position, rows.position - rows.base, *self._places)
        found = torch.stack([t.double() for t in self._chooser.advance(logits, rows)])
        self._found.index_copy_(1, self._slot, found[:, None])
        self._slot.add_(1)


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: cuBLAS keeps memory for each stream that it has run on."""
    return torch.cuda.Stream(device)


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Captures a step in a CUDA graph.

    Args:
        step: It has run before, so that what is made once has been made.
        device: Where it runs.

    Returns:
        What runs it again: the graph; the step itself on other devices, and where it can't be captured, which a warning
        says.
    """
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    try:
        # torch's own stream is one of the device of the first capture; a data loader's thread may pin memory meanwhile
        with torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        log.warning(
            "Decoding cannot be captured in a CUDA graph (%s). The results are the same, but slower.",
            (str(error).splitlines() or [type(error).__name__])[0],
        )
        return step
    return graph.replay


class NoWaits(TorchDispatchMode):
    """Within it, an operation whose result or shape the host must wait for is an error, as in a CUDA graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation.

        Raises:
            NotImplementedError: It waits.
        """
        waits = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags})
        if str(func.overloadpacket) in ("aten.index", "aten.index_put", "aten.index_put_"):
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if waits:
            raise NotImplementedError(f"{func.overloadpacket} waits for the device")
        return func(*args, **(kwargs or {}))
