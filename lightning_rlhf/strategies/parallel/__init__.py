"""Parallelism within a copy of a model: which ranks hold it together, and what each of them keeps."""

from lightning_rlhf.strategies.parallel.cuts import Cuts
from lightning_rlhf.strategies.parallel.mesh import Mesh, check_world, make_mesh
from lightning_rlhf.strategies.parallel.noise import draw_alike
from lightning_rlhf.strategies.parallel.pipeline import PipelineParallel
from lightning_rlhf.strategies.parallel.sequence import SequenceParallel
from lightning_rlhf.strategies.parallel.tensor import TensorParallel

__all__ = [
    "Cuts",
    "Mesh",
    "PipelineParallel",
    "SequenceParallel",
    "TensorParallel",
    "check_world",
    "draw_alike",
    "make_mesh",
]
