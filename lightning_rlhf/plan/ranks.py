"""One process that stands for a rank of several which hold a copy of the model together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lightning_rlhf.utils.collectives import Ranks, set_copies


@contextmanager
def one_rank(tp: int) -> Iterator[Ranks | None]:
    """Makes torch's process group that exchanges nothing.

    Args:
        tp: Number of ranks.

    Yields:
        The ranks, of which this is the first; None for one.

    Raises:
        ValueError: This process is a rank already.
    """
    if tp == 1:
        yield None
        return
    if dist.is_initialized():
        raise ValueError(
            f"planning tp={tp} makes a process group of its own, and this process has one already: plan in a new "
            "process, or call torch.distributed.destroy_process_group() before."
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore  # which registers the backend

    dist.init_process_group("fake", rank=0, world_size=tp, store=FakeStore())
    set_copies(Ranks((0,), 0), None)
    try:
        yield Ranks(tuple(range(tp)), 0, dist.group.WORLD)
    finally:
        set_copies(None, None)
        dist.destroy_process_group()
