"""What is found in a run, and models that share a backbone."""

import asyncio
import json

import pytest
import torch
from in_loop import in_loop
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM

from lightning_rlhf.models import Policy, load_causal_lm, load_tokenizer
from lightning_rlhf.models.adapters import load_adapters, reason_against_sharing
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.serving.command import _parser, _server
from lightning_rlhf.serving.load import ModelOptions, load_all, load_served
from lightning_rlhf.serving.runs import Backbone, find_models


def put(folder, **config):
    folder.mkdir(parents=True)
    name = "adapter_config.json" if "base_model_name_or_path" in config else "config.json"
    (folder / name).write_text(json.dumps(config))
    return folder


def test_what_is_found(tmp_path):
    best = put(tmp_path / "runs" / "sft" / "hf" / "best", architectures=["LlamaForCausalLM"])
    put(tmp_path / "runs" / "sft" / "hf" / "last", architectures=["LlamaForCausalLM"])
    last = put(tmp_path / "runs" / "grpo" / "hf" / "last", architectures=["LlamaForCausalLM"])
    reward = put(tmp_path / "runs" / "reward" / "hf" / "best", architectures=["LlamaForSequenceClassification"])
    (tmp_path / "runs" / "notes").mkdir()
    both = [Backbone(str(last), "grpo"), Backbone(str(best), "sft")]
    found = find_models(str(tmp_path / "runs"))
    assert (found.backbones, found.reward) == (both, str(reward))
    assert find_models(str(tmp_path / "runs" / "sft")).backbones == both[1:]
    assert find_models(str(best)).backbones == both[1:]
    assert find_models("org/model").backbones == [Backbone("org/model", "model")]
    with pytest.raises(FileNotFoundError, match="only a reward model"):
        find_models(str(reward))
    with pytest.raises(FileNotFoundError, match=r"There is no directory .*/stf; did you mean .*/sft"):
        find_models(str(tmp_path / "runs" / "stf"))


def test_adapters_are_found_by_their_base(tmp_path):
    def adapters(name, base):
        folder = put(tmp_path / name / "hf" / "last", base_model_name_or_path=str(base), task_type="CAUSAL_LM")
        return str(folder)

    whole = put(tmp_path / "sft" / "hf" / "last", architectures=["LlamaForCausalLM"])
    ppo, other = adapters("ppo", whole), adapters("other", "org/model")
    more = adapters("more", ppo)
    assert find_models(str(tmp_path)).backbones == [
        Backbone(ppo, None, {"more": more}),  # ppo is served over its own base
        Backbone("org/model", "base-model", {"other": other}),
        Backbone(str(whole), "sft", {"ppo": ppo}),
    ]
    assert find_models(str(tmp_path / "other")).backbones == [Backbone("org/model", "base", {"other": other})]
    named = find_models(str(whole), {"after": str(tmp_path / "ppo")}).backbones
    assert named == [Backbone(str(whole), "base", {"after": ppo})]
    for run, given, says in ((tmp_path, {"a": ppo}, "one whole model"), (whole, {"base": ppo}, "another name")):
        with pytest.raises(ValueError, match=says):
            find_models(str(run), given)


