"""What ends an answer: in training, in rollouts, in samples, and in the files that a run leaves."""

import json

import lightning.pytorch as L
import pytest
import torch
from grouping import grouped
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lightning_rlhf import HFExport, InstructionDataModule, LoRA, PPOModule, RewardModule, Sampling, SFTModule
from lightning_rlhf.callbacks import SampleCompletions
from lightning_rlhf.evaluation import generate_answers
from lightning_rlhf.models import Policy, load_causal_lm
from lightning_rlhf.models.loading import load_stop_token_ids
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.rollout import CachedEngine, HFGenerateEngine, Request

ROWS = [{"prompt": f"Say {i}", "completion": f"fox {i}"} for i in range(4)]
# a template of the user's own that ends turns with a token of the vocabulary that is not the eos
FILE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '<|im_start|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def base(tiny_model_dir, tmp_path_factory):
    """Its generation config has stop tokens that neither config nor tokenizer name; its eos is <|im_end|>, token 4."""
    path = tmp_path_factory.mktemp("base")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.generation_config.eos_token_id = [2, 100, 13]
    with torch.no_grad():  # uneven, so that greedy answers differ
        model.lm_head.weight.mul_(20)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(path)
    return path


def quiet(tmp_path, **options):
    settings = dict(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                    enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    return L.Trainer(**{**settings, **options})


def listed(ids):
    return ids if isinstance(ids, list) else [ids]


def written(folder, name):
    return listed(json.loads((folder / name).read_text())["eos_token_id"])


@pytest.fixture
def template(request, tmp_path):
    if request.param != "a file":
        return request.param
    (tmp_path / "own.jinja").write_text(FILE)
    return str(tmp_path / "own.jinja")


@pytest.mark.parametrize(
    ("template", "lora", "adapter_only", "first"),
    [(None, None, False, "<|im_end|>"), ("llama3", None, False, "<|eot_id|>"), ("a file", None, False, "<|im_start|>"),
     ("llama3", LoRA(r=2, modules_to_save=["embed_tokens", "lm_head"]), False, "<|eot_id|>"),
     ("a file", LoRA(r=2), True, "<|im_start|>")],
    indirect=["template"],
)  # fmt: skip
def test_an_export_stops_where_the_model_did_and_where_turns_end(template, lora, adapter_only, first, base, tmp_path):
    """Config, generation config and tokenizer agree, and none is lost: also in the next run, which starts there."""
    module = SFTModule(str(base), chat_template=template, lora=lora)
    data = InstructionDataModule(ROWS, batch_size=4, val_fraction=0.0, cache_dir=tmp_path / "cache")
    export = HFExport(tmp_path / "hf", when="end", adapter_only=adapter_only)
    quiet(tmp_path, callbacks=[export]).fit(module, data)
    left = tmp_path / "hf" / "last"
    tokenizer = AutoTokenizer.from_pretrained(left)
    assert tokenizer.eos_token == first
    end = tokenizer.eos_token_id
    assert module.stop_token_ids[0] == end and set(module.stop_token_ids) == {end, 4, 2, 100, 13}
    assert written(left, "generation_config.json") == list(module.stop_token_ids)
    if not adapter_only:
        assert written(left, "config.json") == list(module.stop_token_ids)
        plain = AutoModelForCausalLM.from_pretrained(left)
        assert listed(plain.config.eos_token_id) == listed(plain.generation_config.eos_token_id)
        ends_like(plain, tokenizer, module.stop_token_ids)
    again = SFTModule(str(left))
    assert again.stop_token_ids == module.stop_token_ids
    save_pretrained(load_causal_lm(str(left)), tokenizer, tmp_path / "by hand")
    for name in ("generation_config.json", "config.json"):
        assert written(tmp_path / "by hand", name)[0] == end
        assert set(written(tmp_path / "by hand", name)) == set(module.stop_token_ids)


def ends_like(model, tokenizer, stops):
    """Plain ``generate`` ends at the first of them, whichever it is."""
    torch.manual_seed(0)
    ids = torch.tensor([[5, 6]]).repeat(64, 1)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=200)
    ends = set()
    for row in out[:, 2:].tolist():
        at = next((i for i, token in enumerate(row) if token in stops), len(row))
        assert set(row[at + 1 :]) <= {tokenizer.pad_token_id}
        ends.update(row[at : at + 1])
    assert ends == set(stops)


