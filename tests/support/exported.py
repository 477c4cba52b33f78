"""What tests of exports share: texts that tokenizers get wrong, and outputs of plain models."""

import copy
from pathlib import Path

import torch

STORIES = Path(__file__).parents[1] / "assets" / "stories260K"
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "今天天气很好，我们去公园散步吧。",
    "Emoji 😀🎉 and a family 👩‍👩‍👧",
    "two  spaces, a\ttab\nand lines\n\n",
    "def add(a, b): return a + b  # 3.14",
]


def outputs(model):
    """Logits of a causal LM, or scores of a reward model.

    Computed in fp64: logits reach 20, where two fp32 passes over the same weights already differ by 1e-5.
    """
    ids = torch.tensor([[1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315]])
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(input_ids=ids, use_cache=False).logits
