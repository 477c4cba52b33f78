"""Rows keep their keys when they move, and every layer sees what its window allows."""

import random
from functools import partial

import pytest
import torch

from lightning_rlhf.rollout.kv_cache import SharedPrompts, SlotCache, cut_rows, slot_attention


def filled(rows=4, columns=6):
    """A cache whose row i holds i everywhere, in two layers."""
    cache = SlotCache()
    cache.arrange([None] * rows, rows, columns, 0)
    prompt = torch.arange(rows).float()[:, None, None, None].expand(rows, 2, columns, 3)
    with cache.prefilling(torch.arange(rows), torch.arange(rows), columns):
        for layer in range(2):
            cache.update(prompt, -prompt[..., :2], layer)
    return cache


def held(cache, rows, column=0):
    with cache.decoding([cache.columns - 1] * rows, torch.device("cpu")):
        keys, values = cache.update(torch.zeros(rows, 2, 1, 3), torch.zeros(rows, 2, 1, 2), 1)
    assert torch.equal(keys[:, 0, column, 0], -values[:, 1, column, 1])
    return keys[:, 0, column, 0].tolist()


@pytest.mark.parametrize(
    ("sources", "slots", "columns"),
    [
        ([0, 3, 2], 4, 6),  # a hole filled from the tail
        ([1, 0, 3, 2], 4, 6),  # all change places
        ([2, 2, 2, 2], 4, 6),  # one prompt's keys for all
        ([3, 1, 1, 2, 0, 0], 6, 9),  # grown
        ([3], 1, 3),  # shrunk
    ],
)
def test_rows_keep_their_keys_when_they_move(sources, slots, columns):
    cache = filled()
    cache.arrange(sources, slots, columns, 3)
    assert (cache.slots, cache.columns) == (slots, columns)
    assert held(cache, len(sources)) == sources


def test_memory_is_given_back():
    cache = filled()
    cache.free()
    assert cache.slots * cache.columns == 0 and not any(isinstance(t, torch.Tensor) and t.numel() > 9
                                                        for store in vars(cache).values() if isinstance(store, list)
                                                        for t in store)  # fmt: skip


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
def test_attention_equals_attention_written_out(window, softcap, sinks, heads):
    """Prompts of 5 and 2 tokens, then a token of each, with 2 key heads."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, 6, 8) for h in (heads, 2, 2))
    sink = torch.randn(heads) if sinks else None
    options = dict(scaling=0.3, sliding_window=window, softcap=softcap, s_aux=sink)

    def by_hand(row, position):
        first = 0 if window is None else max(0, position - window + 1)
        k, v = (t[row, :, first : position + 1].repeat_interleave(heads // 2, 0) for t in (key, value))
        logits = (k @ query[row, :, position, :, None])[..., 0] * 0.3
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if sinks:
            logits = torch.cat([logits, sink[:, None]], -1)
        return (logits.softmax(-1)[:, : k.shape[1], None] * v).sum(1)

    cache, module = SlotCache(), torch.nn.Module()
    cache.arrange([None, None], 2, 6, 0)
    with cache.prefilling(torch.tensor([0, 1]), torch.tensor([0, 1]), 5):
        k, v = cache.update(key[:, :, :5], value[:, :, :5], 0)
        out, _ = slot_attention(module, query[:, :, :5], k, v, None, **options)
    for row, position in [(0, 0), (0, 4), (1, 1)]:
        torch.testing.assert_close(out[row, position], by_hand(row, position), atol=1e-5, rtol=1e-5)
    positions = torch.tensor([5, 2])  # the second prompt's padding lies behind, and is overwritten
    at = positions[:, None, None, None]
    with cache.decoding(positions.tolist(), positions.device):
        k, v = cache.update(key.take_along_dim(at, 2), value.take_along_dim(at, 2), 0)
        out, _ = slot_attention(module, query.take_along_dim(at, 2), k, v, None, **options)
    for row, position in [(0, 5), (1, 2)]:
        torch.testing.assert_close(out[row, 0], by_hand(row, position), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_share_a_prompt_attend_to_it_and_to_their_own(window, softcap, sinks):
    """Rows continue prompts of two passes, and one has all of its keys; heads are grouped. By hand, in float64."""
    torch.manual_seed(0)
    lengths, of_row, own = {"a": [5, 2], "b": [4]}, [("a", 0), ("b", 0), ("a", 1), ("a", 0), None], [1, 3, 2, 1, 4]
    draw = partial(torch.randn, dtype=torch.float64)
    passes = {name: (draw(len(n), 2, max(n), 8), draw(len(n), 2, max(n), 8)) for name, n in lengths.items()}
    keys, values, query = draw(5, 2, 4, 8), draw(5, 2, 4, 8), draw(5, 4, 1, 8)
    sink = draw(4) if sinks else None
    cache, module = SlotCache(), torch.nn.Module()
    cache.arrange([None] * 5, 5, 4, 0)
    prompts = {name: SharedPrompts(n) for name, n in lengths.items()}
    for name, (k, v) in passes.items():
        none = torch.zeros(0, dtype=torch.long)
        with cache.prefilling(none, none, max(lengths[name]), prompts[name]):
            cache.update(k, v, 0)
    bases = [0 if place is None else lengths[place[0]][place[1]] for place in of_row]
    shared = [None if place is None else (prompts[place[0]], place[1]) for place in of_row]
    for step in range(4):  # earlier tokens first; a row that has less runs its last one again
        at = [min(step, n - 1) for n in own]
        where = torch.tensor(at)[:, None, None, None]
        with cache.decoding([b + c for b, c in zip(bases, at, strict=True)], keys.device, shared=shared):
            k, v = cache.update(keys.take_along_dim(where, 2), values.take_along_dim(where, 2), 0)
            options = dict(scaling=0.3, sliding_window=window, softcap=softcap, s_aux=sink)
            out, _ = slot_attention(module, query, k, v, None, **options)
    for row, (place, base, n) in enumerate(zip(of_row, bases, own, strict=True)):
        k, v = keys[row, :, :n], values[row, :, :n]
        if place is not None:
            name, i = place
            k, v = (torch.cat([t[i, :, :base], mine], 1) for t, mine in zip(passes[name], (k, v), strict=True))
        first = 0 if window is None else max(0, base + n - window)
        k, v = (t[:, first:].repeat_interleave(2, 0) for t in (k, v))
        logits = (k @ query[row, :, 0, :, None])[..., 0] * 0.3
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        weights = (torch.cat([logits, sink[:, None]], -1) if sinks else logits).softmax(-1)[:, : k.shape[1]]
        torch.testing.assert_close(out[row, 0], (weights[..., None] * v).sum(1), atol=1e-12, rtol=1e-12)


def test_rows_are_cut_where_the_fewest_columns_are_read():
    draw = random.Random(0)
    for _ in range(200):
        positions = [draw.randrange(50) for _ in range(draw.randrange(1, 9))]
        read = [sum(len(part) * max(part) for part in (positions[:cut], positions[cut:]) if part)
                for cut in range(1, len(positions))]  # fmt: skip
        whole = len(positions) * max(positions)
        cut, saved = cut_rows(positions)
        assert saved == whole - min(read, default=whole)
        assert not read or read[cut - 1] == min(read)


def test_attention_outside_a_cache_is_an_error():
    with pytest.raises(LookupError):
        slot_attention(torch.nn.Module(), *(torch.zeros(1, 1, 1, 1) for _ in range(3)), None)
