"""What is said of weights that do not fit, by names and shapes; and of frozen ones, by their numbers."""

import pytest
import torch
from torch import nn

from lightning_rlhf.models.mismatch import explain_mismatch, other_frozen, sample_frozen


@pytest.mark.parametrize(
    ("saved", "own", "said"),
    [
        ({"policy.a": (2,)}, {"policy.a": (2,)}, None),
        ({"policy.a": (2, 3)}, {"policy.a": (2, 4)},
         "It was made with policy.a of shape (2, 3), and this run has shape (2, 4). Give the same model"),
        ({"policy.a": (2,), "mine.b": (1,), "mine.c": (1,)}, {"policy.a": (2,)},
         "It was made with mine.b and 1 more, and this run has none of it. Give the same models"),
        ({"policy.a": (2,)}, {"policy.a": (2,), "mine.b": (1,)},
         "It was made without weights besides, and this run has mine.b. Give the same models"),
        ({"policy.embed_tokens.weight": (8, 4), "policy.lm_head.weight": (8, 4)},
         {"policy.embed_tokens.weight": (9, 4), "policy.lm_head.weight": (9, 4)},
         "It was made with 8 embeddings, and this run has 9. Give the same pretrained, tokenizer and chat_template"),
        ({"policy.embed_tokens.weight": (8, 4)}, {"policy.embed_tokens.weight": (8, 6)},
         "It was made with policy.embed_tokens.weight of shape (8, 4), and this run has shape (8, 6). Give the same"),
        ({"policy.value_head.weight": (1, 4)}, {},
         "It was made with critic.kind=head, and this run has none. Set critic.kind to head"),
        ({}, {"critic.model.weight": (1, 4)},
         "It was made without a critic, and this run has separate. Leave out the critic"),
        ({"policy.q.lora_A.default.weight": (2, 4), "policy.value_head.weight": (1, 4)},
         {"policy.q.lora_A.default.weight": (2, 4), "policy.q.lora_A.critic_.weight": (2, 4),
          "policy.value_head.weight": (1, 4)},
         "It was made with critic.kind=head, and this run has adapter. Set critic.kind to head"),
        ({"policy.e.lora_embedding_A.default": (2, 9)}, {"policy.e.lora_embedding_A.default": (5, 9)},
         "It was made with LoRA of rank 2, and this run has rank 5. Set lora.r to 2"),
    ],
)  # fmt: skip
def test_what_differs_is_said(saved, own, said):
    found = explain_mismatch(saved, own)
    assert found is None if said is None else found.startswith(said)


class Held(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.trained = nn.Parameter(torch.ones(3))
        self.base = nn.Parameter(torch.linspace(-1, 1, 11, dtype=torch.float64).to(dtype), requires_grad=False)
        self.q = nn.Module()
        self.q.lora_A = nn.Parameter(torch.ones(3), requires_grad=False)  # of a frozen reward's adapter
        self.packed = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
        self.empty = nn.Parameter(torch.ones(0), requires_grad=False)


def test_a_few_numbers_of_each_frozen_weight_are_kept():
    found = sample_frozen(Held())
    assert found.keys() == {"base"}
    torch.testing.assert_close(found["base"], torch.tensor([-1.0, -0.4, 0.2, 0.8]))


def test_frozen_weights_may_round_apart_and_no_more():
    plain, half = sample_frozen(Held()), sample_frozen(Held(torch.bfloat16))
    for saved, own in [(plain, plain), (plain, half), (half, plain)]:
        assert other_frozen(saved, own) is None
    moved = {"base": plain["base"] + torch.tensor([0, 0, 1e-4, 0])}
    assert other_frozen(plain, moved) == "base"
    assert other_frozen(half, {"base": half["base"] + torch.tensor([0, 0.2, 0, 0])}) == "base"
    assert other_frozen({}, plain) is None, "a checkpoint of before"
