"""AutoRound, by auto-round: learns by signed gradients which way each weight is rounded, a decoder layer at a time."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rlhf.models.gptq import quick_collections, require
from lightning_rlhf.quantize.grid import Grid, Rounded, linear_layers, weight_of
from lightning_rlhf.quantize.layerwise import BATCH, LayerwiseRun
from lightning_rlhf.utils.logs import errors_only
from lightning_rlhf.utils.random import rng_state, set_rng_state

STEPS = 200
"""Steps for each decoder layer, as in the paper."""


class AutoRounder:
    """Quantizes one decoder layer after another, so that its outputs stay those of the layer in full precision.

    Args:
        steps: Steps for each layer. More are more exact and take longer.
    """

    def __init__(self, steps: int = STEPS) -> None:
        require("auto_round")
        self.steps = steps
        self._quantized: list[Tensor] | None = None  # hidden states behind the layers quantized so far

    def __call__(self, run: LayerwiseRun, i: int, block: nn.Module, grid: Grid) -> dict[str, Rounded]:
        """Quantizes a layer and advances the run, whose hidden states stay those of the model in full precision.

        Args:
            run: The calibration rows before this layer, all of one length.
            i: Number of the layer.
            block: The layer, on the device and in fp32. Its weights become those that the codes stand for.
            grid: The grid.

        Returns:
            The weights of its linear layers, by name.
        """
        with _as_before():
            tuner = _tuner(block, grid, self.steps, len(run.hidden), run.device)
            inputs = [(((states, *call.args), call.kwargs),) for states, call in run.calls(i)]
            with torch.enable_grad():
                self._quantized, outputs = tuner.quantize_block(
                    block, inputs, self._quantized, device=str(run.device), auto_offload=False
                )
        run.hidden = [torch.cat(outputs[at : at + BATCH]).cpu() for at in range(0, len(outputs), BATCH)]
        layers = linear_layers(block)
        rounded = {}
        for name, layer in layers.items():
            tuned: Any = layer
            zeros = torch.as_tensor(tuned.zp, device=tuned.scale.device).expand_as(tuned.scale)
            rounded[name] = grid.encode(weight_of(layer), tuned.scale, zeros.float())
        return rounded


def of_one_length(rows: Sequence[Tensor]) -> list[Tensor]:
    """Joins rows and cuts them to the length of the longest, because auto-round batches rows without padding."""
    length = max(map(len, rows))
    joined = torch.cat(list(rows))
    return list(joined[: len(joined) // length * length].view(-1, length))


class _OneLayer(nn.Module):
    """The model that auto-round sees: one decoder layer."""

    config = None
    name_or_path = ""
    dtype = torch.float32

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layers[0](*args, **kwargs)


def _tuner(block: nn.Module, grid: Grid, steps: int, batches: int, device: torch.device) -> Any:
    from auto_round import AutoRound
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

    return AutoRound(
        _OneLayer(block),
        tokenizer="",  # it only asks whether there is one
        scheme={"bits": grid.bits, "group_size": grid.group_size, "sym": grid.sym, "data_type": "int", "act_bits": 16},
        alg_configs=SignRoundConfig(iters=steps),
        nsamples=BATCH * batches,
        batch_size=BATCH,
        device_map=str(device),
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
        amp=False,
    )


@contextmanager
def _as_before() -> Iterator[None]:
    """Within it, auto-round logs errors only. It seeds all generators and changes how tensors are printed."""
    importlib.import_module("auto_round")  # it sets the level of its log
    os.environ.setdefault("AR_ALLOW_W8_ASYM", "1")  # other formats cannot hold 8 asymmetric bits; GPTQ's can
    state = rng_state()
    try:
        with errors_only("autoround"), quick_collections():
            yield
    finally:
        set_rng_state(state)
        torch.set_printoptions(profile="default")
