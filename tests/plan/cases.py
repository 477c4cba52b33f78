"""Stages whose memory is measured and foretold, their small models, and what they read."""

from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_rlhf import (
    DPOModule,
    GRPOModule,
    Load,
    LoRA,
    PPOModule,
    PromptDataModule,
    RewardModule,
    Rollout,
    Sampling,
    SFTModule,
    Updates,
)
from lightning_rlhf.plan.shapes import Shape

NEW = Sampling(max_new_tokens=12, min_new_tokens=12)
PAIRS = Shape("preferences", 4, 40, 40, 2, 1)
#: Rows of a rank's micro-batch.
SHAPES = {"sft": Shape("instructions", 4, 40, 40, 1, 1), "reward": PAIRS, "dpo": PAIRS}
#: Prompts of a copy in an iteration, and the completions of each.
PROMPTS = {"ppo": (8, 1), "grpo": (2, 4)}
KINDS = {"sft": SFTModule, "reward": RewardModule, "dpo": DPOModule, "ppo": PPOModule, "grpo": GRPOModule}


def config(vocabulary, layers=5, width=128, kv=2):
    """Of a model so small that it is quick, and so large that its tensors are most of the memory."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=kv, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def save(config, tokenizer, folder):
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lengths(prompts, completions):
    return [float(i) for i, _ in enumerate(completions)]


def module_of(stage, model, lora=False, checkpointing=False):
    """The stage's module."""
    common = {"lora": LoRA(r=8) if lora else None, "load": Load(gradient_checkpointing=checkpointing)}
    if stage in SHAPES:
        return KINDS[stage](model, **common)
    rollout = Rollout(PROMPTS[stage][1], NEW)
    return KINDS[stage](model, lengths, rollout=rollout, updates=Updates(epochs=2), **common)


def data_of(stage, copies, out):
    """Its data: all rows are as long as each other."""
    if stage in SHAPES:
        return DataLoader([SHAPES[stage].batch() for _ in range(2)], batch_size=None)
    texts = [{"prompt": "fox dog " * 12} for _ in range(8 * copies)]
    return PromptDataModule(texts, batch_size=PROMPTS[stage][0] * copies, val_fraction=0.0, cache_dir=out)


def shape_of(stage, prompt):
    """The micro-batch of a rank; of prompts so many tokens were read."""
    if stage in SHAPES:
        return SHAPES[stage]
    rows, group = PROMPTS[stage]
    return Shape("prompts", rows, prompt, 12, group, 1, rows, 2, 1, group)