@in_loop
async def test_base_and_adapters_in_one_batch_equal_each_merged(run_dir, stories_model_dir, running):
    folders = {"after": run_dir / "ppo", "before.1": run_dir / "sft"}
    named = [f"{name}={folder}" for name, folder in folders.items()]
    models = _server(_parser().parse_args([str(stories_model_dir), "--adapters", *named])).models
    bodies = [
        {"model": name, "prompt": "Once upon a time", "max_tokens": 30, "seed": seed, "echo": True, "logprobs": 1}
        for seed in range(4)
        for name in ("base", *folders)
    ]
    async with running(models=models) as app:
        assert len(app.server.workers) == 1
        listed = (await app.client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["after", "before.1", "base"]
        answers = await asyncio.gather(*(app.client.post("/v1/completions", json=body) for body in bodies))
        alone = [await app.client.post("/v1/completions", json=body) for body in bodies]
    texts = [answer.json()["choices"][0]["text"] for answer in answers]
    assert texts == [answer.json()["choices"][0]["text"] for answer in alone]
    assert len(set(texts)) == 12
    for i, name in enumerate(("base", *folders)):
        source = str(folders[name] / "hf" / "last") if name in folders else str(stories_model_dir)
        merged = load_served(name, source, ModelOptions())
        found = answers[i].json()["choices"][0]["logprobs"]
        ids = {merged.tokenizer.convert_ids_to_tokens(k): k for k in range(len(merged.tokenizer))}
        row = torch.tensor([[ids[token.replace(" ", "▁")] for token in found["tokens"]]])
        with torch.no_grad():
            logits = merged.policy.transformer(row).logits[0, :-1].log_softmax(-1)
        want = logits.gather(1, row[0, 1:, None])[:, 0].tolist()
        assert found["token_logprobs"][1:] == pytest.approx(want, abs=1e-4), name


@pytest.mark.parametrize("kind", ["dora", "rows"])
def test_adapters_that_cannot_share_are_merged_and_said(kind, run_dir, stories_model_dir, tmp_path, caplog):
    model = load_causal_lm(stories_model_dir)
    more = {"use_dora": True} if kind == "dora" else {"trainable_token_indices": {"embed_tokens": [5]}}
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more))
    save_pretrained(peft, load_tokenizer(stories_model_dir), tmp_path / "other", adapter_only=True)
    folders = {"a": str(run_dir / "ppo" / "hf" / "last"), "b": str(tmp_path / "other")}
    backbone = Backbone(str(stories_model_dir), "base", folders)
    models = load_all([backbone], ModelOptions())
    assert list(models) == ["a", "b", "base"]
    assert len({id(served.worker) for served in models.values()}) == 3
    assert not [served for served in models.values() if served.adapter]
    assert "a, b, base do not share weights" in caplog.text


def test_adapters_that_do_not_fit_are_refused(run_dir, stories_model_dir, tiny_model_dir):
    with pytest.raises(ValueError, match="do not fit"):
        load_adapters(tiny_model_dir, {"a": run_dir / "ppo" / "hf" / "last"})
    with pytest.raises(ValueError, match="no adapter_config"):
        load_adapters(stories_model_dir, {"a": stories_model_dir})


def test_the_trial_of_sharing_leaves_the_model_as_it_was(run_dir, stories_model_dir):
    exports = {name: run_dir / name / "hf" / "last" for name in ("ppo", "sft")}
    peft = load_adapters(stories_model_dir, {"a": exports["ppo"], "b": exports["sft"]})
    assert reason_against_sharing(Policy(peft, layout="padded")) is None
    assert peft.active_adapter == "a"


def test_a_model_that_cannot_run_in_a_session_is_served_one_request_at_a_time(tmp_path, running, tiny_tokenizer):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tiny_tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    served = load_served("mamba", str(tmp_path), ModelOptions())

    async def ask():
        async with running(models={served.name: served}) as app:
            health = (await app.client.get("/health")).json()
            assert health["engines"] == {"mamba": "HFGenerateEngine"}
            body = {"prompt": "fox", "max_tokens": 6, "n": 2, "seed": 1, "logprobs": 1}
            both = asyncio.gather(
                app.client.post("/v1/completions", json=body),
                app.client.post("/v1/completions", json={**body, "seed": 2}),
            )
            one, two = await both
            again = await app.client.post("/v1/completions", json={**body, "stream": True})
            assert one.json()["choices"] != two.json()["choices"]
            texts = [choice["text"] for choice in one.json()["choices"]]
            events = [json.loads(line[6:]) for line in again.text.split("\n\n") if line.startswith("data: {")]
            streamed = ["", ""]
            for event in events:
                for choice in event["choices"]:
                    streamed[choice["index"]] += choice["text"]
            assert streamed == texts

    asyncio.run(ask())
