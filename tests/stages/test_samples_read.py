"""What is read of a sample: the same text and tokens by functions, reward models, judges and samples."""

import json

import lightning.pytorch as L
import pytest
import torch
from grouping import grouped
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lightning_rlhf import PPOModule, PromptDataModule, Sampling
from lightning_rlhf.callbacks import SampleCompletions
from lightning_rlhf.data import unpack
from lightning_rlhf.data.prompts import PromptBatch
from lightning_rlhf.data.templates import turn_end
from lightning_rlhf.data.tokens import continued_ids, encode_prompt
from lightning_rlhf.models import load_reward_model
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.rewards import Reward, RewardModelReward, Scores
from lightning_rlhf.rollout import Completion
from lightning_rlhf.rollout.detokenizer import decode


class Read(Reward):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, samples):
        self.given.append(samples)
        return Scores(torch.arange(len(samples.completions), dtype=torch.float32))


def module_of(model_dir, reward, **options):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)  # transformers 4 does not know the class of 5
    module = PPOModule(str(model_dir), reward, **grouped(tokenizer=tokenizer, **options))
    module.configure_model()
    return module


def batch_of(module, prompts, as_text=False):
    asked = [p if as_text else [{"role": "user", "content": p}] for p in prompts]
    ids = [encode_prompt(module.tokenizer, p) for p in asked]
    return PromptBatch(ids, asked, tuple(range(len(ids))), {}, len(ids))


CASES = [
    ("\nUser", "the fox runs\nUser", "the fox runs"),
    ("x run", "the fox runs", "the fo"),  # begins and ends within tokens
    (" fox", "the fox", "the"),
    ("<|im_start|>", "the fox<|im_start|>", "the fox"),
    ("the", "the", ""),
]


@pytest.mark.parametrize("chat_template", ["chatml", "vicuna", "zephyr"])
@pytest.mark.parametrize("model", ["bytes", "byte fallback"])
def test_a_stop_string_ends_an_answer_the_same_for_every_reader(
    chat_template, model, tiny_model_dir, stories_model_dir, tmp_path
):
    """Function: the text before it. Reward model: the tokens of that text and the stop token, as it was trained."""
    model_dir = tiny_model_dir if model == "bytes" else stories_model_dir
    module = module_of(model_dir, Read(), chat_template=chat_template)
    tokenizer = module.tokenizer
    lead = " " if chat_template == "vicuna" else ""
    cases = [case for case in CASES if case[0] != "<|im_start|>" or "<|im_start|>" in tokenizer.get_vocab()]
    batch = batch_of(module, ["Say it", "Say more"])
    end = Completion([*tokens_behind(module, lead + "a dog"), turn_end(tokenizer)], [-1.0], "a dog", "stop")
    ends = [Completion(ids := tokens_behind(module, lead + s), [-1.0] * len(ids), cut, "stop") for _, s, cut in cases]
    experience, samples = module.to_experience(batch, [[end, *ends], [ends[0]]])
    assert samples.completions == ["a dog", *(c.text for c in ends), ends[0].text]
    sampled = [b.input_ids for tree in experience.trees for b in tree.branches]
    assert sampled == [c.input_ids for c in (end, *ends, ends[0])]  # the loss is of what was sampled
    read = [b.input_ids for tree in unpack(samples.batch) for b in tree.branches]
    assert read[0] == end.input_ids and read[1] == read[-1]
    assert all(ids[-1] == turn_end(tokenizer) for ids in read)
    texts = [decode(tokenizer, ids, batch.prompts[0]).removeprefix(lead) for ids in read]
    assert texts == samples.completions
    # a reward model that reads as the policy does, and one that gets the conversation anew, read the same
    reward = load_reward_model(str(model_dir), vocab_size=len(tokenizer), pad_token_id=0)
    save_pretrained(reward, tokenizer, tmp_path / "rm")
    same = RewardModelReward(tmp_path / "rm", tokenizer)
    same.load()
    assert same.same_tokens
    said = [
        i for i, text in enumerate(texts) if text or not lead
    ]  # of nothing, a template writes its blank all the same
    anew = [b.input_ids for tree in same._rendered(samples) for b in tree.branches]
    assert [anew[i] for i in said] == [read[i] for i in said]
    found = same(samples).total
    same.same_tokens = False
    torch.testing.assert_close(same(samples).total[said], found[said])


def tokens_behind(module, text):
    """The tokens of a text behind the generation prompt."""
    return continued_ids(module.tokenizer, text)


