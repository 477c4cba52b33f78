"""Tokens that a chat template brings: their rows are trained beside adapters, begin alike everywhere, and are kept."""

import lightning.pytorch as L
import pytest
import torch
from grouping import grouped
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from lightning_rlhf import (
    HFExport,
    InstructionDataModule,
    LoRA,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    SFTModule,
)
from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.models import RewardModel, load_reward_model
from lightning_rlhf.models.saving import save_pretrained

QUESTIONS = {"Who are you?": "A model.", "What is red?": "An apple.", "Where is Tim?": "In the park.", "Count": "One."}
ROWS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in QUESTIONS.items()
]
STAGES = ("sft", "reward", "ppo")


@pytest.fixture(scope="module")
def folders(tiny_model_dir, tmp_path_factory):
    """The tiny model with a head of its own and with one tied to its embeddings; llama3 adds three tokens to it."""
    found = {}
    for tied in (False, True):
        found[tied] = tmp_path_factory.mktemp(f"tied-{tied}")
        model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(found[tied])
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(found[tied])
    return found


def vowels(prompts, completions):
    return [float(sum(c.count(v) for v in "aeiou")) for c in completions]


def stage(name, folder, lora=True, template="llama3", lr=3e-3, **options):
    def adam(params):
        return torch.optim.AdamW(params, lr=lr)

    adapters = LoRA(r=4) if lora else None
    common = dict(chat_template=template, lora=adapters, optimizer=adam, **options)
    cache = str(folder) + "-cache"
    if name == "sft":
        data = InstructionDataModule(ROWS, batch_size=2, max_length=256, val_fraction=0.0, cache_dir=cache)
        return SFTModule(folder, **grouped(**common)), data
    if name == "reward":
        pairs = [{"prompt": q, "chosen": a, "rejected": "No."} for q, a in QUESTIONS.items()]
        data = PreferenceDataModule(pairs, batch_size=2, max_length=256, val_fraction=0.0, cache_dir=cache)
        return RewardModule(folder, **grouped(**common)), data
    common = {"reward": vowels, "sampling": Sampling(max_new_tokens=6), "epochs": 1, **common}
    data = PromptDataModule([{"prompt": q} for q in QUESTIONS], batch_size=2, val_fraction=0.0, cache_dir=cache)
    return PPOModule(folder, **grouped(**common)), data


def fit(module, data, steps, out, callbacks=(), ckpt=None):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        max_steps=steps,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    trainer.fit(module, data, ckpt_path=ckpt)
    return trainer


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """A fit of four steps of each stage, checkpointed after two, and where it left what."""
    made = {}

    def run(name, tied):
        if (name, tied) not in made:
            out = tmp_path_factory.mktemp(f"{name}-{tied}")
            saved = ModelCheckpoint(out, filename="{step}", every_n_train_steps=2, save_top_k=-1)
            torch.manual_seed(1)
            module, data = stage(name, folders[tied])
            fit(module, data, 4, out, [saved])
            made[name, tied] = module, out
        return made[name, tied]

    return run


