"""A small model, large enough that its tensors are most of the memory."""

import pytest
import torch.distributed as dist
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def config(vocabulary, layers=5, width=128, kv=2):
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=kv, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


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
def small_model(whole_tokenizer, tmp_path_factory):
    """Five layers with weights."""
    return save(config(len(whole_tokenizer)), whole_tokenizer, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def even_model(whole_tokenizer, tmp_path_factory):
    """The same with four key-value heads, which four ranks divide."""
    return save(config(len(whole_tokenizer), kv=4), whole_tokenizer, tmp_path_factory.mktemp("even"))


def save(config, tokenizer, folder):
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
