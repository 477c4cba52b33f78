"""What the tests of quantized models share: a trained model that packs, and texts of its own."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM
from widened import save_widened

from lightning_rlhf.models.quantization import DTYPE


@pytest.fixture(scope="session")
def wide_stories(tmp_path_factory, stories_model_dir):
    """stories260K with an MLP of 192."""
    return save_widened(stories_model_dir, tmp_path_factory.mktemp("wide") / "stories")


def told(directory, count, length, seed):
    """Stories that the model tells itself, sampled at temperature 1 from all tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, **{DTYPE: torch.float32}).eval()
    ids = torch.ones(count, 1, dtype=torch.long)
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(seed)
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=length - 1,
            min_new_tokens=length - 1, pad_token_id=0,
        )  # fmt: skip


@pytest.fixture(scope="session")
def tell(wide_stories):
    """``tell(count, length, seed)``: the model's own stories."""
    return partial(told, wide_stories)


@pytest.fixture(scope="session")
def calibration(tell):
    """32 rows of 128 tokens."""
    return list(tell(32, 128, seed=1))


@pytest.fixture(scope="session")
def held_out(tell):
    """16 other rows of 128 tokens."""
    return tell(16, 128, seed=2)