def rows(module, layer="input"):
    model = module.model_to_export.transformer
    weight = (model.get_input_embeddings() if layer == "input" else model.get_output_embeddings()).weight
    return weight.detach()[[*module.new_token_ids]]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_rows_of_new_tokens_are_trained_and_no_others(name, tied, runs, folders):
    module, _ = runs(name, tied)
    fresh, _ = stage(name, folders[tied])
    fresh.configure_model()
    assert len(module.new_token_ids) == 3
    layers = ["input"] if name == "reward" else ["input", "output"]
    with module.model_to_export.native_attention():  # the policy, where there are roles
        for layer in layers:
            moved = (rows(module, layer) - rows(fresh, layer)).abs().amax(1)
            assert (moved > 1e-3).all(), (layer, moved)
        known = module.new_token_ids[0]
        weight = module.model_to_export.transformer.get_input_embeddings().weight
        assert torch.equal(
            weight[:known], AutoModelForCausalLM.from_pretrained(folders[tied]).model.embed_tokens.weight
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_has_the_same_rows_bit_for_bit_without_a_global_seed(name, tied, runs, folders, tmp_path):
    module, out = runs(name, tied)
    torch.manual_seed(7)
    again, data = stage(name, folders[tied])
    fit(again, data, 4, tmp_path, ckpt=next(out.glob("*step=2.ckpt")))
    a, b = module.state_dict(), again.state_dict()
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_exports_reload_with_the_trained_rows(name, tied, runs, folders, tmp_path):
    module, _ = runs(name, tied)
    ids = torch.tensor([[5, 6, module.new_token_ids[0], 7, *module.new_token_ids]])
    auto = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    options = {"num_labels": 1} if name == "reward" else {}
    backbone = module.model_to_export
    with torch.no_grad(), backbone.native_attention() as model:
        want = model(input_ids=ids).logits
        for only in (False, True):
            save_pretrained(model, module.tokenizer, tmp_path / str(only), adapter_only=only)
        merged = auto.from_pretrained(tmp_path / "False").eval()
        assert merged.config.tie_word_embeddings == tied
        base = auto.from_pretrained(folders[tied], **options)
        base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "True")))
        base.config.pad_token_id = module.tokenizer.pad_token_id
        plain = PeftModel.from_pretrained(base, tmp_path / "True").eval()
        for found in (merged, plain):
            torch.testing.assert_close(found(input_ids=ids).logits, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [False, True])
def test_reference_and_critic_begin_with_the_rows_of_the_policy(lora, folders):
    """Their new rows were drawn anew for each, so that KL and values began wrong."""
    module, _ = stage("ppo", folders[False], lora=lora, critic_kind="separate")
    module.configure_model()
    batch = pack([Tree([5, *module.new_token_ids], [Branch([8, module.new_token_ids[-1]])])])
    with torch.no_grad():
        assert torch.equal(*(module.actors.forward(role, batch).logprobs for role in ("policy", "reference")))
        critic = module.critic.transformer.get_input_embeddings().weight
        assert torch.equal(critic, module.policy.transformer.get_input_embeddings().weight)


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_adapter_with_rows_of_its_own_shares_the_backbone(tied, runs, folders, tmp_path):
    """Rows of new tokens belong to the adapter that trained them: one role never reads another's."""
    trained, _ = runs("reward", tied)
    save_pretrained(trained.reward_model.model, trained.tokenizer, tmp_path / "reward", adapter_only=True)
    alone = RewardModel(load_reward_model(tmp_path / "reward", needs_head=True)).eval()
    directory = str(tmp_path / "reward")
    module, data = stage("ppo", folders[tied], reward=directory, critic=directory, lr=0.03)
    new = module.new_token_ids
    batch = pack([Tree([5, *new], [Branch([8, new[-1]]), Branch([9, 10])])])
    fit(module, data, 2, tmp_path)
    assert module.policy.adapters.keys() == {"policy", "critic", "reward"}
    with torch.no_grad():
        torch.testing.assert_close(module.policy(batch, "reward"), alone(batch), atol=1e-6, rtol=0)
        tables = {}
        for role in ("policy", "reference", "critic", "reward"):
            with module.policy.playing(role):
                tables[role] = rows(module).clone()
    for role in ("policy", "critic"):
        assert (tables[role] - tables["reference"]).abs().max() > 0.01
    assert (tables["policy"] - tables["critic"]).abs().max() > 0.01


def test_a_model_learns_to_stop_by_a_token_that_its_template_brought(stories_model_dir, tmp_path):
    """With frozen rows, alike at that, the stop token could never be the most probable."""
    torch.manual_seed(0)
    module, data = stage("sft", stories_model_dir, template="chatml", lr=0.01)
    data = InstructionDataModule(ROWS, batch_size=4, max_length=256, val_fraction=0.0, cache_dir=tmp_path / "cache")
    fit(module, data, 60, tmp_path, [HFExport(when="end")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf" / "last")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "last").eval()
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row in ROWS:
        ids = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_tensors="pt")
        ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, module.policy.model.eval()(ids).logits, atol=1e-4, rtol=0)
        out = model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :]
        assert out[-1] == stop
        assert tokenizer.decode(out[:-1]) == row["messages"][1]["content"]
