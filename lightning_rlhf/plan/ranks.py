"""One process that stands for a rank of several which hold a copy of the model together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from lightning_rlhf.strategies.parallel import Mesh, make_mesh
from lightning_rlhf.utils.collectives import Ranks, set_copies


@contextmanager
def one_rank(tp: int, sp: int = 1) -> Iterator[Mesh | None]:
    """Makes torch's process group that exchanges nothing.

    Args:
        tp: Number of slices of layers.
        sp: Number of stretches of rows.

    Yields:
        The place of the first slice and of the last stretch, which has the most scored tokens, since answers follow
        prompts. None for one rank.

    Raises:
        ValueError: This process is a rank already.
    """
    if tp * sp == 1:
        yield None
        return
    if dist.is_initialized():
        raise ValueError(
            f"planning {f'tp={tp}' if tp > 1 else f'sp={sp}'} makes a process group of its own, and this process has "
            "one already: plan in a new process, or call torch.distributed.destroy_process_group() before."
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore  # which registers the backend

    dist.init_process_group("fake", rank=(sp - 1) * tp, world_size=tp * sp, store=FakeStore())
    set_copies(Ranks((0,), 0), None)
    try:
        yield make_mesh(timedelta(minutes=1), sequence=sp, tensor=tp)
    finally:
        set_copies(None, None)
        dist.destroy_process_group()
