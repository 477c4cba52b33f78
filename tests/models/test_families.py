"""Every family of models: packed results are plain transformers', with gradients, adapters, checkpointing and heads.

``pytest tests/models/test_families.py -k policies -s`` prints each family's layout and differences.
"""

import copy

import pytest
import torch
import transformers
from plain import V, batch, fill, gradient, reference
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_rlhf.data.packed import Branch, Tree, pack, pad
from lightning_rlhf.models import LoRA, Policy, RewardModel, load_causal_lm
from lightning_rlhf.models.backbone import enable_checkpointing
from lightning_rlhf.models.value import ValueModel
from lightning_rlhf.rl.actors import disable_dropout
from lightning_rlhf.rollout.engine import reason_against

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
LATENT = dict(  # queries and keys of 16, values of 12, through low ranks
    num_key_value_heads=4,
    head_dim=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=12,
    q_lora_rank=16,
    kv_lora_rank=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
)
OPT = dict(**UNGROUPED, ffn_dim=96, init_std=0.15, dropout=0.0, word_embed_proj_dim=48)
FALCON = dict(**UNGROUPED, attention_dropout=0.0, hidden_dropout=0.0)
# family: (settings, layout expected in transformers 5, in 4.51: None where the family is not there)
FAMILIES = {
    "llama": ({}, "tree", "tree"),
    "llama tied": (dict(tie_word_embeddings=True), "tree", "tree"),
    "qwen2": ({}, "tree", "tree"),
    "qwen2 windows": (dict(use_sliding_window=True, sliding_window=10, max_window_layers=0), "tree", "tree"),
    "qwen2 some windows": (dict(use_sliding_window=True, sliding_window=10, max_window_layers=1), "tree", None),
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
    "deepseek_v3": (LATENT, "tree", "tree"),
    "olmo2": ({}, "tree", "tree"),
    "granite": (dict(logits_scaling=3.0), "tree", "tree"),
    "cohere": (dict(logit_scale=0.5), "tree", "tree"),
    "starcoder2": (dict(sliding_window=10), "tree", "tree"),
    "smollm3": (dict(no_rope_layers=[1, 0]), "tree", None),
    "gpt_oss": (dict(WINDOWS, **MOE), "tree", None),
    "stablelm": (dict(partial_rotary_factor=0.5, head_dim=None), "inject", "padded"),
    "falcon": (dict(FALCON, new_decoder_architecture=False, multi_query=True, alibi=False), "padded", "padded"),
    "falcon alibi": (dict(FALCON, new_decoder_architecture=True, num_kv_heads=2, alibi=True), "padded", "padded"),
    "mpt": (dict(d_model=48, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=256), "padded", "padded"),
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


def layout(family):
    return FAMILIES[family][1 if FIVE else 2]


#: Families to which transformers 5 gave a classifier.
NEW_CLASSIFIERS = ("gemma3_text", "olmo2", "deepseek_v3")
TREES = [family for family in FAMILIES if layout(family) in ("tree", "inject")]


def build(family, auto=AutoModelForCausalLM, **settings):
    settings = {k: v for k, v in {**BASE, **FAMILIES.get(family, ({},))[0], **settings}.items() if v is not None}
    name = family.split(" ")[0]
    if name not in CONFIG_MAPPING:
        assert layout(family) is None  # the table says so too
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if family == "qwen2 some windows" and not FIVE:
        pytest.skip("transformers 4.51 masks every layer of Qwen 2 by a window that only some layers have")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**settings)
    try:
        model = auto.from_config(config, attn_implementation="eager").float()
    except ValueError as error:
        assert "Unrecognized configuration class" in str(error)
        assert name in ("granite", "cohere") or (not FIVE and name in NEW_CLASSIFIERS)
        pytest.skip(f"transformers {transformers.__version__} has no {auto.__name__} of {name}")
    return fill(model).train()