def test_stop_tokens_are_read_without_weights(base, tmp_path, tiny_tokenizer):
    """Of a directory, a model, adapters with and without settings of their own, and where there is only a config."""
    want = (2, 100, 13, 4)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert load_stop_token_ids(base) == load_stop_token_ids(model) == want
    tuned = load_causal_lm(str(base), lora=LoRA(r=2))
    save_pretrained(tuned, tiny_tokenizer, tmp_path / "ours", adapter_only=True, stop_token_ids=(50,))
    tuned.save_pretrained(tmp_path / "theirs")
    for path in [*base.iterdir()]:
        if "safetensors" in path.name:
            path.rename(tmp_path / path.name)
    try:
        assert load_stop_token_ids(base) == load_stop_token_ids(str(tmp_path / "theirs")) == want
        assert load_stop_token_ids(tmp_path / "ours") == (50, 4, 2, 100, 13)
        assert SFTModule(str(base)).stop_token_ids == (4, 2, 100, 13)
        (tmp_path / "old").mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "old" / name).write_bytes((base / name).read_bytes())
        assert load_stop_token_ids(tmp_path / "old") == (4,)
    finally:
        for path in tmp_path.glob("*.safetensors"):
            path.rename(base / path.name)
    assert SFTModule(model, tokenizer=tiny_tokenizer).stop_token_ids == (4, 2, 100, 13)


