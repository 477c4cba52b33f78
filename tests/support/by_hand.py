"""Plain transformers models of weights by their names: what an export must be, whatever adapter is switched on."""

import math

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

IDS = torch.tensor([[3, 17, 40, 41, 42, 7, 99, 120, 33, 60]])


def plain_model(base, state, classifier):
    """A transformers model with these weights, by their own names, and no others."""
    config = AutoConfig.from_pretrained(base)
    config.vocab_size = state[next(k for k in state if k.endswith("embed_tokens.weight"))].shape[0]
    config.num_labels = 1
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    model.load_state_dict({name: state[name].float() for name in model.state_dict()})
    return model


def split(state):
    """A peft model's tensors: of the plain model inside, and those of the adapter ``default`` by layer and kind."""
    base, adapter = {}, {}
    for name, value in state.items():
        name = name.removeprefix("base_model.model.")
        if ".default" in name:
            layer, _, kind = name.replace(".default", "").removesuffix(".weight").rpartition(".")
            adapter.setdefault(layer, {})[kind] = value.float()
        else:
            base[name.replace(".base_layer", "").replace(".original_module", "")] = value.float()
    return base, adapter


def by_hand(base, state, classifier=False, alpha=8, rslora=False):
    """The policy, or the reward model, from its weights by name: which adapter is active has no say in it."""
    whole, adapter = split(state)
    for layer, parts in adapter.items():
        if "modules_to_save" in parts:
            whole[f"{layer}.weight"] = parts["modules_to_save"]
            continue
        a, b = parts["lora_A"], parts["lora_B"]
        scale = alpha / (math.sqrt(len(a)) if rslora else len(a))
        merged = whole[f"{layer}.weight"] + scale * b @ a
        if "lora_magnitude_vector" in parts:
            merged = parts["lora_magnitude_vector"][:, None] * merged / merged.norm(dim=1, keepdim=True)
        whole[f"{layer}.weight"] = merged
    return plain_model(base, whole, classifier)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()
