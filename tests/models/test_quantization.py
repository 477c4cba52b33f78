"""Quantized backbones: what is rounded, that nothing else is, and how they leave the house."""

import copy
import importlib.util

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lightning_rlhf import LoRA
from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.models import Policy, RewardModel, load_causal_lm, load_reward_model
from lightning_rlhf.models.quantization import DTYPE, is_quantized, is_quantized_layer
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.models.value import load_value_model
from lightning_rlhf.rollout.engine import reason_against

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")

KINDS = ["nf4", "int8"]
TREES = [Tree([5, 6, 7], [Branch([8, 9, 4]), Branch([10, 11])]), Tree([12], [Branch([13, 4])])]
IDS = torch.arange(5, 25)[None]


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch):
    """transformers 4.51 wants an extension for a CPU that bitsandbytes needs no more; here it may do as on a GPU."""
    monkeypatch.setattr(transformers.integrations, "validate_bnb_backend_availability", lambda *a, **k: True)


def shaken(model, seed=1):
    """Every trainable weight has moved."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=g)
    return model


def stands_for(layer):
    """A layer's weights, by the definition: two numbers a byte, a largest weight for 64 of them, in 8 bits itself."""
    weight = layer.weight
    if weight.dtype == torch.int8:
        return weight.data.float() * weight.SCB[:, None] / 127
    state = weight.quant_state
    largest = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    places = torch.stack([weight.data >> 4, weight.data & 15], -1).flatten().long()
    return (state.code[places].view(-1, 64) * largest[:, None]).view(state.shape)


def plain(tuned, directory, lora):
    """An fp32 model with the same adapters over the weights that a quantized one stands for."""
    base = AutoModelForCausalLM.from_pretrained(directory)
    for name, layer in tuned.named_modules():
        if is_quantized_layer(layer):
            name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            base.get_submodule(name).weight.data = stands_for(layer)
    twin = load_causal_lm(base, lora=lora)
    own = dict(tuned.named_parameters())
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if p.requires_grad:
                p.copy_(own[name])
    return twin


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def assert_near(a, b, tolerance):
    assert ((a - b).norm() / b.norm()).item() < tolerance


# ------------------------------------------------------------------------------------------------- what is rounded


@pytest.fixture(params=["rows of whole blocks", "rows of half a block"])
def either_model_dir(request):
    """4-bit layers of the second are bitsandbytes' no more: on a CPU it reads them wrongly."""
    name = {"rows of whole blocks": "wide_model_dir", "rows of half a block": "tiny_model_dir"}[request.param]
    return request.getfixturevalue(name)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_are_rounded_to_the_grid_and_nothing_else(kind, either_model_dir):
    whole = AutoModelForCausalLM.from_pretrained(either_model_dir)
    model = load_causal_lm(either_model_dir, quantization=kind)
    seen = set()
    for name, layer in whole.named_modules():
        found = model.get_submodule(name)
        if not isinstance(layer, torch.nn.Linear) or name == "lm_head":
            assert not is_quantized_layer(found)
            continue
        seen.add(name.split(".")[-1])
        weight, got = layer.weight.data, stands_for(found)
        if kind == "int8":
            limit = weight.abs().amax(1, keepdim=True) * (0.5 / 127 + 1e-3)  # half a step, and fp16's rounding
        else:
            state = found.weight.quant_state
            assert (state.quant_type, state.blocksize, state.nested, state.state2.blocksize) == ("nf4", 64, True, 256)
            gap = state.code.diff().max() / 2  # of NF4's 16 values, of a block's largest weight
            blocks = weight.reshape(-1, 64)
            # the second quantization of the largest weights is good to 2 % here
            limit = (blocks.abs().amax(1, keepdim=True) * (gap + 0.02)).expand_as(blocks).reshape(weight.shape)
        assert ((got - weight).abs() <= limit).all() and not torch.equal(got, weight)
    assert seen == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    others = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    assert others.keys() == {n for n, _ in whole.named_parameters() if "_proj" not in n}
    assert all(torch.equal(p, whole.get_parameter(n)) for n, p in others.items())


