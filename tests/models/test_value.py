"""The critic: values where they belong, from wherever it starts."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.models import LoRA, load_reward_model
from lightning_rlhf.models.value import ValueModel, is_reward_model, load_value_model

TREES = [Tree([5, 6, 7], [Branch([8, 9, 4]), Branch([10, 11])]), Tree([12], [Branch([13, 4])])]


def plain_values(model, trees, offset=0.0):
    """Of a plain classifier, one sequence at a time: before each token of a completion, and behind the last."""
    values, last = [], []
    for tree in trees:
        for branch in tree.branches:
            ids = torch.tensor([[*tree.prompt, *branch.input_ids]])
            states = model.base_model(ids).last_hidden_state[0]
            v = model.score(states)[:, 0] - offset
            values.append(v[len(tree.prompt) - 1 : -1])
            last.append(v[-1])
    return torch.cat(values), torch.stack(last)


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_a_value_is_of_the_state_before_its_token(tiny_model_dir, layout):
    classifier = load_reward_model(tiny_model_dir)
    with torch.no_grad():
        want = plain_values(classifier, TREES)
        found = ValueModel(classifier, layout)(pack(TREES))
    torch.testing.assert_close(found.values, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.last_values, want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [None, LoRA(r=4)])
@pytest.mark.parametrize("as_object", [False, True])
def test_from_a_language_model_values_are_zero_and_the_backbone_is_its(tiny_model_dir, lora, as_object):
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    rng = torch.get_rng_state()
    critic = ValueModel(load_value_model(start if as_object else tiny_model_dir, lora=lora))
    if lora is None:
        assert torch.equal(torch.get_rng_state(), rng)
    found = critic(pack(TREES))
    assert not found.values.any() and not found.last_values.any()
    states = critic.hidden(pack(TREES)).states
    want = start.base_model(torch.tensor([[5, 6, 7]])).last_hidden_state[0]
    torch.testing.assert_close(states[:3], want, rtol=1e-5, atol=1e-5)
    found.values.sum().backward()
    head = [p for name, p in critic.named_parameters() if "score" in name and p.requires_grad]
    assert head and all(p.grad is not None and p.grad.any() for p in head)


def test_from_a_reward_model_it_starts_as_the_normalized_score(tiny_model_dir, tiny_tokenizer, tmp_path):
    classifier = load_reward_model(tiny_model_dir, pad_token_id=tiny_tokenizer.pad_token_id)
    classifier.config.score_offset = 0.75
    classifier.save_pretrained(tmp_path)
    assert is_reward_model(tmp_path) and not is_reward_model(tiny_model_dir)
    found = ValueModel(load_value_model(tmp_path))(pack(TREES))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        want = plain_values(plain, TREES, 0.75)
    torch.testing.assert_close(found.values, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.last_values, want[1], rtol=1e-5, atol=1e-5)


def test_heads_are_fp32_under_autocast(tiny_model_dir):
    critic = ValueModel(load_reward_model(tiny_model_dir))
    with torch.autocast("cpu", torch.bfloat16):
        found = critic(pack(TREES))
    assert found.values.dtype == torch.float32
    states = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        from lightning_rlhf.models.reward import read_head

        inside = read_head(critic.transformer.score, states)
    assert torch.equal(inside, critic.transformer.score(states)[:, 0])


def test_an_encoder_has_no_values(tiny_model_dir):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.num_labels = 1
    with pytest.raises(ValueError, match="no 'score' head"):
        ValueModel(BertForSequenceClassification(config))