def test_the_loss_reads_a_models_own_stop_token_where_the_template_ends_a_turn_with_it(base, tmp_path):
    """As models do that end a call of a tool otherwise than an answer; what a short conversation shows is not all."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{{ '</s>' if m['content'].startswith('call') else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    (tmp_path / "own.jinja").write_text(template)
    module = SFTModule(str(base), chat_template=str(tmp_path / "own.jinja"))
    rows = [{"prompt": "fox", "completion": "call fox"}, {"prompt": "fox", "completion": "dog"}]
    data = InstructionDataModule(rows, batch_size=2, val_fraction=0.0, cache_dir=tmp_path / "cache")
    seen = []

    class Seen(SFTModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    module.__class__ = Seen
    quiet(tmp_path).fit(module, data)
    last = {seen[0].target[seen[0].sequence == i][-1].item() for i in range(2)}
    assert last == {2, 4}
    assert (seen[0].target == 4).sum() == 1  # no second end behind the call's


def first_stop(completion, stops):
    return next((i for i, token in enumerate(completion.input_ids) if token in stops), None)


def test_every_stop_token_ends_rollouts_samples_and_answers(base, tmp_path):
    """The same in a rollout, a sample, a judged answer and ``generate``."""
    sampling = Sampling(max_new_tokens=120, temperature=1.5)
    module = PPOModule(str(base), lambda prompts, completions: [1.0] * len(completions), **grouped(sampling=sampling))
    module.configure_model()
    prompts = [f"Say {i}" for i in range(24)]
    found = module.generate(prompts, seed=3)
    stops = set(module.stop_token_ids)
    ends = {c.input_ids[-1] for c in found if not c.truncated}
    assert {2, 100, 13} & ends
    for completion in found:
        at = first_stop(completion, stops)
        assert completion.truncated == (at is None)
        assert at in (None, len(completion.input_ids) - 1)
    answers = dict(
        generate_answers(base, {i: [{"role": "user", "content": p}] for i, p in enumerate(prompts)}, sampling, 3)
    )
    assert [answers[i].text for i in range(24)] == [c.text for c in found]
    assert [answers[i].truncated for i in range(24)] == [c.truncated for c in found]
    callback = SampleCompletions(prompts, max_new_tokens=120, temperature=1.5, seed=3)
    sft = SFTModule(str(base), optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    data = InstructionDataModule(ROWS, batch_size=4, val_fraction=0.0, cache_dir=tmp_path / "cache")
    quiet(tmp_path, callbacks=[callback]).fit(sft, data)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert sum(row["ended"] for row in rows) > 24  # of 48: more than one token of 400 ends them


@pytest.mark.parametrize("stop", ["<s>", '"<s>'])
def test_a_special_token_as_a_stop_string_ends_a_rollout(stop, stories_model_dir):
    """The text has neither it nor what decoding leaves out anyway; both engines alike."""
    path = stories_model_dir
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), PreTrainedTokenizerFast.from_pretrained(path)
    prompt = tokenizer("Once upon a time").input_ids
    sampling = Sampling(max_new_tokens=400, temperature=0, stop_strings=[stop])
    for engine in (CachedEngine(), HFGenerateEngine()):
        [[found]] = engine.generate(Policy(model), tokenizer, [Request(prompt, [0])], sampling, [])
        assert found.finish_reason == "stop" and found.input_ids.index(1) == len(found.input_ids) - 1
        whole = tokenizer.decode([*prompt, *found.input_ids], skip_special_tokens=True)
        assert "Once upon a time" + found.text == (whole if stop == "<s>" else whole.removesuffix('"'))


def test_generate_answers_as_plain_transformers(tiny_model_dir):
    """Messages, user turns and plain texts, one or several; greedy unless it is said otherwise."""
    module = SFTModule(str(tiny_model_dir))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)

    def plain(prompt, **options):
        if isinstance(prompt, list):
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)[0, ids.shape[1] :]
        return out.tolist(), tokenizer.decode(out, skip_special_tokens=True)

    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "fox"}]
    found = module.generate(["fox", turns])
    wants = [plain(turns[1:], max_new_tokens=128), plain(turns, max_new_tokens=128)]
    assert [(c.input_ids, c.text) for c in found] == wants
    assert module.generate("fox")[0].text == found[0].text and module.generate(turns)[0].text == found[1].text
    [text] = module.generate("the quick", Sampling(9, temperature=0.0), as_text=True)
    assert (text.input_ids, text.text) == plain("the quick", max_new_tokens=9)
    assert module.policy.model.training
    sampling = Sampling(max_new_tokens=9)
    drawn = [module.generate(["fox"], sampling, seed=seed)[0].input_ids for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_is_refused_in_words(tiny_model_dir):
    with pytest.raises(ValueError, match=r"Prompt 1 has \d+ tokens and fills the model's context"):
        SFTModule(str(tiny_model_dir)).generate(["fox", "fox " * 500])
    with pytest.raises(ValueError, match="RewardModule: LlamaForSequenceClassification can't generate"):
        RewardModule(str(tiny_model_dir)).generate("fox")


def test_an_exported_reward_models_pad_token_ends_no_answer(tiny_model_dir, tmp_path):
    """transformers' classifiers read the last token that is no pad token: never a stop token of the language model."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model.generation_config.eos_token_id = [4, 2]  # </s> is the pad token
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    module = RewardModule(str(tmp_path / "base"))
    assert module.stop_token_ids == (4, 2) and module.tokenizer.pad_token_id not in (4, 2)
    module.configure_model()
    save_pretrained(module.reward_model.model, module.tokenizer, tmp_path / "rm", stop_token_ids=module.stop_token_ids)
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert config["eos_token_id"] == [4, 2] and config["pad_token_id"] == module.tokenizer.pad_token_id


def test_stop_tokens_beyond_the_vocabulary_are_no_error(tiny_model_dir, tmp_path):
    """As in configs that keep a family's default beside a vocabulary of their own."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.generation_config.eos_token_id = [4, 50256, -1]
    module = SFTModule(model, tokenizer=AutoTokenizer.from_pretrained(tiny_model_dir))
    assert module.stop_token_ids == (4,)
    [found] = module.generate("fox", Sampling(max_new_tokens=4, min_new_tokens=3, temperature=1.0))
    assert len(found.input_ids) >= 3
