"""A step of the engine copies few tensors to the model's device, and waits for it once.

There is no GPU in these tests, so they count the calls that would copy or wait on one.
"""

from collections import Counter

import pytest
import torch
from rollouts import Calls, Operations

from lightning_rlhf.models import Policy
from lightning_rlhf.rollout import CachedEngine, Request, Sampling, scheduler
from lightning_rlhf.rollout.transfer import take_rows, to_device, to_lists

MIXED = [dict(temperature=0), dict(), dict(temperature=0.7), dict(top_k=5), dict(temperature=0, repetition_penalty=1.3)]


@pytest.mark.parametrize(
    ("settings", "copies", "waits"),
    [
        ([dict(temperature=0)], 2, 1),  # positions, and tokens; then the new tokens with their log-probs
        ([dict()], 3, 1),  # and noise keys
        ([dict(temperature=0.7)], 3, 1),
        ([dict(top_k=5)], 3, 1),
        ([dict(top_p=0.9, temperature=0.05)], 3, 2),  # whether the nucleus needs more tokens than were sorted
        ([dict(top_p=0.9, temperature=5.0)], 4, 2),  # it does: the rows that do
        ([dict(repetition_penalty=1.3)], 5, 1),  # and the columns that change, with their penalties
        ([dict(repetition_penalty=1.3, min_new_tokens=40, presence_penalty=0.5, logit_bias={5: 1.0})], 5, 1),
        (MIXED, 10, 1),  # and which rows are greedy, plain and cut, keys of two kinds, and the order of the tokens
    ],
    ids=str,
)
@pytest.mark.parametrize("shared", [False, True])
def test_a_step_copies_little_and_waits_once(settings, copies, waits, shared, make_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(scheduler, "_SHARED_PROMPT", 1 if shared else 1000)
    policy = Policy(make_model("Llama", vocab_size=2000))  # more than top-p sorts at first
    found = Counter()
    with CachedEngine().session(policy, tiny_tokenizer) as session:
        for i, more in enumerate(settings * 2):
            prompt = [5, 6, 7, 5 + i // len(settings) * (not shared)]
            session.submit(Request(prompt, [2 * i, 2 * i + 1]), Sampling(40, **more), [1])
        for _ in range(5):
            session.step()
        with Operations(found), Calls(found):
            session.step()
    assert found == {"copies": copies, "waits": waits}


def test_numbers_come_back_as_they_were():
    ids, values = torch.tensor([0, 5, 2**24 - 1]), torch.tensor([-0.1, float("nan"), -1e-30])
    for dtype in (torch.float32, torch.float64):
        tokens, numbers = to_lists(ids, values.to(dtype))
        assert tokens == ids.tolist() and all(type(token) is int for token in tokens)
        assert str(numbers) == str(values.to(dtype).tolist())


@pytest.mark.parametrize("rows", [[], [2], [0, 1, 2], [1, 2], [0, 2], [2, 1, 0], [0, 2, 1, 3], [1, 1]], ids=str)
def test_rows_are_taken_in_their_order(rows):
    tensor = torch.arange(12).view(4, 3)
    assert take_rows(tensor, rows).tolist() == [tensor[i].tolist() for i in rows]


def test_a_tensor_gets_its_type():
    assert to_device([1, 0], torch.device("cpu"), torch.bool).tolist() == [True, False]
    assert to_device([[3]], torch.device("cpu")).dtype == torch.long
