"""Tree, padded and plain transformers give one result, adapters included; test_families.py has the other families."""

import copy

import pytest
import torch
import transformers
from plain import V, batch, fill, gradient, reference
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM

from lightning_rlhf.data.packed import Branch, Tree, pack, pad
from lightning_rlhf.models import LoRA, Policy, load_causal_lm
from lightning_rlhf.models.backbone import enable_checkpointing, is_checkpointing

#: Heads that change their logits; the decoders around them are in test_families.py.
HEADS = {
    "gemma2": dict(head_dim=12, query_pre_attn_scalar=12, sliding_window=10, final_logit_softcapping=4.0),
    "granite": dict(logits_scaling=3.0),
}


def build(family="llama"):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        vocab_size=V,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        attention_dropout=0.0,
        **HEADS.get(family, {}),
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return fill(model).train()


def test_layouts_agree_on_the_weighted_loss():
    packed, weights = batch(), None
    results = []
    for layout in ("tree", "padded"):
        policy = Policy(build(), layout)
        weights = torch.linspace(0, 1, packed.num_scored)
        loss = policy(packed, weights=weights).loss
        loss.backward()
        results.append((loss, torch.cat([p.grad.flatten() for p in policy.parameters()])))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    assert (results[0][1] - results[1][1]).norm() / results[1][1].norm() < 1e-5


@pytest.mark.parametrize("kind", ["attention", "lm_head", "modules_to_save", "dora", "lm_head dora"])
def test_lora_on_and_off_equals_plain_transformers(kind):
    lora = {
        "attention": LoRA(r=4, targets=["q_proj", "v_proj"]),
        "lm_head": LoRA(r=4, targets=["q_proj", "lm_head"]),
        "modules_to_save": LoRA(r=4, targets=["q_proj"], modules_to_save=["lm_head"]),
        "dora": LoRA(r=4, targets=["q_proj"], dora=True),
        "lm_head dora": LoRA(r=4, targets=["lm_head"], dora=True),
    }[kind]
    model = load_causal_lm(build(), lora=lora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("lora_B", "modules_to_save", "magnitude")):
                p += 0.05 * torch.randn_like(p)
    packed = batch()
    policy = Policy(copy.deepcopy(model))
    torch.testing.assert_close(policy(packed).logprobs, reference(model, packed), atol=1e-5, rtol=0)
    with policy.model.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(policy(packed).logprobs, reference(model, packed), atol=1e-5, rtol=0)
    got = gradient(policy(packed).logprobs, policy.model)
    want = gradient(reference(model, packed), model)
    assert (got - want).norm() / want.norm() < 1e-5


def test_lora_settings_are_honored():
    model = load_causal_lm(build(), lora=LoRA(r=3, alpha=7, dropout=0.25, targets=["q_proj"], rslora=True))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.r["default"] == 3
    assert layer.scaling["default"] == pytest.approx(7 / 3**0.5)
    assert layer.lora_dropout["default"].p == 0.25
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("q_proj.lora_" in n for n in trainable)


def test_generate_works_as_before_in_the_tree_layout():
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    arguments = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    want = build().eval().generate(ids, **arguments)
    policy = Policy(build())
    assert policy.layout == "tree"
    with policy.native_attention() as model:
        assert torch.equal(model.generate(ids, **arguments), want)
    assert policy.model.training
    policy.eval()
    assert torch.equal(policy.model.generate(ids, **arguments), want)


def test_native_attention_restores_checkpointing_and_layout():
    model = build()
    enable_checkpointing(model)
    policy = Policy(model)
    with policy.native_attention() as inner:
        assert not is_checkpointing(inner)
    assert is_checkpointing(model)
    torch.testing.assert_close(policy(batch()).logprobs, reference(build(), batch()), atol=1e-5, rtol=0)


def test_a_head_that_is_not_known_is_refused():
    """A scale that is left out gives log-probs that look right and are not."""

    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 0.9 * out.logits
            return out

    with pytest.raises(ValueError, match="Scaled changes its logits after the head"):
        Policy(Scaled(build().config))


def test_temperature_and_entropy_reach_the_head():
    policy, packed = Policy(build()), batch()
    p = pad(packed)
    with torch.no_grad():
        out = policy(packed, entropy=True, temperature=0.7)
        logits = build()(input_ids=p.input_ids, attention_mask=p.attention_mask).logits[p.row, p.column] / 0.7
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(out.entropies, -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.logprobs, log_p.gather(-1, packed.target[:, None])[:, 0], atol=1e-5, rtol=0)


def test_new_tokens_resize_embeddings():
    model = load_causal_lm(build(), vocab_size=V + 3)
    assert model.get_input_embeddings().weight.shape[0] == V + 3 == model.config.vocab_size


def test_float16_on_a_cpu_is_refused(tmp_path):
    build().save_pretrained(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="float16"):
            load_causal_lm(tmp_path, dtype="float16")