def compare(got, model, want, plain, name):
    """Outputs to 4e-6, and gradients of all parameters to 3e-6 of their size."""
    assert want.std() > 0.1  # a model that says the same of all tokens would prove nothing
    difference = (got - want).abs().max().item()
    ours, theirs = gradient(got, model), gradient(want, plain)
    relative = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"{name:30s} {difference:.1e} {relative:.1e}")
    assert difference < 4e-6
    assert relative < 3e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_policies_equal_plain_transformers(family):
    plain, policy, packed = build(family), Policy(build(family)), batch()
    compare(policy(packed).logprobs, policy.model, reference(plain, packed), plain, f"{family} {policy.layout}")
    assert policy.layout == layout(family)


@pytest.mark.parametrize("family", TREES)
def test_checkpointing_changes_nothing(family):
    """GPT-NeoX in 4.51 drops keywords under it alone, and takes the tree by hooks then."""
    plain, model, packed = build(family), build(family), batch()
    enable_checkpointing(model)
    policy = Policy(model)
    compare(policy(packed).logprobs, policy.model, reference(plain, packed), plain, f"{family} {policy.layout}")
    assert policy.layout in (layout(family), "inject")


@pytest.mark.parametrize("family", TREES)
def test_adapters_equal_plain_transformers(family):
    plain, packed = load_causal_lm(build(family), lora=LoRA(r=4)), batch()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "lora_B" in name:
                p += 0.05 * torch.randn_like(p)
    policy = Policy(copy.deepcopy(plain))
    compare(policy(packed).logprobs, policy.model, reference(plain, packed), plain, f"{family} {policy.layout}")
    assert policy.layout == layout(family)
    with policy.model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(policy(packed).logprobs, reference(build(family), packed), atol=4e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_classifiers_equal_plain_transformers(family):
    """Scores after each last token and, by the same head, values before each scored one."""
    packed = batch()
    padded = pad(packed)
    inputs = dict(input_ids=padded.input_ids, attention_mask=padded.attention_mask)
    plain, one, other = (build(family, AutoModelForSequenceClassification, num_labels=1) for _ in range(3))
    states = []
    plain.score.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    want = plain(**inputs).logits[:, 0]
    reward = RewardModel(one)
    compare(reward(packed), reward.model, want, plain, f"{family} {reward.layout}")
    assert reward.layout == layout(family)
    with torch.no_grad():
        values = ValueModel(other)(packed)
        torch.testing.assert_close(values.last_values, want, atol=4e-6, rtol=0)
        want = plain.score(states[0])[padded.row, padded.column, 0]
        torch.testing.assert_close(values.values, want, atol=4e-6, rtol=0)


def test_a_model_that_cannot_take_a_tree_says_so_once(caplog):
    Policy(build("bloom"))
    assert "padded" in caplog.text and "Bloom" in caplog.text
    with pytest.raises(ValueError, match="layout"):
        Policy(build("bloom"), layout="tree")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_losses_are_not_added_and_it_is_said(family, caplog):
    plain, packed = build(family, output_router_logits=True), batch()
    policy = Policy(build(family, output_router_logits=True))
    assert "load-balancing loss is not added" in caplog.text
    compare(policy(packed).logprobs, policy.model, reference(plain, packed), plain, family)
    loss = policy(packed, weights=torch.ones(packed.num_scored)).loss
    torch.testing.assert_close(loss, -reference(plain, packed).sum())


#: Families with rotary frequencies that follow from their config.
ROTARY = ["llama", "qwen2", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox", "mixtral", "deepseek_v3",
          "olmo2", "cohere", "stablelm", "falcon", "smollm3"]  # fmt: skip


def cast_in_place(module):
    for tensor in (*module.parameters(), *module.buffers()):  # as FSDP and Gemini do
        tensor.data = tensor.data.bfloat16() if tensor.is_floating_point() else tensor.data


CASTS = {"to": lambda m: m.to(torch.bfloat16), "data": cast_in_place}


@pytest.mark.parametrize(
    "family, cast, when",
    [*((family, "to", "before") for family in ROTARY), ("llama", "to", "after"), ("gemma3_text", "data", "after")],
)
def test_far_positions_are_those_of_fp32_frequencies(family, cast, when):
    """Rounded to bf16, they are turned by an angle that grows with the position."""
    batch = pack([Tree([5, 6, 7], [Branch([(3 * i) % 90 + 5 for i in range(240)])])])
    models = [build(family).float() for _ in range(2)]
    assert any("inv_freq" in name for name, _ in models[0].named_buffers())
    for p in models[0].parameters():
        p.data = p.data.bfloat16()
    want = Policy(models[0], "padded")
    if when == "before":
        CASTS[cast](models[1])
    got = Policy(models[1], "padded")
    if when == "after":
        CASTS[cast](got)
    with torch.no_grad():
        assert torch.equal(got(batch).logprobs, want(batch).logprobs)


#: Families with something of their own that is random in training; all others have dropout in attention.
RANDOM = {
    "opt": dict(layerdrop=0.4, dropout=0.3, attention_dropout=0.3),
    "falcon": dict(attention_dropout=0.3, hidden_dropout=0.3),
    "mixtral": dict(router_jitter_noise=0.3, attention_dropout=0.3),
    "phimoe": dict(MOE, router_jitter_noise=0.3, input_jitter_noise=0.3, attention_dropout=0.3),
    "gpt2": dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "gptj": dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "gpt_neo": dict(resid_dropout=0.3, embed_dropout=0.3, attention_dropout=0.3),
    "bloom": dict(hidden_dropout=0.3, attention_dropout=0.3),
    "phi": dict(resid_pdrop=0.3, embd_pdrop=0.3, attention_dropout=0.3),
}
QUIET = list({**FAMILIES, **RANDOM})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", QUIET)
def test_nothing_is_random_in_training_without_dropout(family, checkpointing):
    """Layerdrop, jitter of routers, dropout that a layer reads off its config: ratios would differ from 1."""
    if family == "phimoe" and not FIVE:
        pytest.skip("PhiMoE's attention of 4.51 takes other arguments")
    settings = RANDOM.get(family, dict(attention_dropout=0.3))
    model = build(family, **settings)
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            pytest.skip("it can't be checkpointed")
        enable_checkpointing(model)
    kept = model.config.to_dict()
    policy, packed = Policy(model), batch()
    disable_dropout(policy)
    torch.manual_seed(0)
    one, two = (policy.train()(packed).logprobs for _ in range(2))
    assert torch.equal(one, two)
    with torch.no_grad():
        torch.testing.assert_close(policy.eval()(packed).logprobs, one.detach(), atol=1e-6, rtol=0)
    assert {k: v for k, v in model.config.to_dict().items() if "drop" in k} == {k: kept[k] for k in kept if "drop" in k}


@pytest.mark.skipif(not FIVE, reason="4.51 runs them padded, or has none of them")
@pytest.mark.parametrize(
    "family, settings",
    [
        ("phimoe", dict(MOE, sliding_window=40)),
        ("doge", dict(keep_window_size=40)),
        ("doge", dict(sliding_window=40)),
    ],
    ids=["phimoe", "doge", "doge window"],
)
def test_a_mask_that_depends_on_the_length_is_known_before_it_acts(family, settings):
    """Their layers don't hand it on, and the trial is shorter than it: long rows would see what they must not."""
    plain, model = build(family, **settings), build(family, **settings)
    policy = Policy(model)
    assert policy.layout == "padded"
    assert reason_against(policy) is not None  # the engine gives the same answer
    long = pack([Tree([5, 6, 7], [Branch([(3 * i) % 90 + 5 for i in range(80)])])])
    disable_dropout(policy.train()), disable_dropout(plain)
    with torch.no_grad():
        torch.testing.assert_close(policy(long).logprobs, reference(plain, long), atol=4e-6, rtol=0)
