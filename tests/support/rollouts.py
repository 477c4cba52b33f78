"""Model families, and what rollouts leave: helpers of the engines' tests."""

import random

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rlhf.rollout import Request, sample_key

FAMILIES = {
    "Llama": ("Llama", {}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {}),
    "Mistral": ("Mistral", dict(sliding_window=None)),
    "Mistral, window": ("Mistral", dict(sliding_window=5)),
    "Mistral, wide window": ("Mistral", dict(sliding_window=20)),
    "Gemma2": ("Gemma2", dict(sliding_window=5)),
    "GPTNeoX": ("GPTNeoX", {}),
    "Phi": ("Phi", {}),
    "Olmo2": ("Olmo2", {}),
    "GPT2": ("GPT2", {}),
    "Bloom": ("Bloom", {}),
    "Mamba": ("Mamba", {}),
}
UNCACHED = {"Bloom", "Mamba"} | ({"GPT2"} if transformers.__version__.startswith("4.") else set())


def ids(groups):
    return [[completion.input_ids for completion in group] for group in groups]


def requests(prompts, samples=3):
    return [Request(prompt, [sample_key(i, j) for j in range(samples)]) for i, prompt in enumerate(prompts)]


def lora(model, seed=0, std=2.0):
    torch.manual_seed(seed)
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM")
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    return model


def state_of(policy):
    """All that a rollout might leave changed."""
    tensors = [*policy.named_parameters(), *policy.named_buffers()]
    return dict(
        modes={name: m.training for name, m in policy.named_modules()},
        attention=[getattr(m.config, "_attn_implementation", None) for m in policy.modules() if hasattr(m, "config")],
        checkpointing=[getattr(m, "gradient_checkpointing", None) for m in policy.modules()],
        hooks=[len(m._forward_pre_hooks) + len(m._forward_hooks) for m in policy.modules()],
        tensors={name: (id(t), t.requires_grad, t.is_inference(), t.tolist()) for name, t in tensors},
        generation=policy.transformer.generation_config.to_dict(),
        rng=(torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
    )


WAITS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique"}


class Operations(TorchDispatchMode):
    """Counts operations that wait for their numbers."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found["waits"] += str(func.overloadpacket) in WAITS
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Counts copies to the device, and those to it or from it that wait."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "to" and "non_blocking" in kwargs:
            self.found["copies"] += 1
        elif name in ("tolist", "cpu", "numpy", "new_tensor") or (name == "tensor" and kwargs.get("device")):
            self.found["waits"] += 1
        elif name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found["waits"] += any(isinstance(part, list) for part in index)
        return func(*args, **kwargs)
