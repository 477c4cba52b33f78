"""ColossalAI on a CPU: a test mode for numerics, sharding, checkpoints and control flow, but not for speed.

ColossalAI 0.5.0 requires CUDA in five places. They are replaced by CPU equivalents, so that everything else runs as on
GPUs. For Gemini ``torch.device("cpu", 0)`` is the accelerator and ``torch.device("cpu")`` the host, so its placement
and offloading really run.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

#: The device that stands for the accelerator.
ACCELERATOR = torch.device("cpu", 0)
_enabled = False


def enable() -> None:
    """Turns the mode on for this process. Further calls have no effect.

    Raises:
        RuntimeError: The machine has CUDA.
    """
    global _enabled
    if torch.cuda.is_available():
        raise RuntimeError(
            "ColossalAI's CPU mode is for tests on machines without CUDA, but this machine has it. Set "
            "trainer.accelerator=gpu."
        )
    if not _enabled:
        _enabled = True
        _install_accelerator()
        _install_adam()
        _skip_device_check()
        _distinguish_devices()


def _install_accelerator() -> None:
    """Sets an accelerator whose streams do nothing, because operations on a CPU run in order anyway."""
    from colossalai.accelerator import set_accelerator
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator

    class NoStream:
        """A stream or an event that does nothing."""

        def wait_stream(self, other: Any) -> None: ...
        def wait_event(self, event: Any) -> None: ...
        def synchronize(self) -> None: ...
        def record_event(self, event: Any = None) -> Any:
            return event

        def query(self) -> bool:
            return True

    class Accelerator(CpuAccelerator):
        def get_current_device(self) -> torch.device:
            return ACCELERATOR

        def current_device(self) -> int:
            return 0

        def device_count(self) -> int:
            return 1

        def set_device(self, device: Any = None) -> None: ...
        def synchronize(self, device: Any = None) -> None: ...
        def empty_cache(self) -> None: ...
        def set_stream(self, stream_: Any) -> None: ...
        def Stream(self, device: Any = None, priority: int = 0, **options: Any) -> NoStream:
            return NoStream()

        def Event(self, *args: Any, **options: Any) -> NoStream:
            return NoStream()

        def current_stream(self, device: Any = None) -> NoStream:
            return NoStream()

        def default_stream(self, device: Any = None) -> NoStream:
            return NoStream()

        def stream(self, stream_: Any) -> AbstractContextManager[None]:
            return nullcontext()

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        manual_seed_all = manual_seed

        def get_rng_state(self, device: Any = None) -> Tensor:
            return torch.get_rng_state()

        def set_rng_state(self, new_state: Tensor, device: Any = None) -> None:
            torch.set_rng_state(new_state)

        def memory_allocated(self, device: Any = None) -> int:
            return 0

        max_memory_allocated = memory_allocated

        def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    set_accelerator(Accelerator())


class TorchAdam:
    """Adam (Kingma and Ba 2015) and AdamW in torch, with the interface of ColossalAI's C++ Adam."""

    def __init__(
        self, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, adamw_mode: bool
    ) -> None:
        self.decoupled = adamw_mode

    def step(
        self,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        p: Tensor,
        g: Tensor,
        m: Tensor,
        v: Tensor,
        div_scale: float = -1.0,
    ) -> None:
        """Updates ``p`` and its moments in place. The gradient is divided by ``div_scale`` if that is positive."""
        gradient = g.float() / div_scale if div_scale > 0 else g.float()
        weight = p.float()
        if self.decoupled:
            weight = weight * (1 - lr * weight_decay)
        else:
            gradient = gradient + weight_decay * weight
        m.mul_(beta1).add_(gradient, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        first = 1 - beta1**step if bias_correction else 1.0
        second = 1 - beta2**step if bias_correction else 1.0
        p.copy_(weight - lr / first * m.float() / (v.float().sqrt() / math.sqrt(second) + eps))


def _install_adam() -> None:
    """Registers the torch Adam in place of the C++ one, which would have to be compiled."""
    from colossalai.kernel.extensions.base_extension import _Extension
    from colossalai.kernel.kernel_loader import CPUAdamLoader

    class TorchAdamExtension(_Extension):
        def __init__(self) -> None:
            super().__init__("torch_adam", support_aot=False, support_jit=False, priority=0)

        def is_available(self) -> bool:
            return True

        def assert_compatible(self) -> None: ...
        def build_aot(self) -> None: ...
        def build_jit(self) -> None: ...
        def load(self) -> SimpleNamespace:
            return SimpleNamespace(CPUAdamOptimizer=TorchAdam)

    CPUAdamLoader.register_extension(TorchAdamExtension)


def _skip_device_check() -> None:
    """Replaces the method of ZeRO's optimizer that requires CUDA and one data type by a check of the data type only."""
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    def check(self: Any) -> None:
        for group in self.optim.param_groups:
            kinds = {p.dtype for p in group["params"] if not getattr(p, "skip_zero_check", False)}
            if kinds - {self.dtype}:
                raise ValueError(f"ZeRO needs weights of one data type; got {self.dtype} and {kinds}.")

    LowLevelZeroOptimizer._sanity_checks = check


class _FakeCudaDevice:
    """The accelerator as Gemini's chunks see it: they read its type, and compare it with the current device."""

    type = "cuda"
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


def _distinguish_devices() -> None:
    """Lets Gemini's chunks distinguish accelerator and host, which have the same ``device.type`` here."""
    from colossalai.zero.gemini.chunk import Chunk, ChunkManager

    init, move = Chunk.__init__, Chunk.shard_move

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        if self.shard_device == ACCELERATOR:
            self.shard_device = _FakeCudaDevice()

    def shard_move(self: Any, device: Any, *args: Any, **options: Any) -> None:
        move(self, _FakeCudaDevice() if device == ACCELERATOR else device, *args, **options)

    def device_type(self: Any) -> str:
        there = self.chunk_temp is None and (self.is_gathered or self.cuda_shard is not None)
        return "cuda" if there else "cpu"

    def move_chunk(
        self: Any, chunk: Any, device: torch.device, force_copy: bool = False, async_move: bool = False
    ) -> None:
        wanted = "cuda" if device == ACCELERATOR else device.type
        if chunk.can_move and chunk.device_type != wanted:
            self._ChunkManager__sub_memory_usage(chunk.memory_usage)
            chunk.shard_move(device, force_copy, non_blocking=async_move)
            self._ChunkManager__add_memory_usage(chunk.memory_usage)

    Chunk.__init__, Chunk.shard_move, Chunk.device_type = __init__, shard_move, property(device_type)
    ChunkManager.move_chunk = move_chunk
