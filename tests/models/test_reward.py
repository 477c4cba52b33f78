"""Scores are plain transformers', however sequences are packed, and again after an export."""

import copy

import pytest
import torch
from plain import V, fill
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.models import LoRA, RewardModel, load_causal_lm, load_reward_model
from lightning_rlhf.models.reward import set_distinct_pad_token
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.utils.random import generator

BASE = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    initializer_range=0.15,
    attention_dropout=0.0,
    num_labels=1,
    pad_token_id=None,
    eos_token_id=4,
)


def classifier(family="llama", **settings):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**BASE, **settings})
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    return fill(model).eval()


def trees(seed=0, vocabulary=V):
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        size = int(torch.randint(low, high, (), generator=g))
        return torch.randint(3, vocabulary, (size,), generator=g).tolist()

    return [Tree(ids(4, 20), [Branch(ids(2, 16)) for _ in range(k)]) for k in (2, 1, 5, 2, 1)]


def sequences(rows):
    return [[*tree.prompt, *branch.input_ids] for tree in rows for branch in tree.branches]


def alone(model, rows):
    """Plain transformers, one sequence a batch: nothing to pad, nothing to mix up."""
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[:, 0] for ids in sequences(rows)])


def gradient(scores, model):
    model.zero_grad()
    (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_scores_equal_plain_transformers():
    """test_families.py has the other families."""
    rows, plain = trees(), classifier()
    want = alone(plain, rows)
    reward_model = RewardModel(classifier())
    got = reward_model(pack(rows))
    assert got.dtype == torch.float32 and got.std() > 0.05
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    gradients = [gradient(got, reward_model.model), gradient(want, plain)]
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-5


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_neighbors_order_and_padding_change_no_score(layout):
    rows, reward_model = trees(), RewardModel(classifier(), layout)
    with torch.no_grad():
        together = reward_model(pack(rows)).split([len(tree.branches) for tree in rows])
        lone = [reward_model(pack([tree])) for tree in rows]
        turned = reward_model(pack(rows[::-1])).split([len(tree.branches) for tree in rows[::-1]])[::-1]
        apart = [
            torch.cat([reward_model(pack([Tree(tree.prompt, [branch])])) for branch in tree.branches]) for tree in rows
        ]
        long = Tree([5] * 60, [Branch([6] * 60), Branch([7])])
        crowded = reward_model(pack([long, *rows]))[2:].split([len(tree.branches) for tree in rows])
    for scores in (lone, turned, apart, crowded):
        torch.testing.assert_close(torch.cat(scores), torch.cat(together), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("pad", [0, 4, 9], ids=["unseen", "eos", "in the text"])
def test_the_last_token_is_read_by_its_place(layout, pad):
    """A pad id at the end, or in the middle, of an answer, and after it."""
    rows = [
        Tree([11, pad, 12], [Branch([13, 14, pad]), Branch([pad]), Branch([15, pad, pad]), Branch([pad, 16])]),
        Tree([17], [Branch([18, 19, 20, 21, 22, 4])]),
    ]
    want = alone(classifier(), rows)  # without a pad id plain transformers reads the last column
    model = classifier()
    model.config.pad_token_id = pad
    got = RewardModel(model, layout)(pack(rows))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    early = alone(classifier(), [Tree([11, pad, 12], [Branch([13, 14])])])
    assert (got[0] - early[0]).abs() > 1e-3  # the token before the last has another score


def test_an_encoder_runs_whole_and_padded():
    rows = trees()
    bert = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    plain = classifier("bert", pad_token_id=0, **bert)
    reward_model = RewardModel(classifier("bert", pad_token_id=0, **bert))
    assert reward_model.layout == "padded" and not reward_model.reads_last
    want, got = alone(plain, rows), reward_model(pack(rows))
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    gradients = [gradient(got, reward_model.model), gradient(want, plain)]
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-5
    with pytest.raises(ValueError, match="BertForSequenceClassification has no 'score' head"):
        RewardModel(plain, "tree")


# ------------------------------------------------------------------------------------------------- loading


def test_a_new_head_is_small_seeded_and_leaves_the_global_rng_alone(tmp_path):
    wide = LlamaConfig(
        vocab_size=8, hidden_size=4096, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    torch.manual_seed(0)
    LlamaForCausalLM(wide).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    heads = [load_reward_model(tmp_path, seed=seed).score for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (head.weight for head in heads)
    assert first.shape == (1, 4096) and heads[0].bias is None
    assert torch.equal(first, same) and not torch.equal(first, other)
    # of 4096 draws the standard deviation has a standard error of 1.1 %, the mean one of a 64th of it
    for weight in (first, other):
        assert weight.std().item() * 4097**0.5 == pytest.approx(1, abs=0.05)
        assert weight.mean().item() * 4097**0.5 == pytest.approx(0, abs=0.07)
        assert 0.64 < (weight.abs() < 4097**-0.5).float().mean() < 0.73  # normal: 0.683


def test_the_scale_of_a_new_head_counts_one_more_than_the_width(tiny_model_dir):
    weight = load_reward_model(tiny_model_dir, seed=3).score.weight
    standard = torch.empty(1, 32).normal_(generator=generator(3))
    torch.testing.assert_close(weight.data, standard / 33**0.5, rtol=1e-6, atol=0)


def test_from_a_causal_lm_the_body_is_its_own(tiny_model_dir):
    model = load_reward_model(tiny_model_dir, pad_token_id=0)
    body = AutoModelForCausalLM.from_pretrained(tiny_model_dir).model.state_dict()
    assert model.training and model.config.num_labels == 1 and model.config.pad_token_id == 0
    assert all(torch.equal(value, body[name]) for name, value in model.model.state_dict().items())
    rows = trees(vocabulary=300)
    want = alone(copy.deepcopy(model).eval(), rows)
    torch.testing.assert_close(RewardModel(model)(pack(rows)), want, atol=1e-5, rtol=0)


def test_from_a_classifier_the_head_is_its_own(tmp_path):
    plain = classifier(pad_token_id=0)
    plain.save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, seed=5)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert load_reward_model(plain) is plain


@pytest.mark.parametrize("labels", [2, 3])
def test_several_labels_are_refused(labels, tmp_path):
    plain = classifier(num_labels=labels)
    plain.save_pretrained(tmp_path)
    for source in (tmp_path, plain):
        with pytest.raises(ValueError, match=f"classifier with {labels} labels"):
            load_reward_model(source)


@pytest.mark.parametrize("lora", [None, LoRA(r=4)], ids=["full", "lora"])
def test_bfloat16_weights_keep_an_fp32_head(lora, tiny_model_dir):
    model = load_reward_model(tiny_model_dir, dtype="bfloat16", lora=lora, pad_token_id=0)
    reward_model = RewardModel(model)
    assert {p.dtype for p in reward_model.transformer.score.parameters()} == {torch.float32}
    assert reward_model.transformer.model.embed_tokens.weight.dtype == torch.bfloat16
    batch = pack(trees(vocabulary=300))
    scores = reward_model(batch)
    assert scores.dtype == torch.float32
    with torch.no_grad():
        want = RewardModel(load_reward_model(tiny_model_dir))(batch)
    assert (scores - want).norm() / want.norm() < 0.1
    scores.sum().backward()


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_lora_trains_the_head_and_nothing_else_of_the_base(init, tiny_model_dir):
    model = load_reward_model(tiny_model_dir, lora=LoRA(r=4, targets=["q_proj"], init=init))
    reward_model = RewardModel(model)
    assert reward_model.layout == "tree"
    trained = {name for name, p in reward_model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "score" in name for name in trained)
    gradient(reward_model(pack(trees(vocabulary=300))), reward_model.model)
    with_gradient = {name for name, p in reward_model.named_parameters() if p.grad is not None}
    assert with_gradient == trained and sum("score" in name for name in trained) == 1


@pytest.mark.parametrize("lora", [None, LoRA(r=4, init="gaussian")], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(lora, tiny_model_dir):
    batch, gradients = pack(trees(vocabulary=300)), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = load_reward_model(tiny_model_dir, lora=lora, gradient_checkpointing=checkpointing)
        reward_model = RewardModel(model, "tree")
        gradients.append(gradient(reward_model(batch), reward_model.model))
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-6


# ------------------------------------------------------------------------------------------------- tokenizers


def bare_tokenizer():
    """Bytes and one special token: nothing there could pad."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", bos_token="</s>")


def test_a_distinct_pad_token_stays(tiny_tokenizer):
    before = len(tiny_tokenizer)
    set_distinct_pad_token(tiny_tokenizer, [tiny_tokenizer.eos_token_id])
    assert tiny_tokenizer.pad_token == "</s>" and len(tiny_tokenizer) == before


@pytest.mark.parametrize("pad", ["<|im_end|>", None], ids=["eos", "none"])
def test_an_unused_special_token_serves(pad, tiny_tokenizer):
    tiny_tokenizer.pad_token = pad
    before = len(tiny_tokenizer)
    set_distinct_pad_token(tiny_tokenizer, [tiny_tokenizer.eos_token_id])
    assert tiny_tokenizer.pad_token == "<unk>" and len(tiny_tokenizer) == before


def test_no_stop_token_pads(tiny_tokenizer):
    """</s> pads and is not eos, but stops answers too; so do <unk> and <s>."""
    stops = tiny_tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>", "<unk>", "<s>"])
    set_distinct_pad_token(tiny_tokenizer, stops)
    assert tiny_tokenizer.pad_token_id not in stops


def test_no_token_of_the_template_pads(tiny_tokenizer):
    """Prompts hold it, and who makes masks of ids would leave it out: <|im_start|> is the first that stops nothing."""
    stops = tiny_tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>", "<unk>", "<s>"])
    set_distinct_pad_token(tiny_tokenizer, stops)
    assert tiny_tokenizer.pad_token == "<|pad|>"
    tiny_tokenizer.pad_token = None
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    set_distinct_pad_token(tiny_tokenizer, stops)
    assert tiny_tokenizer.pad_token == "<|im_start|>"


def test_a_pad_token_is_added_where_none_serves_and_embeddings_grow(bare_dir):
    tokenizer = AutoTokenizer.from_pretrained(bare_dir)
    before = len(tokenizer)
    set_distinct_pad_token(tokenizer, [tokenizer.eos_token_id])
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id == before == len(tokenizer) - 1
    old = AutoModelForCausalLM.from_pretrained(bare_dir).get_input_embeddings().weight
    model = load_reward_model(bare_dir, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == before + 1
    assert torch.equal(model.get_input_embeddings().weight[:before], old)
    assert model.config.pad_token_id == before


# ------------------------------------------------------------------------------------------------- export


@pytest.fixture
def bare_dir(tmp_path):
    tokenizer = bare_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


@pytest.fixture
def padless_dir(tiny_model_dir, tmp_path):
    """The tiny model, its tokenizer padding with eos as many published ones do; <unk> is there to serve."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "padless")
    tokenizer.save_pretrained(tmp_path / "padless")
    return tmp_path / "padless"


def trained(directory, lora=None, dtype="float32"):
    """A reward model whose every trainable weight has moved, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    set_distinct_pad_token(tokenizer, [tokenizer.eos_token_id])
    model = load_reward_model(
        directory, lora=lora, dtype=dtype, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=g).to(p.dtype)
    reward_model = RewardModel(model).eval()
    reward_model.score_offset = 0.75
    return reward_model, tokenizer


def answers(tokenizer):
    """Answers of unequal length that end with eos; one holds it twice."""
    end = tokenizer.eos_token
    texts = ["fine, thank you!" + end, "Paris" + end + end, "the quick brown fox jumps" + end, end]
    return [
        Tree(tokenizer(prompt)["input_ids"], [Branch(tokenizer(text)["input_ids"]) for text in texts[i:]])
        for i, prompt in enumerate(["Hello, how are you?", "capital", "user: " * 5])
    ]


def plain_scores(model, tokenizer, rows, side):
    tokenizer.padding_side = side
    batch = tokenizer.pad({"input_ids": sequences(rows)}, return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0]


LORA = LoRA(r=4, init="gaussian")


@pytest.mark.parametrize("source", ["padless_dir", "bare_dir"], ids=["pad serves", "pad added"])
@pytest.mark.parametrize("kind", ["full", "merged", "adapter"])
def test_an_export_scores_the_same_in_plain_transformers(kind, source, request, tmp_path):
    original = request.getfixturevalue(source)
    reward_model, tokenizer = trained(original, lora=None if kind == "full" else LORA)
    rows, out = answers(tokenizer), tmp_path / "out"
    batch = pack(rows)
    with torch.no_grad():
        want = reward_model(batch)
        torch.testing.assert_close(reward_model(batch, normalize=True), want - 0.75, atol=1e-6, rtol=0)
    save_pretrained(reward_model.model, tokenizer, out, adapter_only=kind == "adapter")
    with torch.no_grad():
        assert torch.equal(reward_model(batch), want)  # the export left it as it was

    again = AutoTokenizer.from_pretrained(out)
    assert again.pad_token_id == tokenizer.pad_token_id != again.eos_token_id
    assert sequences(answers(again)) == sequences(rows)
    if kind == "adapter":
        from peft import PeftModel

        base = AutoModelForSequenceClassification.from_pretrained(original, num_labels=1)
        base.resize_token_embeddings(len(again))
        base.config.pad_token_id = again.pad_token_id
        plain = PeftModel.from_pretrained(base, out)
    else:
        assert AutoConfig.from_pretrained(out).score_offset == 0.75
        plain = AutoModelForSequenceClassification.from_pretrained(out)
        loaded = RewardModel(load_reward_model(out)).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(batch, normalize=True), want - 0.75, atol=1e-5, rtol=0)
    for side in ("right", "left"):
        torch.testing.assert_close(plain_scores(plain, again, rows, side), want, atol=1e-5, rtol=0)
    plain.config.pad_token_id = again.eos_token_id  # what would have been, had nobody cared
    assert (plain_scores(plain, again, rows, "right") - want).abs().min() > 1e-4


@pytest.mark.parametrize("source", ["padless_dir", "bare_dir"], ids=["pad serves", "pad added"])
def test_an_adapter_directory_is_the_reward_model_again(source, request, tmp_path):
    original = request.getfixturevalue(source)
    reward_model, tokenizer = trained(original, lora=LORA)
    save_pretrained(reward_model.model, tokenizer, tmp_path / "out", adapter_only=True)
    batch = pack(answers(tokenizer))
    for lora in (None, LoRA(r=2)):
        state = torch.get_rng_state()
        model = load_reward_model(tmp_path / "out", lora=lora, seed=7, needs_head=True)
        assert lora is not None or torch.equal(torch.get_rng_state(), state)
        again = RewardModel(model).eval()
        assert again.score_offset == 0.75 and again.transformer.config.pad_token_id == tokenizer.pad_token_id
        with torch.no_grad():
            torch.testing.assert_close(again(batch), reward_model(batch), atol=1e-5, rtol=0)
            want = reward_model(batch, normalize=True)
            torch.testing.assert_close(again(batch, normalize=True), want, atol=1e-5, rtol=0)


def test_plain_peft_loads_an_adapter_directory_without_a_word(padless_dir, tmp_path, recwarn, caplog):
    from peft import AutoPeftModelForSequenceClassification, PeftModel

    reward_model, tokenizer = trained(padless_dir, lora=LORA)
    save_pretrained(reward_model.model, tokenizer, tmp_path / "out", adapter_only=True)
    base = AutoModelForSequenceClassification.from_pretrained(padless_dir, num_labels=1)
    base.config.pad_token_id = tokenizer.pad_token_id  # nothing in peft's format says so
    recwarn.clear()
    caplog.clear()
    plain = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    # peft itself asks transformers by a name that goes away
    assert not [w for w in recwarn.list if "is_gradient_checkpointing" not in str(w.message)] and not caplog.records
    with torch.no_grad():
        want = reward_model(pack(answers(tokenizer)))
        torch.testing.assert_close(alone(plain, answers(tokenizer)), want, atol=1e-5, rtol=0)
        auto = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1).eval()
        auto.config.pad_token_id = tokenizer.pad_token_id
        torch.testing.assert_close(alone(auto, answers(tokenizer)), want, atol=1e-5, rtol=0)


def test_from_a_language_models_adapters_the_body_is_adapted_and_the_head_new(tiny_model_dir, tmp_path):
    tuned = load_causal_lm(tiny_model_dir, lora=LoRA(r=4, init="gaussian"))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.fill_(0.05)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    save_pretrained(tuned, tokenizer, tmp_path / "sft", adapter_only=True)
    save_pretrained(tuned, tokenizer, tmp_path / "merged")
    rows = pack(trees(vocabulary=300))
    with torch.no_grad():
        got, want, base = (
            RewardModel(load_reward_model(source, seed=3)).eval()(rows)
            for source in (tmp_path / "sft", tmp_path / "merged", tiny_model_dir)
        )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (got - base).abs().max() > 1e-3
    for source in (tmp_path / "sft", tmp_path / "merged", tiny_model_dir):
        with pytest.raises(ValueError, match=r"not a reward model.*score\.weight"):
            load_reward_model(source, needs_head=True)


def test_an_encoder_with_adapters_is_exported_with_its_head(tiny_tokenizer, tmp_path):
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    settings = dict(vocab_size=len(tiny_tokenizer), initializer_range=0.05)  # larger weights only round more
    classifier("bert", **settings, **dropout).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    reward_model, tokenizer = trained(tmp_path / "bert", lora=LORA)
    rows = answers(tokenizer)
    with torch.no_grad():
        want = reward_model(pack(rows))
    save_pretrained(reward_model.model, tokenizer, tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(plain_scores(plain, again, rows, "right"), want, atol=1e-5, rtol=0)
    assert plain.config.score_offset == 0.75


def test_a_bfloat16_export_loads_and_scores_alike(padless_dir, tmp_path):
    reward_model, tokenizer = trained(padless_dir, dtype="bfloat16")
    rows = answers(tokenizer)
    save_pretrained(reward_model.model, tokenizer, tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    got = plain_scores(plain, AutoTokenizer.from_pretrained(tmp_path / "out"), rows, "right").float()
    with torch.no_grad():
        want = reward_model(pack(rows))
    assert (got - want).norm() / want.norm() < 0.05


def test_a_continued_run_starts_from_the_exported_head(padless_dir, tmp_path):
    reward_model, tokenizer = trained(padless_dir)
    save_pretrained(reward_model.model, tokenizer, tmp_path / "out")
    tuned = load_reward_model(tmp_path / "out", lora=LoRA(r=4), seed=9)
    with torch.no_grad():
        want = reward_model(pack(answers(tokenizer)))
        got = RewardModel(tuned).eval()(pack(answers(tokenizer)))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert RewardModel(tuned).score_offset == 0.75


def test_an_unmeasured_offset_is_zero(tiny_model_dir):
    reward_model = RewardModel(load_reward_model(tiny_model_dir)).eval()
    batch = pack(trees(vocabulary=300))
    assert reward_model.score_offset == 0.0
    assert torch.equal(reward_model(batch, normalize=True), reward_model(batch))