def test_a_weight_takes_as_many_bits_as_is_said(tmp_path):
    config = LlamaConfig(
        vocab_size=8, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for kind, bits in (("nf4", 4 + 8 / 64 + 32 / (64 * 256)), ("int8", 8 + 32 / 256)):
        weight = load_causal_lm(tmp_path, quantization=kind).model.layers[0].mlp.up_proj.weight
        if kind == "nf4":
            scales = weight.quant_state.absmax.nbytes + weight.quant_state.state2.absmax.nbytes
        else:
            scales = weight.SCB.nbytes
        assert 8 * (weight.nbytes + scales) / (256 * 512) == pytest.approx(bits)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_weights_that_are_stood_for(kind, checkpointing, either_model_dir):
    """1e-5, in training after evaluation, packed; gradients reach the first layer's adapters."""
    lora = LoRA(r=4)
    tuned = shaken(load_causal_lm(either_model_dir, lora=lora, quantization=kind, gradient_checkpointing=checkpointing))
    policy, want = Policy(tuned), Policy(plain(tuned, either_model_dir, lora))
    assert policy.layout == "tree" and reason_against(policy) is None
    batch = pack(TREES)
    assert_near(logits(tuned.eval()), logits(want.model.eval()), 1e-5)
    for model in (policy, want):
        model.train()
        model(batch).logprobs.sum().backward()
    assert_near(policy(batch).logprobs, want(batch).logprobs, 1e-5)
    expected = {n: p.grad for n, p in want.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and any("layers.0.self_attn.q_proj" in n for n in found)
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert_near(found[name], gradient, 1e-5)


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_biases_stay_whole_and_are_exported(kind, width, tiny_tokenizer, tmp_path):
    """Qwen2 has some, in layers that bitsandbytes computes (64 wide, in 4 bits) and in layers of ours."""
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    whole = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(whole.model.layers[1].self_attn.q_proj.bias)
    whole.save_pretrained(tmp_path / "whole")
    lora = LoRA(r=4)
    tuned = shaken(load_causal_lm(tmp_path / "whole", lora=lora, quantization=kind)).eval()
    bias = tuned.get_base_model().model.layers[1].self_attn.q_proj.base_layer.bias
    assert torch.equal(bias, whole.model.layers[1].self_attn.q_proj.bias)
    want = logits(plain(tuned, tmp_path / "whole", lora).eval())
    assert_near(logits(tuned), want, 1e-5)
    save_pretrained(tuned, tiny_tokenizer, tmp_path / "hf")
    assert_near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()), want, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_does_not_depend_on_what_shares_its_batch(kind, wide_model_dir):
    """LLM.int8() would take other features for outliers."""
    layer = load_causal_lm(wide_model_dir, quantization=kind).eval().model.layers[0].mlp.down_proj
    states = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    alone = layer(states[:2])
    states[2:] *= 1e5  # outliers, over fp16's range
    together = layer(states)
    assert together.isfinite().all()
    torch.testing.assert_close(together[:2], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_in_the_models_dtype(kind, wide_model_dir):
    model = load_causal_lm(wide_model_dir, quantization=kind, dtype="bfloat16").eval()
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16
    assert_near(logits(model).float(), logits(load_causal_lm(wide_model_dir, quantization=kind).eval()), 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_moves_keep_the_scales(kind, wide_model_dir):
    model = load_causal_lm(wide_model_dir, quantization=kind).eval()
    want = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    around = torch.nn.Sequential(model).to("cpu").cpu()  # as Lightning moves what it trains
    assert torch.equal(logits(around[0]), want)
    around.to(torch.bfloat16).to(torch.float32)  # as bf16-true casts, which rounds what is not quantized
    assert_near(logits(around[0]), want, 0.02)


# ------------------------------------------------------------------------------------------------- where it comes from


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_object_is_quantized_as_its_directory_and_left_alone(kind, wide_model_dir):
    whole = AutoModelForCausalLM.from_pretrained(wide_model_dir)
    before, rng = copy.deepcopy(whole.state_dict()), torch.get_rng_state()
    model = load_causal_lm(whole, quantization=kind)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not is_quantized(whole) and all(torch.equal(v, before[k]) for k, v in whole.state_dict().items())
    assert model.name_or_path == whole.name_or_path and model.generation_config is whole.generation_config
    want = load_causal_lm(wide_model_dir, quantization=kind).state_dict()
    assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_merged_before_their_base_is_rounded(kind, wide_model_dir, tiny_tokenizer, tmp_path):
    first = shaken(load_causal_lm(wide_model_dir, lora=LoRA(r=4)))
    save_pretrained(first, tiny_tokenizer, tmp_path / "adapter", adapter_only=True)
    save_pretrained(first, tiny_tokenizer, tmp_path / "merged")
    found = load_causal_lm(tmp_path / "adapter", quantization=kind, lora=LoRA(r=2))
    want = load_causal_lm(tmp_path / "merged", quantization=kind)
    torch.testing.assert_close(logits(found.eval()), logits(want.eval()), rtol=1e-5, atol=1e-5)
    assert found.peft_config["default"].base_model_name_or_path == str(tmp_path / "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_grow(kind, wide_model_dir, tiny_tokenizer, tmp_path):
    before = load_causal_lm(wide_model_dir).config.vocab_size
    tuned = shaken(load_causal_lm(wide_model_dir, lora=LoRA(r=4), quantization=kind, vocab_size=before + 5))
    tiny_tokenizer.add_tokens([f"<|{i}|>" for i in range(before + 5 - len(tiny_tokenizer))], special_tokens=True)
    ids = torch.arange(before - 5, before + 5)[None]
    want = logits(tuned.eval(), ids)
    assert want.shape[-1] == before + 5
    save_pretrained(tuned, tiny_tokenizer, tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(logits(again, ids), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_one_label_stay_whole_and_fp32(kind, wide_model_dir, tiny_tokenizer, tmp_path):
    whole = load_reward_model(wide_model_dir, dtype="bfloat16")
    rng = torch.get_rng_state()
    tuned = load_reward_model(
        wide_model_dir, dtype="bfloat16", lora=LoRA(r=4), quantization=kind, pad_token_id=tiny_tokenizer.pad_token_id
    )
    base = tuned.get_base_model()
    assert torch.equal(base.score.original_module.weight, whole.score.weight)  # drawn by the same seed
    assert {p.dtype for p in base.score.parameters()} == {torch.float32}
    assert is_quantized(base) and not torch.equal(torch.get_rng_state(), rng)  # the adapters alone were drawn
    critic = load_value_model(wide_model_dir, lora=LoRA(r=4), quantization=kind)
    assert is_quantized(critic) and not critic.get_base_model().score.original_module.weight.any()
    given = AutoModelForSequenceClassification.from_pretrained(wide_model_dir, num_labels=1)
    found = load_reward_model(given, quantization=kind)
    assert is_quantized(found) and torch.equal(found.score.weight, given.score.weight)


# ------------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("lora", [LoRA(r=4), LoRA(r=4, dora=True, rslora=True),
                                  LoRA(r=4, targets=["q_proj", "lm_head"]),
                                  LoRA(r=4, targets=["down_proj"], modules_to_save=["lm_head"])],
                         ids=["lora", "dora", "head", "saved head"])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_export_is_what_the_model_computes(kind, lora, wide_model_dir, tiny_tokenizer, tmp_path):
    """1e-5 in fp32; the live model and the RNG are left as they are, to the bit, and training goes on."""
    tuned = shaken(load_causal_lm(wide_model_dir, lora=lora, quantization=kind))
    want, before, rng = logits(tuned.eval()), copy.deepcopy(tuned.state_dict()), torch.get_rng_state()
    save_pretrained(tuned, tiny_tokenizer, tmp_path / "hf")
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in tuned.state_dict().items())
    assert is_quantized(tuned) and tuned.get_base_model().is_quantized and hasattr(tuned.config, "quantization_config")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert not hasattr(again.config, "quantization_config") and not is_quantized(again)
    torch.testing.assert_close(logits(again), want, rtol=1e-5, atol=1e-5)
    tuned.train()(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_reward_model_scores_alike(kind, wide_model_dir, tiny_tokenizer, tmp_path):
    pad = tiny_tokenizer.pad_token_id
    tuned = shaken(load_reward_model(wide_model_dir, lora=LoRA(r=4), quantization=kind, pad_token_id=pad))
    reward = RewardModel(tuned)
    reward.score_offset = 0.25
    batch = pack(TREES)
    with torch.no_grad():
        want = reward(batch, normalize=True)
        save_pretrained(tuned, tiny_tokenizer, tmp_path / "hf")
        found = RewardModel(load_reward_model(tmp_path / "hf", needs_head=True))(batch, normalize=True)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_alone_names_its_base_and_fits_it(kind, wide_model_dir, tiny_tokenizer, tmp_path):
    from peft import PeftModel

    tuned = shaken(load_causal_lm(wide_model_dir, lora=LoRA(r=4), quantization=kind)).eval()
    save_pretrained(tuned, tiny_tokenizer, tmp_path / "hf", adapter_only=True)
    assert not (tmp_path / "hf" / "config.json").exists()
    base = load_causal_lm(wide_model_dir, quantization=kind)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "hf").eval()), logits(tuned))
    whole = load_causal_lm(tmp_path / "hf").eval()  # by the base that it names
    assert 1e-4 < (logits(whole) - logits(tuned)).abs().max() < 0.5  # the rounding that training saw is gone


def test_a_merged_bf16_export_differs_by_bf16s_rounding(wide_model_dir, tmp_path):
    tuned = shaken(load_causal_lm(wide_model_dir, lora=LoRA(r=4), quantization="nf4", dtype="bfloat16")).eval()
    save_pretrained(tuned, AutoTokenizer.from_pretrained(wide_model_dir), tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **{DTYPE: torch.bfloat16})
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert_near(logits(again.eval()).float(), logits(tuned).float(), 0.05)


# ------------------------------------------------------------------------------------------------- refusals


def test_without_bitsandbytes_one_error_says_what_to_install(wide_model_dir, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning_rlhf\[quantization\]'"):
        load_causal_lm(wide_model_dir, quantization="nf4")


def test_a_transformers_that_wants_a_gpu_is_named(wide_model_dir, monkeypatch):
    monkeypatch.setattr(transformers.integrations, "validate_bnb_backend_availability", lambda *a, **k: False)
    with pytest.raises(RuntimeError, match=r"quantizes only on GPUs, and there is none. Use transformers 5"):
        load_causal_lm(wide_model_dir, quantization="nf4")


def test_other_names_are_refused(wide_model_dir):
    with pytest.raises(ValueError, match="must be nf4, int8 or null"):
        load_causal_lm(wide_model_dir, quantization="fp4")
