"""GPTQ, solved by gptqmodel: each column's rounding error is taken back by the columns after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_rlhf.models.gptq import import_gptqmodel
from lightning_rlhf.quantize.grid import Grid, Rounded, linear_layers, weight_of
from lightning_rlhf.quantize.layerwise import LayerwiseRun


def solve(run: LayerwiseRun, i: int, block: nn.Module, grid: Grid) -> dict[str, Rounded]:
    """Quantizes a decoder layer and advances the run behind it.

    Its linear layers see inputs that have passed through those quantized before.

    Args:
        run: The calibration rows before this layer.
        i: Number of the layer.
        block: The layer, on the device and in fp32. Its weights become those that the codes stand for.
        grid: The grid.

    Returns:
        The weights of its linear layers, by name.
    """
    layers = linear_layers(block)
    rounded: dict[str, Rounded] = {}
    for names in _sharing_inputs(run, i, list(layers)):
        solvers = {name: _solver(layers[name], grid) for name in names}
        run.inputs_of(i, names, lambda name, inputs: solvers[name].add_batch(inputs, inputs))  # noqa: B023
        for name, solver in solvers.items():
            if not solver.nsamples:  # an expert that no token chose
                rounded[name] = grid.round(weight_of(layers[name]))
            else:
                config = solver.qcfg
                scales, zeros, *_ = solver.hf_quantize(
                    blocksize=grid.group_size,  # in larger blocks, grids would be fitted before errors are taken back
                    percdamp=config.damp_percent,
                    damp_auto_increment=config.damp_auto_increment,
                    group_size=grid.group_size,
                )
                rounded[name] = grid.encode(weight_of(layers[name]), scales, zeros)
            solver.free()
            weight_of(layers[name]).copy_(rounded[name].values())
    run.advance(i)
    return rounded


def _sharing_inputs(run: LayerwiseRun, i: int, names: list[str]) -> list[list[str]]:
    """Groups linear layers that read the same tensor, such as queries, keys and values, in the order of their calls."""
    groups: list[list[str]] = []
    last: list[Tensor] = []

    def read(name: str, inputs: Tensor) -> None:
        if not last or inputs.data_ptr() != last[0].data_ptr() or inputs.shape != last[0].shape:
            groups.append([])
            last[:] = [inputs]
        groups[-1].append(name)

    run.inputs_of(i, names, read, batches=1)
    called = {name for group in groups for name in group}
    return groups + [[name] for name in names if name not in called]


def _solver(layer: nn.Module, grid: Grid) -> Any:
    """Makes gptqmodel's solver for a layer, on our grid.

    Its own quantizer has scales in fp32, and the format rounds them to fp16 afterwards. So it gets ours, by its public
    method ``create_quantizer``, and later columns take back the errors of the weights that are stored.
    """
    gptqmodel = import_gptqmodel()
    from gptqmodel.quantization import GPTQ
    from gptqmodel.quantization.quantizer import Quantizer

    class OnGrid(Quantizer):
        def find_params(self, x: Tensor, weight: bool = False) -> None:
            self.scale, self.zero = (t[:, None] for t in grid.fit(x))

    class Solver(GPTQ):
        def create_quantizer(self, name: str) -> OnGrid:
            quantizer = OnGrid(qcfg=self.qcfg, name=name)
            quantizer.configure(perchannel=True)
            return quantizer

    config = gptqmodel.QuantizeConfig(
        bits=grid.bits, group_size=grid.group_size, sym=grid.sym, desc_act=False, offload_to_disk=False
    )
    return Solver(layer, config)