def test_what_stop_strings_end_is_shown_and_scored_as_in_training(tiny_model_dir, tmp_path):
    """Samples of PPO end at its stop strings, validation counts the sampled tokens, and the score is on the last."""
    reward = Read()
    sampling = Sampling(max_new_tokens=30, temperature=0.7, stop_strings=["e", "o"])
    module = PPOModule(str(tiny_model_dir), reward, **grouped(sampling=sampling, samples_per_prompt=2))
    callback = SampleCompletions(["Say it", "Say more"], max_new_tokens=30, temperature=0.7)
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, callbacks=[callback],
                        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    rows = [{"prompt": f"Say {i}"} for i in range(4)]
    trainer.fit(module, PromptDataModule(rows, batch_size=4, val_fraction=0.0, cache_dir=tmp_path / "cache"))
    shown = [json.loads(line)["completion"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert shown and not any("e" in text or "o" in text for text in shown)
    for samples in reward.given:
        texts = [decode(module.tokenizer, b.input_ids) for tree in unpack(samples.batch) for b in tree.branches]
        assert texts == samples.completions
        for tree in unpack(samples.batch):
            assert all(b.input_ids[-1] == module.stop_token_ids[0] for b in tree.branches if len(b.input_ids) < 30)


# ------------------------------------------------------------------------------------------------- plain texts


@pytest.mark.parametrize("model", ["bytes", "byte fallback"])
def test_texts_go_on_where_plain_prompts_end(model, tiny_model_dir, stories_model_dir, tmp_path):
    """What rewards and samples see is what prompt and completion are as decoded together."""
    model_dir = tiny_model_dir if model == "bytes" else stories_model_dir
    reward, callback = Read(), SampleCompletions(["Once upon a time", "The dog"], max_new_tokens=12)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    options = dict(sampling=Sampling(max_new_tokens=12), samples_per_prompt=4)
    module = PPOModule(str(model_dir), reward, **grouped(tokenizer=tokenizer, **options))
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, callbacks=[callback],
                        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    rows = [{"prompt": p} for p in ("Once upon a time", "The dog was", "One day a boy", "Mom said to")]
    data = PromptDataModule(rows, batch_size=4, val_fraction=0.0, as_text=True, cache_dir=tmp_path / "cache")
    trainer.fit(module, data)
    samples = reward.given[-1] if len(reward.given[-1].prompts) == 16 else reward.given[1]
    i = 0
    for tree in unpack(samples.batch):
        for branch in tree.branches:
            whole = tokenizer.decode([*tree.prompt, *branch.input_ids], skip_special_tokens=True)
            assert samples.prompts[i] + samples.completions[i] == whole
            i += 1
    assert i == 16 and sum(text.startswith(" ") for text in samples.completions) > (12 if model != "bytes" else -1)
    shown = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()][:2]
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    plain.generation_config.eos_token_id = list(module.stop_token_ids)
    for row in shown:
        ids = torch.tensor([encode_prompt(tokenizer, row["prompt"])])
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert row["prompt"] + row["completion"] == tokenizer.decode(out[0], skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------- rows that come again


def samples_of(model_dir, rows, iteration=3, seed=0):
    """By row, the completions of a rollout of this rank."""
    module = module_of(model_dir, Read(), sampling=Sampling(max_new_tokens=12), samples_per_prompt=2, seed=seed)
    batch = batch_of(module, ["Say it"] * len(rows))
    batch.rows = tuple(rows)
    experience, _ = module.run_rollout(batch, iteration)
    found = {}
    for row, tree in zip(rows, experience.trees, strict=True):
        found.setdefault(row, []).extend(tuple(branch.input_ids) for branch in tree.branches)
    return found


def test_a_row_that_comes_twice_gets_other_samples(tiny_model_dir):
    """The same whatever the order of the batch; those of its first time are what they would be alone."""
    found = samples_of(tiny_model_dir, [7, 5, 7, 7])
    assert len(set(found[7])) == 6 and len(set(found[5])) == 2
    assert samples_of(tiny_model_dir, [7, 7, 7, 5]) == samples_of(tiny_model_dir, [5, 7, 7, 7]) == found
    assert samples_of(tiny_model_dir, [7, 5])[7] == found[7][:2]


def test_a_row_that_comes_twice_gets_other_samples_on_any_rank(tiny_model_dir, monkeypatch):
    want = samples_of(tiny_model_dir, [5, 7, 7, 7, 9, 7])
    everyone = [(5, 7), (), (7, 7, 9), (7,)]
    found = {}
    for rank, mine in enumerate(everyone):
        monkeypatch.setattr("lightning_rlhf.stages.rl.gather_objects", lambda rows: everyone)
        monkeypatch.setattr("lightning_rlhf.stages.rl.data_rank", lambda rank=rank: rank)
        for row, its in samples_of(tiny_model_dir, list(mine)).items() if mine else ():
            found.setdefault(row, []).extend(its)
    assert found == want


def test_oversampled_rows_get_other_samples_in_a_run(tiny_model_dir, tmp_path):
    """Through the Trainer: a source of weight 3 whose rows come three times in an iteration."""
    reward = Read()
    module = PPOModule(str(tiny_model_dir), reward, **grouped(sampling=Sampling(max_new_tokens=12)))
    trainer = L.Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    source = [{"source": [{"prompt": "Say it"}, {"prompt": "Say more"}], "weight": 3.0}]
    trainer.fit(module, PromptDataModule(source, batch_size=6, val_fraction=0.0, cache_dir=tmp_path / "cache"))
    for samples in reward.given:
        assert len(samples.completions) == 6
        assert len({tuple(b.input_ids) for tree in unpack(samples.batch) for b in tree.branches}) == 6
