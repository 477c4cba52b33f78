"""Packed batches, and what plain transformers makes of them: the reference of the tests of models."""

import torch

from lightning_rlhf.data.packed import Branch, Tree, pack, pad

V = 97


def fill(model):
    """Nothing hides behind a zero: norms, biases and sinks get values."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.1 * torch.randn_like(p)
    return model


def batch(seed=0):
    """Lone sequences, a pair, a group of five, and a completion that is scored in part."""
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(3, V, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()

    rows = [Tree(ids(4, 20), [Branch(ids(2, 16)) for _ in range(k)]) for k in (1, 2, 5, 1)]
    b = ids(6, 9)
    return pack([*rows, Tree(ids(3, 4), [Branch(b, [i % 2 == 0 for i in range(len(b))])])])


def reference(model, packed):
    """Plain transformers: padded rectangle, its own forward, log_softmax over all logits."""
    p = pad(packed)
    logits = model(input_ids=p.input_ids, attention_mask=p.attention_mask, use_cache=False).logits
    return logits[p.row, p.column].float().log_softmax(-1).gather(-1, packed.target[:, None])[:, 0]


def gradient(outputs, model):
    model.zero_grad()
    (outputs * torch.linspace(-1, 1, len(outputs))).sum().backward()  # uneven: errors can't cancel
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
