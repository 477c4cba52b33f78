"""What ranks that hold a model together have of it in memory while they load it."""

import json
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random Llama of 43 MB, of whose tensors none is large."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=384, intermediate_size=1032, num_hidden_layers=6,
                         num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    path = tmp_path_factory.mktemp("saved")
    model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    return path, sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_ranks_share_the_memory_of_a_file_until_they_cut_it(saved, tmp_path, axis):
    """No rank has the whole model in memory of its own, and together they have every weight to the bit."""
    model_dir, size = saved
    run_ranks(Path(__file__).parent / "run_loading.py", model_dir, tmp_path, axis)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["equal"]
        assert not found["wrapped"], "DDP has buckets for gradients that no other rank has"
        # libraries and process groups are in both, and a half of the weights in the second
        assert found["whole"] - found["before"] < 0.5 * size, (found, size)
        assert found["cut"] - found["before"] < 0.9 * size, (found, size)
