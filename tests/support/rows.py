"""Packed rows of random tokens, and queries, keys and values for their attention."""

import torch

from lightning_rlhf.data import Branch, Tree, pack

#: Prompts with their branches.
GROUP = [(30, [20, 41, 7, 1, 60]), (3, [5]), (3, [5]), (1, [12]), (50, [9, 80])]  # a pair too


def packed(rows, seed=0):
    g = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, 50, (n,), generator=g).tolist()

    return pack([Tree(ids(prompt), [Branch(ids(n)) for n in branches]) for prompt, branches in rows])


def inputs(length, heads=(4, 2), sizes=(12, 12), dtype=torch.float32, grad=False):
    g = torch.Generator().manual_seed(0)
    shapes = (heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])
    return [torch.randn(1, h, length, e, generator=g, dtype=dtype, requires_grad=grad) for h, e in shapes]
