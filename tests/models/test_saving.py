"""What is saved loads elsewhere, and is whole or not there."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import lightning_rlhf.models.saving as saving
from lightning_rlhf.models import LoRA, load_causal_lm
from lightning_rlhf.models.loading import load_config

IDS = torch.arange(5, 25)[None]


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "lora",
    [LoRA(r=4, targets=["lm_head"]), LoRA(r=4, targets=["embed_tokens"]),
     LoRA(r=4, targets=["q_proj"], modules_to_save=["lm_head"]), LoRA(r=4)],
    ids=["head", "embeddings", "saved head", "inner"],
)  # fmt: skip
def test_tied_weights_merge_to_what_the_model_computes(lora, model, tokenizer, tmp_path):
    model.config.tie_word_embeddings = True
    model.tie_weights()
    tuned = load_causal_lm(model, lora=lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    want, before = logits(tuned), {k: v.clone() for k, v in tuned.state_dict().items()}
    rng = torch.get_rng_state()
    saving.save_pretrained(tuned, tokenizer, tmp_path / "hf")
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in tuned.state_dict().items())
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")), want, atol=1e-5, rtol=0)


def test_weights_given_by_name_are_the_ones_saved(model, tokenizer, tmp_path):
    full = {name: value + 1 for name, value in model.state_dict().items()}
    saving.save_pretrained(model, tokenizer, tmp_path / "hf", state_dict=full)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in full.items())


@pytest.mark.parametrize(("stops", "want"), [((), 4), ((4,), 4), ((2, 4), [2, 4])])
def test_stop_tokens(stops, want, model, tokenizer, tmp_path):
    saving.save_pretrained(model, tokenizer, tmp_path / "hf", stop_token_ids=stops)
    config = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert config.eos_token_id == want and config.pad_token_id == tokenizer.pad_token_id


def test_generation_configs_that_transformers_refuses_are_mended(model, tokenizer, tmp_path):
    model.generation_config.temperature = 0.6
    saving.save_pretrained(model, tokenizer, tmp_path / "a")
    config = GenerationConfig.from_pretrained(tmp_path / "a")
    assert (config.do_sample, config.temperature) == (True, 0.6)
    model.generation_config.num_return_sequences, model.generation_config.num_beams = 3, 2
    saving.save_pretrained(model, tokenizer, tmp_path / "b")
    assert GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == 4
    assert model.generation_config.do_sample is not True  # the model's own is left alone


def test_older_transformers_find_the_rotary_settings():
    config = {
        "rope_parameters": {"rope_theta": 5e3, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    }
    saving._portable_config(config)
    assert config["rope_theta"] == 5e3 and config["partial_rotary_factor"] == 0.5
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    tokenizer = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"]}
    saving._portable_tokenizer_config(tokenizer)
    assert tokenizer == {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<x>"]}


def test_adapters_that_changed_their_base_are_not_saved_alone(model, tokenizer, tmp_path):
    tuned = load_causal_lm(model, lora=LoRA(r=4, init="pissa", targets=["q_proj"]))
    with pytest.raises(ValueError, match="pissa"):
        saving.save_pretrained(tuned, tokenizer, tmp_path / "hf", adapter_only=True)
    with pytest.raises(ValueError, match="adapter_only"):  # the inner model still carries peft's config
        saving.save_pretrained(tuned.get_base_model(), tokenizer, tmp_path / "hf", adapter_only=True)
    assert list(tmp_path.iterdir()) == []


def shaken(model, seed=1):
    """Every trainable weight has moved."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=g)
    return model