def embedded(policy, packed, alpha, draws=1):
    """What the decoder is given with noise, less what it is given without: (draws, *, D)."""
    seen = []
    embeddings = policy.transformer.get_input_embeddings()

    def run(alpha):
        with policy.noisy_embeddings(packed, alpha):
            hook = embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
            policy(packed)
            hook.remove()

    with torch.no_grad():
        for a in (None, *[alpha] * draws):
            run(a)
    return torch.stack(seen[1:]) - seen[0]


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_neftune_noise_is_uniform_and_as_large_as_each_tokens_sequence_says(layout):
    policy, packed = Policy(build(), layout), batch()
    noise = embedded(policy, packed, 3.0, draws=40)
    if layout == "tree":
        squares = []  # alpha^2 / (L D) of each token; a shared prompt takes the mean over its sequences
        for prompt, branches in packed.forest.trees:
            each = [9 / (48 * (prompt.length + b.length)) for b in branches]
            squares += [sum(each) / len(each)] * prompt.length
            squares += [square for square, b in zip(each, branches, strict=True) for _ in range(b.length)]
        bound = torch.tensor(squares).sqrt()[None, None, :, None]
    else:
        lengths = [p.length + b.length for p, branches in packed.forest.trees for b in branches]
        bound = 3.0 / (48 * torch.tensor(lengths)).sqrt()[None, :, None, None]
    part = noise / bound  # uniform in (-1, 1)
    assert part.abs().max() < 1 + 1e-4
    tokens = part.flatten(1, 2)  # (draws, tokens, D): 1920 numbers a token
    assert (tokens.mean((0, 2)).abs() < 0.08).all()
    torch.testing.assert_close(tokens.square().mean((0, 2)), torch.full((tokens.shape[1],), 1 / 3), atol=0.05, rtol=0)
    draws = tokens.flatten(1)
    assert (torch.corrcoef(draws) - torch.eye(40)).abs().max() < 0.1, "one draw is like another"


def test_neftune_of_a_plain_row_is_that_of_transformers():
    if int(transformers.__version__.split(".")[0]) >= 5:
        from transformers.integrations import neftune_post_forward_hook
    else:
        from transformers.trainer_utils import neftune_post_forward_hook

    packed = pack([Tree(list(range(3, 10)), [Branch(list(range(10, 30)))])])
    policy = Policy(build())
    assert policy.layout == "tree"
    torch.manual_seed(3)
    own = embedded(policy, packed, 5.0)[0]
    embeddings = policy.transformer.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    clean = torch.nn.functional.embedding(packed.input_ids[None], embeddings.weight)
    torch.manual_seed(3)
    theirs = neftune_post_forward_hook(embeddings, None, clean) - clean
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(own, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "lora", [dict(targets=["q_proj", "embed_tokens"]), dict(modules_to_save=["embed_tokens"])], ids=str
)
def test_neftune_under_adapters_of_the_embeddings_and_with_checkpointing(lora):
    """The layers that run again in the backward pass see the same noise; afterwards there is none."""
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        policy, packed = (
            Policy(load_causal_lm(build(), lora=LoRA(r=4, **lora), gradient_checkpointing=checkpointed)),
            batch(),
        )
        clean = policy(packed).logprobs
        torch.manual_seed(2)
        with policy.noisy_embeddings(packed, 5.0):
            out = policy(packed, weights=packed.weight)
        out.loss.backward()
        assert (out.logprobs - clean).abs().max() > 1e-3
        torch.testing.assert_close(policy(packed).logprobs, clean, atol=0, rtol=0)
        found.append([out.loss.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    assert len(found[0]) > 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
@pytest.mark.parametrize("lora", [None, LoRA(r=4, targets=["q_proj", "lm_head"])], ids=["full", "lora"])
def test_z_loss_equals_that_of_all_logits(family, lora):
    """With a capped and a scaled head, and with adapters on it."""
    torch.manual_seed(1)
    model = load_causal_lm(build(family), lora=lora)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.3)
    policy, packed = Policy(model, z_loss=0.1), batch()
    plain, p = copy.deepcopy(model), pad(packed)
    policy(packed, weights=packed.weight).loss.backward()
    for module in plain.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    logits = plain(input_ids=p.input_ids, attention_mask=p.attention_mask).logits[p.row, p.column]
    nll = -logits.log_softmax(-1).gather(-1, packed.target[:, None])[:, 0]
    (packed.weight * (nll + 0.1 * logits.logsumexp(-1) ** 2)).sum().backward()
    want = {k: v.grad for k, v in plain.named_parameters() if v.grad is not None}
    got = {k: v.grad for k, v in model.named_parameters() if v.grad is not None}
    assert got.keys() == want.keys() and (lora is None or any("lm_head" in k for k in got))
    for k in got:
        assert (got[k] - want[k]).norm() / want[k].norm() < 1e-4, k
