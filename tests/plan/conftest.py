"""Small models with weights, and configs of large ones without."""

import pytest
import torch.distributed as dist
from transformers import AutoTokenizer

from .cases import config
from .table import models_in


@pytest.fixture(autouse=True)
def no_ranks():
    """Trainers of earlier tests leave their process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def whole_tokenizer(tiny_model_dir):
    """The tests' tokenizer."""
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def small_models(whole_tokenizer, tmp_path_factory):
    """The models of the table's rows."""
    return models_in(tmp_path_factory.mktemp("small"), whole_tokenizer)


@pytest.fixture(scope="session")
def small_model(small_models):
    """Five layers with weights."""
    return small_models[5, 2]


@pytest.fixture(scope="session")
def large_config(whole_tokenizer, tmp_path_factory):
    """Makes the config of a large Llama, with a small tokenizer and no weights."""

    def make(width, layers, heads, kv, inner, vocabulary=32000):
        folder = tmp_path_factory.mktemp("large")
        made = config(vocabulary, layers, width)
        made.num_attention_heads, made.num_key_value_heads, made.intermediate_size = heads, kv, inner
        made.head_dim, made.max_position_embeddings = width // heads, 4096
        made.architectures = ["LlamaForCausalLM"]
        made.save_pretrained(folder)
        whole_tokenizer.save_pretrained(folder)
        return folder

    return make
