"""Every family of models: packed results are plain transformers', with gradients, adapters, checkpointing and heads.

``pytest tests/models/test_families.py -k plain_transformers -s`` prints the table of docs/packed.md.
"""

import copy

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_rlhf.data.packed import Branch, Tree, pack, pad
from lightning_rlhf.models import LoRA, Policy, RewardModel, load_causal_lm
from lightning_rlhf.models.backbone import enable_checkpointing

V = 97
FIVE = int(transformers.__version__.split(".")[0]) >= 5
BASE = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=256,
    initializer_range=0.15,
    attention_dropout=0.0,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
UNGROUPED = dict(num_key_value_heads=None, head_dim=None)
OLD = dict(n_embd=48, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
WINDOWS = dict(sliding_window=10, layer_types=["sliding_attention", "full_attention"])
MOE = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
OPT = dict(**UNGROUPED, ffn_dim=96, dropout=0.0, word_embed_proj_dim=48)
FALCON = dict(**UNGROUPED, attention_dropout=0.0, hidden_dropout=0.0)
# family: (settings, layout expected in transformers 5, in 4.51: None where the family is not there)
FAMILIES = {
    "llama": ({}, "tree", "tree"),
    "llama tied": (dict(tie_word_embeddings=True), "tree", "tree"),
    "qwen2": ({}, "tree", "tree"),
    "qwen2 windows": (
        dict(WINDOWS, use_sliding_window=True, max_window_layers=0, layer_types=["sliding_attention"] * 2),
        "tree",
        "tree",
    ),
    "qwen2 some windows": (
        dict(use_sliding_window=True, sliding_window=10, max_window_layers=1),
        "tree",
        "padded",
    ),
    "qwen3": ({}, "tree", "tree"),
    "mistral": (dict(sliding_window=10), "tree", "tree"),
    "gemma": ({}, "tree", "inject"),
    "gemma2": (
        dict(WINDOWS, query_pre_attn_scalar=12, attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
        "tree",
        "tree",
    ),
    "gemma3_text": (dict(WINDOWS, query_pre_attn_scalar=12, sliding_window_pattern=2), "tree", "tree"),
    "phi": (dict(num_key_value_heads=4, head_dim=None), "tree", "tree"),
    "phi3": (dict(sliding_window=10, original_max_position_embeddings=256, head_dim=None), "tree", "tree"),
    "gpt2": (OLD, "tree", "inject"),
    "gpt_neox": (UNGROUPED, "tree", "tree"),
    "opt": (OPT, "tree", "padded"),
    "opt projected": (dict(OPT, word_embed_proj_dim=32, do_layer_norm_before=False), "tree", "padded"),
    "bloom": (dict(n_layer=2, n_head=4), "padded", "padded"),
    "mixtral": (MOE, "tree", "tree"),
    "qwen3_moe": (MOE, "tree", "inject"),
    "olmo2": ({}, "tree", "tree"),
    "granite": (dict(logits_scaling=3.0), "tree", "tree"),
    "cohere": (dict(logit_scale=0.5), "tree", "tree"),
    "starcoder2": (dict(sliding_window=10), "tree", "tree"),
    "smollm3": (dict(no_rope_layers=[1, 0]), "tree", None),
    "gpt_oss": (dict(WINDOWS, **MOE), "tree", None),
    "stablelm": (dict(partial_rotary_factor=0.5, head_dim=None), "inject", "padded"),
    "falcon": (dict(FALCON, new_decoder_architecture=False, multi_query=True, alibi=False), "padded", "padded"),
    "falcon alibi": (dict(FALCON, new_decoder_architecture=True, num_kv_heads=2, alibi=True), "padded", "padded"),
    "gptj": (dict(OLD, rotary_dim=12, head_dim=None), "padded", "padded"),
    "gpt_neo": (
        dict(
            UNGROUPED,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=10,
            resid_dropout=0.0,
            embed_dropout=0.0,
        ),
        "padded",
        "padded",
    ),
}


def build(family, auto=AutoModelForCausalLM, **settings):
    settings = {k: v for k, v in {**BASE, **FAMILIES[family][0], **settings}.items() if v is not None}
    name = family.split(" ")[0]
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    model = auto.from_config(CONFIG_MAPPING[name](**settings), attn_implementation="eager").float()
    with torch.no_grad():  # nothing hides behind a zero: norms, biases and sinks get values
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.1 * torch.randn_like(p)
    return model.train()


def batch(seed=0):
    """Lone sequences, a pair, a group of five, and a completion that is scored in part."""
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(3, V, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()

    rows = [Tree(ids(4, 20), [Branch(ids(2, 16)) for _ in range(k)]) for k in (1, 2, 5, 1)]
    b = ids(6, 9)
    return pack([*rows, Tree(ids(3, 4), [Branch(b, [i % 2 == 0 for i in range(len(b))])])])


def reference(model, packed):
    """Plain transformers: padded rectangle, its own forward, log_softmax over all logits."""
    p = pad(packed)
    logits = model(input_ids=p.input_ids, attention_mask=p.attention_mask, use_cache=False).logits
    return logits[p.row, p.column].float().log_softmax(-1).gather(-1, packed.target[:, None])[:, 0]


def gradient(outputs, model):
    model.zero_grad()
    (outputs * torch.linspace(-1, 1, len(outputs))).sum().backward()  # uneven: errors can't cancel
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check(got, got_model, want, want_model):
    """Log-probs to 4e-6, gradients to 3e-6 of their size; returns both differences."""
    assert want.std() > 0.1
    difference = (got - want).abs().max().item()
    gradients = gradient(got, got_model), gradient(want, want_model)
    relative = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    return difference, relative


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_plain_transformers(family):
    packed = batch()
    plain = build(family)
    policy = Policy(build(family))
    d = check(policy(packed).logprobs, policy.model, reference(plain, packed), plain)
    print(f"\n{family:18s} {policy.layout:8s} {d[0]:.1e} {d[1]:.1e}")
    assert d[0] < 4e-6 and d[1] < 3e-6
    assert policy.layout == FAMILIES[family][1 if FIVE else 2]


TREES = [name for name, (_, *layouts) in FAMILIES.items() if layouts[not FIVE] in ("tree", "inject")]


@pytest.mark.parametrize("family", TREES)
def test_checkpointing(family):
    packed = batch()
    plain = build(family)
    model = build(family)
    enable_checkpointing(model)
    policy = Policy(model)
    d = check(policy(packed).logprobs, policy.model, reference(plain, packed), plain)
    print(f"\n{family:18s} {policy.layout:8s} {d[0]:.1e} {d[1]:.1e}")
    assert d[0] < 4e-6 and d[1] < 3e-6
    assert policy.layout != "padded"


@pytest.mark.parametrize("family", TREES)
def test_lora(family):
    packed = batch()
    model = load_causal_lm(build(family), lora=LoRA(r=4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += 0.05 * torch.randn_like(p)
    policy = Policy(copy.deepcopy(model))
    d = check(policy(packed).logprobs, policy.model, reference(model, packed), model)
    print(f"\n{family:18s} {policy.layout:8s} {d[0]:.1e} {d[1]:.1e}")
    assert d[0] < 4e-6 and d[1] < 3e-6
    assert policy.layout != "padded"


@pytest.mark.parametrize("family", FAMILIES)
def test_reward(family):
    packed = batch()
    try:
        plain = build(family, AutoModelForSequenceClassification, num_labels=1)
    except ValueError as error:
        pytest.skip(str(error)[:60])
    reward = RewardModel(build(family, AutoModelForSequenceClassification, num_labels=1))
    p = pad(packed)
    base = plain.base_model if plain.base_model is not plain else plain.get_decoder()
    v = plain.score(base(input_ids=p.input_ids, attention_mask=p.attention_mask, use_cache=False).last_hidden_state)[
        ..., 0
    ]
    own = plain(input_ids=p.input_ids, attention_mask=p.attention_mask).logits[:, 0]
    want = v[torch.arange(len(p.last)), p.last]
    torch.testing.assert_close(own, want, atol=4e-6, rtol=0)
    d = check(reward(packed), reward.model, want, plain)
    print(f"\n{family:18s} {reward.layout:8s} {d[0]:.1e} {d[1]:.1e}")
    assert d[0] < 4e-6 and d[1] < 3e-6
