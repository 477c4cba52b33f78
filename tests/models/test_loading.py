"""Adapters: their names are checked, settings stay as they were, and rows of new tokens are trained in every family."""

import pytest
import torch
from peft import PeftModel
from plain import V
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_rlhf.models import LoRA, Policy, load_causal_lm, load_reward_model
from lightning_rlhf.models.loading import grow_embeddings
from lightning_rlhf.models.saving import save_pretrained

IDS = torch.tensor([[5, 6, V, 7, 8, V + 1, 9]])


def build(family, auto=AutoModelForCausalLM, **settings):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    return auto.from_config(config)


@pytest.mark.parametrize("field", ["targets", "modules_to_save"])
def test_a_name_that_matches_no_layer_is_refused_with_those_near_it(field):
    """peft passes over it where another name matches."""
    names = {"targets": ["q_proj", "v_porj"], "modules_to_save": ["lm_haed"]}[field]
    near = {"targets": "v_proj", "modules_to_save": "lm_head"}[field]
    with pytest.raises(
        ValueError, match=rf"lora.{field}: '.*' matches no layer of LlamaForCausalLM; did you mean .*{near}"
    ):
        load_causal_lm(build("llama"), lora=LoRA(**{field: names}))


def test_the_lists_that_the_user_gave_stay_as_they_are():
    """peft adds a classifier's head to the list that it gets."""
    targets, saved = ["q_proj"], ["embed_tokens"]
    lora = LoRA(targets=targets, modules_to_save=saved)
    for model in (build("llama"), build("llama", AutoModelForSequenceClassification, num_labels=1)):
        made = lora.wrap(model, [3])
        config = made.peft_config["default"]
        config.target_modules.add("v_proj")
        config.modules_to_save.append("lm_head")
    assert (targets, saved) == (["q_proj"], ["embed_tokens"])
    assert (lora.targets, lora.modules_to_save) == (["q_proj"], ["embed_tokens"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_rows_are_trained_in_fp32_and_exported(family, tied, dtype, tmp_path):
    """Also where embeddings are scaled or a head has a bias, which peft's rows know only in part."""
    build(family, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = load_causal_lm(tmp_path / "base", dtype=dtype, lora=LoRA(r=2), vocab_size=V + 2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    embeddings, head = (m for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    before = [layer.weight.detach().clone() for layer in (embeddings, head)]
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, old in zip((embeddings, head), before, strict=True):
        moved = (layer.weight - old).float().abs().amax(1)
        assert moved[V] > 0 and moved[V + 1] > 0
    if dtype != "float32":
        return  # rounded differently
    model.eval()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        tokenizer = FakeTokenizer()
        for only in (False, True):
            save_pretrained(model, tokenizer, tmp_path / str(only), adapter_only=only)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(V + 2, mean_resizing=False)
        for found in (
            AutoModelForCausalLM.from_pretrained(tmp_path / "False"),
            load_causal_lm(tmp_path / "True"),
            PeftModel.from_pretrained(base, tmp_path / "True"),
        ):
            torch.testing.assert_close(found.eval()(input_ids=IDS).logits, want, atol=1e-5, rtol=0)
    Policy(model)  # reads the head as it acts, or says so


class FakeTokenizer:
    """What saving asks of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def save_pretrained(self, folder):
        (folder / "tokenizer_config.json").write_text("{}")


@pytest.mark.parametrize(
    "lora",
    [
        LoRA(r=2, targets=["q_proj", "lm_head"]),
        LoRA(r=2, targets=["q_proj", "embed_tokens"]),
        LoRA(r=2, modules_to_save=["lm_head"]),
        LoRA(r=2, modules_to_save=["embed_tokens"]),
    ],
    ids=["adapted head", "adapted embeddings", "saved head", "saved embeddings"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_trained_beside_what_the_user_adapts(lora, tied):
    model = load_causal_lm(build("llama", tie_word_embeddings=tied), lora=lora, vocab_size=V + 2)
    policy = Policy(model)  # the head acts as it is read
    out = policy.model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    for p in model.parameters():
        if p.grad is not None:
            p.data -= p.grad
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    for layer in (embeddings, head):
        assert any(p.requires_grad and p.grad is not None for p in layer.parameters()), layer


def test_new_rows_are_the_same_wherever_a_model_grows_and_leave_the_rng_alone():
    models = []
    for seed in (1, 2):
        models.append(build("llama"))
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        assert grow_embeddings(models[-1], V + 2) == range(V, V + 2)
        assert torch.equal(torch.get_rng_state(), state)
        assert grow_embeddings(models[-1], V) == range(0)
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)
    new = models[0].lm_head.weight[V:]
    assert not torch.equal(new[0], new[1])


def test_tokens_that_the_embeddings_had_room_for_are_trained_too():
    """Embeddings are often larger than the vocabulary: its new tokens fall on rows that were never trained."""
    model = load_causal_lm(build("llama"), lora=LoRA(r=2), vocab_size=V - 4, new_tokens=[V - 5])
    assert model.peft_config["default"].trainable_token_indices["model.embed_tokens"] == [V - 5]


def test_a_classifier_has_no_rows_of_its_pad_token():
    model = load_reward_model(
        build("llama", AutoModelForSequenceClassification, num_labels=1),
        lora=LoRA(r=2),
        vocab_size=V + 2,
        pad_token_id=V + 1,
    )
    assert model.peft_config["default"].trainable_token_indices == {"model.embed_tokens": [V]}