def two_adapters(directory):
    from peft import LoraConfig

    model = shaken(load_causal_lm(directory, lora=LoRA(r=4, init="gaussian")), seed=1)
    model.add_adapter("critic", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian"))
    model.set_adapter("critic")
    return shaken(model, seed=2)


@pytest.mark.parametrize(("name", "rank"), [("default", 4), ("critic", 2)])
def test_only_the_active_adapter_is_saved_and_in_the_root(name, rank, tokenizer, tiny_model_dir, tmp_path):
    from peft import PeftModel

    tuned = two_adapters(tiny_model_dir)
    tuned.set_adapter(name)
    want = logits(tuned)
    saving.save_pretrained(tuned, tokenizer, tmp_path / "hf", adapter_only=True)
    assert not [path for path in (tmp_path / "hf").iterdir() if path.is_dir()]
    assert json.loads((tmp_path / "hf" / "adapter_config.json").read_text())["r"] == rank
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "hf")
    torch.testing.assert_close(logits(plain), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(load_causal_lm(tmp_path / "hf")), want, atol=1e-5, rtol=0)
    saving.save_pretrained(tuned, tokenizer, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), want, atol=1e-5, rtol=0)


def test_several_active_adapters_are_not_saved_as_one(tokenizer, tiny_model_dir, tmp_path):
    tuned = two_adapters(tiny_model_dir)
    tuned.base_model.set_adapter(["default", "critic"])
    with pytest.raises(ValueError, match="the active ones are 'default', 'critic'"):
        saving.save_pretrained(tuned, tokenizer, tmp_path / "hf", adapter_only=True)


def test_an_adapter_directory_is_a_model_like_any_other(tokenizer, tiny_model_dir, tmp_path, monkeypatch):
    """It can be trained on, in full or with adapters again, and those know over what they are, wherever one stands."""
    monkeypatch.chdir(tiny_model_dir.parent)
    first = shaken(load_causal_lm(tiny_model_dir.name, lora=LoRA(r=4)))
    saving.save_pretrained(first, tokenizer, tmp_path / "one", adapter_only=True)
    monkeypatch.chdir(tmp_path)
    assert not (tmp_path / "one" / "README.md").exists()  # peft's, without content
    whole = load_causal_lm(tmp_path / "one")
    assert all(p.requires_grad for p in whole.parameters()) and not hasattr(whole, "peft_config")
    second = load_causal_lm(tmp_path / "one", lora=LoRA(r=2))
    torch.testing.assert_close(logits(second), logits(first), atol=1e-5, rtol=0)
    saving.save_pretrained(shaken(second.train(), seed=3), tokenizer, tmp_path / "two", adapter_only=True)
    torch.testing.assert_close(logits(load_causal_lm(tmp_path / "two")), logits(second), atol=1e-5, rtol=0)
    assert load_config(tmp_path / "two").max_position_embeddings == 256


def test_loading_adapters_leaves_the_global_rng_alone(tokenizer, tiny_model_dir, tmp_path):
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tuned = load_causal_lm(tiny_model_dir, lora=LoRA(r=4), vocab_size=len(tokenizer))
    saving.save_pretrained(shaken(tuned), tokenizer, tmp_path / "hf", adapter_only=True)
    state = torch.get_rng_state()
    again = load_causal_lm(tmp_path / "hf")
    assert torch.equal(torch.get_rng_state(), state)
    assert load_config(tmp_path / "hf").vocab_size == again.config.vocab_size == len(tokenizer)
    torch.testing.assert_close(logits(again), logits(tuned), atol=1e-5, rtol=0)


def test_adapters_without_their_base_say_so(tokenizer, tiny_model_dir, tmp_path):
    saving.save_pretrained(
        load_causal_lm(tiny_model_dir, lora=LoRA(r=4)), tokenizer, tmp_path / "hf", adapter_only=True
    )
    file = tmp_path / "hf" / "adapter_config.json"
    settings = json.loads(file.read_text())
    for base, message in (
        (str(tmp_path / "gone"), "has adapters of '.*gone'"),
        (None, "does not name the adapters' base model"),
    ):
        file.write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        with pytest.raises(OSError, match=message):
            load_causal_lm(tmp_path / "hf")


def test_private_attention_stays_private(model, tokenizer, tmp_path):
    from lightning_rlhf.models import Policy

    policy = Policy(model)
    assert policy.layout == "tree"
    saving.save_pretrained(policy.model, tokenizer, tmp_path / "hf")
    assert "tree" not in json.dumps(json.loads((tmp_path / "hf" / "config.json").read_text()))
    assert policy.model.config._attn_implementation == "tree"
