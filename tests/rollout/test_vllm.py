"""Completions by a stand-in for a vLLM server: they are the policy's own, and what goes wrong is said in words."""

import copy
import json
import threading
from itertools import chain
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import difference, load_script, quiet, spawn
from transformers import AutoModelForCausalLM
from vllm_server import StandIn

from lightning_rlhf import GroupLoss, GRPOModule, LoRA, Loss, PPOModule, PromptDataModule, Rollout, Sampling
from lightning_rlhf.models import Policy
from lightning_rlhf.plan.cache import sampled_together
from lightning_rlhf.rollout import CachedEngine, RemoteEngine, Request, VLLMEngine, VLLMError
from lightning_rlhf.rollout.vllm.requests import check_sampling

STAGES = Path(__file__).parents[1] / "stages"
run = load_script(STAGES / "run_grpo.py").run
STOPS = [0, 1]


@pytest.fixture
def policy(tiny_model_dir):
    return Policy(AutoModelForCausalLM.from_pretrained(tiny_model_dir))


@pytest.fixture
def adapted(tiny_model_dir):
    """A policy under adapters that change what it says."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.manual_seed(1)
    policy = Policy(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")))
    disturb(policy)
    return policy


def disturb(policy):
    """Changes the trained weights, as an update does."""
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))


def engine_at(server, folder, **settings):
    return VLLMEngine(server.url, server.name, folder, **{"backoff": 0.0, "timeout": 60.0, **settings})


def requests(samples=2, **more):
    return [Request([5 + i, 9, 20 + i][: 1 + i], [10 * i + j for j in range(samples)], **more) for i in range(3)]


def assert_same(got, want, tolerance=1e-4):
    for one, other in zip(chain(*got), chain(*want), strict=True):
        assert one.input_ids == other.input_ids and one.text == other.text
        assert one.finish_reason == other.finish_reason
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=tolerance)


def logits_of(policy):
    with torch.no_grad(), policy.native_attention() as model:
        return model(input_ids=torch.tensor([[3, 8, 4, 30, 7]])).logits


# ------------------------------------------------------------------------------------------------- completions

SAMPLINGS = {
    "greedy": dict(temperature=0.0),
    "sampled": dict(),
    "stops": dict(stop_strings=("e", "o"), min_new_tokens=2),
    "narrow": dict(top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5,
                   frequency_penalty=0.3, logit_bias={7: 2.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLINGS)
def test_completions_and_log_probs_are_those_of_the_built_in_engine(
    name, policy, tiny_model_dir, tiny_tokenizer, tmp_path
):
    sampling = Sampling(8, **SAMPLINGS[name])
    want = CachedEngine().generate(policy, tiny_tokenizer, requests(), sampling, STOPS)
    with StandIn(tiny_model_dir) as server:
        engine = engine_at(server, tmp_path)
        assert isinstance(engine, RemoteEngine) and not isinstance(CachedEngine(), RemoteEngine)
        engine.hand_over(policy, tiny_tokenizer)
        assert_same(engine.generate(policy, tiny_tokenizer, requests(), sampling, STOPS), want)


def test_processed_log_probs_serve_any_temperature(policy, tiny_model_dir, tiny_tokenizer, tmp_path):
    sampling = Sampling(8, temperature=0.3)
    want = CachedEngine().generate(policy, tiny_tokenizer, requests(), sampling, STOPS)
    with StandIn(tiny_model_dir, logprobs_mode="processed_logprobs") as server:
        engine = engine_at(server, tmp_path, logprobs="processed")
        engine.hand_over(policy, tiny_tokenizer)
        assert_same(engine.generate(policy, tiny_tokenizer, requests(), sampling, STOPS), want)


def test_alternatives_and_limits_of_requests(policy, tiny_model_dir, tiny_tokenizer, tmp_path):
    asked = requests(alternatives=3, max_new_tokens=4)
    want = CachedEngine().generate(policy, tiny_tokenizer, asked, Sampling(8), STOPS)
    with StandIn(tiny_model_dir) as server:
        engine = engine_at(server, tmp_path)
        engine.hand_over(policy, tiny_tokenizer)
        got = engine.generate(policy, tiny_tokenizer, asked, Sampling(8), STOPS)
        assert engine.generate(policy, tiny_tokenizer, [], Sampling(8), STOPS) == []
        with pytest.raises(ValueError, match="names the adapter 'other'"):
            engine.generate(policy, tiny_tokenizer, [Request([1], [0], adapter="other")], Sampling(8), STOPS)
    assert_same(got, want)
    for one, other in zip(chain(*got), chain(*want), strict=True):
        for mine, theirs in zip(one.alternatives, other.alternatives, strict=True):
            assert [i for i, _ in mine] == [i for i, _ in theirs]


def test_same_keys_are_the_same_requests(adapted, tiny_model_dir, tiny_tokenizer, tmp_path):
    """Also in another process, after a resume: names of adapters are a function of their weights."""
    sampling = Sampling(6, min_new_tokens=2, stop_strings=("ab",), logit_bias={3: 1.5}, top_k=40)
    bodies = []
    for folder in ("one", "other"):
        with StandIn(tiny_model_dir) as server:
            engine = engine_at(server, tmp_path / folder, concurrency=1)
            engine.hand_over(adapted, tiny_tokenizer)
            engine.generate(adapted, tiny_tokenizer, requests(), sampling, STOPS)
            bodies.append(server.bodies())
    assert bodies[0] == bodies[1] and len(bodies[0]) == 6
    assert bodies[0][3] == {
        "model": next(iter((tmp_path / "one").iterdir())).name,
        "prompt": [6, 9], "seed": 11, "max_tokens": 6, "min_tokens": 2, "temperature": 1.0, "top_k": 40, "top_p": 1.0,
        "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "logit_bias": {"3": 1.5}, "stop": ["ab"], "stop_token_ids": [0, 1], "ignore_eos": True,
        "skip_special_tokens": False, "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- weights


def test_adapters_are_handed_over(adapted, tiny_model_dir, tiny_tokenizer, tmp_path):
    with StandIn(tiny_model_dir) as server:
        engine, names = engine_at(server, tmp_path), []
        for _ in range(2):
            engine.hand_over(adapted, tiny_tokenizer)
            [_, name] = server.roots
            torch.testing.assert_close(logits_of(server.policies[name]), logits_of(adapted), rtol=0, atol=1e-5)
            engine.generate(adapted, tiny_tokenizer, requests(), Sampling(4), STOPS)
            assert server.bodies()[-1]["model"] == name
            engine.hand_over(adapted, tiny_tokenizer)  # the same weights again: nothing to do
            names.append(name)
            assert [folder.name for folder in tmp_path.iterdir()] == [name]
            disturb(adapted)
        assert len({*names}) == 2
        load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
        assert server.paths() == [load, unload, load]  # unloads first: there may be room for one alone
        engine_at(server, tmp_path / "again").hand_over(adapted, tiny_tokenizer)  # a resumed run
        assert len(server.roots) == 3


def test_an_adapter_that_the_server_dropped_by_itself_is_no_error(
    adapted, tiny_model_dir, tiny_tokenizer, tmp_path, monkeypatch
):
    with StandIn(tiny_model_dir) as server:
        engine = engine_at(server, tmp_path)
        engine.hand_over(adapted, tiny_tokenizer)
        monkeypatch.setattr(server, "unload_adapter", lambda _: (500, "Failed to remove lora adapter"))
        disturb(adapted)
        engine.hand_over(adapted, tiny_tokenizer)
        engine.generate(adapted, tiny_tokenizer, requests(), Sampling(4), STOPS)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "merged"])
def test_whole_weights_are_handed_over(lora, policy, adapted, tiny_model_dir, tiny_tokenizer, tmp_path):
    policy = adapted if lora else policy
    with StandIn(tiny_model_dir, lora=False) as server:
        engine = engine_at(server, tmp_path, weights="full")
        for _ in range(2):
            disturb(policy)
            engine.hand_over(policy, tiny_tokenizer)
            torch.testing.assert_close(logits_of(server.policies["tiny"]), logits_of(policy), rtol=0, atol=1e-5)
        assert server.paths() == ["/collective_rpc", "/reset_prefix_cache"] * 2
        first, second = (body["kwargs"]["weights_path"] for body in server.bodies("/collective_rpc"))
        assert first != second and [str(folder) for folder in tmp_path.iterdir()] == [second]


def test_whole_weights_are_the_given_ones(policy, tiny_model_dir, tiny_tokenizer, tmp_path):
    """Where the model's tensors are shards, the strategy gathers them."""
    other = copy.deepcopy(policy)
    disturb(other)
    with StandIn(tiny_model_dir) as server:
        engine_at(server, tmp_path).hand_over(policy, tiny_tokenizer, other.model.state_dict())
        torch.testing.assert_close(logits_of(server.policies["tiny"]), logits_of(other), rtol=0, atol=1e-5)


def test_the_folder_may_have_another_path_there(adapted, tiny_model_dir, tiny_tokenizer, tmp_path):
    (tmp_path / "there").symlink_to(tmp_path / "here")
    with StandIn(tiny_model_dir) as server:
        engine = engine_at(server, tmp_path / "here", server_directory=str(tmp_path / "there"))
        engine.hand_over(adapted, tiny_tokenizer)
        assert server.bodies("/v1/load_lora_adapter")[0]["lora_path"].startswith(str(tmp_path / "there"))


@pytest.mark.parametrize(
    "settings, reason",
    [
        (dict(use_dora=True), "DoRA"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(trainable_token_indices=[3]), "new tokens"),
    ],
)
def test_adapters_that_vllm_cannot_load_are_refused(settings, reason, tiny_model_dir, tiny_tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    policy = Policy(get_peft_model(model, config), layout="padded")
    with StandIn(tiny_model_dir) as server, pytest.raises(ValueError, match=f"{reason}.*engine.weights to full"):
        engine_at(server, tmp_path).hand_over(policy, tiny_tokenizer)


@pytest.mark.parametrize(
    "server_has, engine_has, message",
    [
        (dict(name="other"), dict(), "has no model 'tiny', but 'other'"),
        (dict(runtime_lora=False), dict(), "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        (dict(lora=False), dict(), "--enable-lora"),
        (dict(max_lora_rank=2), dict(), "--max-lora-rank"),
        (dict(), dict(server_directory="/nowhere"), "can't read /nowhere/lightning-rlhf-.*engine.server_directory"),
        (dict(dev_mode=False), dict(weights="full"), "VLLM_SERVER_DEV_MODE=1"),
        (dict(), dict(weights="full", server_directory="/nowhere"), "were not taken over.*server_directory"),
        (dict(api_key="secret"), dict(), "HTTP 401.*Check the API key"),
    ],
)
def test_why_weights_were_not_taken_over_is_said(
    server_has, engine_has, message, adapted, tiny_model_dir, tiny_tokenizer, tmp_path
):
    with StandIn(tiny_model_dir, **server_has) as server, pytest.raises(VLLMError, match=message):
        server.name = "tiny"  # what the engine asks for
        engine_at(server, tmp_path, **engine_has).hand_over(adapted, tiny_tokenizer)


def test_a_key_is_sent_and_not_shown(adapted, tiny_model_dir, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_KEY", "secret")
    with StandIn(tiny_model_dir, api_key="secret") as server:
        engine = engine_at(server, tmp_path, api_key_env="VLLM_KEY")
        engine.hand_over(adapted, tiny_tokenizer)
        monkeypatch.setattr(server, "complete", lambda _: (400, "no, secret"))
        with pytest.raises(VLLMError, match=r"no, \*\*\*"):
            engine.generate(adapted, tiny_tokenizer, requests(), Sampling(4), STOPS)


@pytest.mark.parametrize("how", ["deaf", "logprobs"])
def test_weights_that_did_not_arrive_are_noticed(how, adapted, tiny_model_dir, tiny_tokenizer, tmp_path):
    changes = dict(deaf=True) if how == "deaf" else dict(logprobs_mode="raw_logprobs")
    with torch.no_grad():
        adapted.transformer.get_output_embeddings().weight.mul_(8)  # distributions are uneven, and unlike the server's
    with StandIn(tiny_model_dir, **changes) as server:
        engine = engine_at(server, tmp_path, tolerance=0.05, logprobs="raw" if how == "deaf" else "processed")
        engine.hand_over(adapted, tiny_tokenizer)
        with pytest.raises(VLLMError, match=r"differ from the policy's by .* nats"):
            engine.generate(adapted, tiny_tokenizer, requests(), Sampling(4, temperature=1.0), STOPS)


# ------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "faults, message",
    [
        (["error_400"], "refuses /v1/completions: HTTP 400.*no such luck"),
        (["error_500"] * 3, "HTTP 500"),
        (["busy"] * 3, "HTTP 503"),
        (["hang"], r"sent nothing for 0\.5 s.*engine.timeout"),
        (["reset"], "closed the connection before it answered.*resume from the last checkpoint"),
        (["not_json"], "did not answer with JSON"),
        (["no_choices"], "has no choice"),
        (["no_token_ids"], "without token ids.*vLLM 0.10.2"),
        (["no_logprobs"], "without the log-prob of each"),
        (["other_prompt"], "read a prompt of 0 tokens in place of one of 1"),
        (["early"], "ended a completion after 3 tokens"),
    ],
)
def test_a_faulty_answer_is_said(faults, message, policy, tiny_model_dir, tiny_tokenizer, tmp_path):
    with StandIn(tiny_model_dir) as server:
        engine = engine_at(server, tmp_path, concurrency=2, retries=2)
        engine.hand_over(policy, tiny_tokenizer)
        engine.client.timeout = 0.5 if faults == ["hang"] else 60
        server.faults = list(faults)
        asked = [Request([5], [0])] if len(faults) > 1 else requests()
        with pytest.raises(VLLMError, match=message):
            engine.generate(policy, tiny_tokenizer, asked, Sampling(4, min_new_tokens=4), STOPS)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vllm_")]


def test_a_busy_server_is_asked_again(policy, tiny_model_dir, tiny_tokenizer, tmp_path):
    want = CachedEngine().generate(policy, tiny_tokenizer, requests(), Sampling(4), STOPS)
    with StandIn(tiny_model_dir) as server:
        engine = engine_at(server, tmp_path, retries=2)
        engine.hand_over(policy, tiny_tokenizer)
        server.faults = ["busy", "error_500"]
        assert_same(engine.generate(policy, tiny_tokenizer, requests(), Sampling(4), STOPS), want)


def test_a_server_that_ends_or_was_restarted_is_said(adapted, tiny_model_dir, tiny_tokenizer, tmp_path):
    with StandIn(tiny_model_dir) as server:
        engine = engine_at(server, tmp_path)
        engine.hand_over(adapted, tiny_tokenizer)
    ask = (adapted, tiny_tokenizer, requests(), Sampling(4), STOPS)
    with pytest.raises(VLLMError, match=r"No vLLM server is at http://127.0.0.1.*Start one"):
        engine.generate(*ask)
    with StandIn(tiny_model_dir, port=server.port):
        with pytest.raises(VLLMError, match=r"no longer has 'lightning-rlhf-.*Resume from the last checkpoint"):
            engine.generate(*ask)
        engine.hand_over(adapted, tiny_tokenizer)  # as the resumed run does
        engine.generate(*ask)


def test_no_weights_and_too_long_prompts_are_said(policy, tiny_model_dir, tiny_tokenizer, tmp_path):
    with StandIn(tiny_model_dir, max_model_len=10) as server:
        engine = engine_at(server, tmp_path)
        with pytest.raises(VLLMError, match="handed no weights over yet"):
            engine.generate(policy, tiny_tokenizer, requests(), Sampling(4), STOPS)
        engine.hand_over(policy, tiny_tokenizer)
        with pytest.raises(ValueError, match=r"Rollout request 1: .* 2 tokens .* may have 11.*--max-model-len 11"):
            engine.generate(policy, tiny_tokenizer, requests(), Sampling(9), STOPS)
        engine._served = engine._served._replace(context=None)  # a server that doesn't say
        with pytest.raises(VLLMError, match="longer than its --max-model-len"):
            engine.generate(policy, tiny_tokenizer, requests(), Sampling(9), STOPS)


@pytest.mark.parametrize(
    "settings, logprobs, name",
    [
        (dict(temperature=0.7), "raw", "temperature=0.7"),
        (dict(temperature=0.001), "processed", "temperature=0.001"),
        (dict(repetition_penalty=3.0), "raw", "repetition_penalty=3.0"),
        (dict(presence_penalty=-3.0), "raw", "presence_penalty=-3.0"),
        (dict(frequency_penalty=2.5), "raw", "frequency_penalty=2.5"),
        (dict(logit_bias={1: 200.0}), "raw", "logit_bias="),
        (dict(top_k=5), "processed", "top_k=5"),
        (dict(top_p=0.5), "processed", "top_p=0.5"),
        (dict(min_p=0.5), "processed", "min_p=0.5"),
        (dict(min_new_tokens=2), "processed", "min_new_tokens=2"),
        (dict(logit_bias={1: 2.0}), "processed", "logit_bias="),
    ],
)
def test_settings_that_the_server_would_change_are_refused(settings, logprobs, name):
    with pytest.raises(ValueError, match=f"sampling.{name}"):
        check_sampling(Sampling(**settings), logprobs)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(base_url="127.0.0.1:8000"), "is not a URL"),
        (dict(model=""), "engine.model is empty"),
        (dict(weights="lora"), "engine.weights is 'lora'. Choose one of: auto, adapter, full"),
        (dict(logprobs="raw_logprobs"), "engine.logprobs"),
        (dict(concurrency=0), "engine.concurrency must be at least 1"),
        (dict(timeout=0.0), "engine.timeout must be above 0"),
        (dict(tolerance=-1.0), "engine.tolerance must be above 0"),
        (dict(api_key_env="NOT_SET_ANYWHERE"), "NOT_SET_ANYWHERE has no valid API key"),
    ],
)
def test_invalid_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        VLLMEngine(**{"base_url": "http://127.0.0.1:8000", "model": "tiny", "directory": tmp_path, **settings})


# ------------------------------------------------------------------------------------------------- stages

SETTINGS = dict(max_steps=2, sampling=dict(max_new_tokens=6, stop_strings=["e", "o"]), save_every=1,
                updates=dict(minibatches=1, epochs=1), loss=dict(correction="token_truncate"))  # fmt: skip


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_grpo_learns_through_the_server(lora, tiny_model_dir, tmp_path):
    """As with the built-in engine: the stand-in samples as it does, so the weights are the same."""
    with StandIn(tiny_model_dir) as server:
        trainer, module = run(tiny_model_dir, tmp_path / "vllm", lora=lora, val_fraction=0.2,
                              engine=engine_at(server, tmp_path / "weights"), **SETTINGS)  # fmt: skip
        found = trainer.callback_metrics
        module.generate("Say it", Sampling(4, temperature=0.0))  # with the weights of now
        asked = server.policies[server.bodies()[-1]["model"]]
        torch.testing.assert_close(logits_of(asked), logits_of(module.policy), rtol=0, atol=1e-5)
    run(tiny_model_dir, tmp_path / "own", lora=lora, val_fraction=0.2, **SETTINGS)
    weights = [torch.load(tmp_path / name / "weights.pt") for name in ("vllm", "own")]
    assert difference(*weights) < 1e-5
    assert found["train/first_ratio_error"] < 1e-5 and found["train/rollout_error"] < 1e-4
    for name in ("mean", "min", "max"):
        assert found[f"train/importance_weight_{name}"] == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_hand_over_once_and_ask_for_their_own(tiny_model_dir, tmp_path):
    found = []
    for devices in (1, 2):
        with StandIn(tiny_model_dir) as server:
            engine = dict(base_url=server.url, model="tiny", directory=str(tmp_path / f"weights{devices}"))
            spawn(STAGES / "run_grpo.py", tiny_model_dir, tmp_path / f"{devices}", devices=devices, lora=True,
                  engine=engine, **{**SETTINGS, "save_every": 0})  # fmt: skip
            loads = len(server.bodies("/v1/load_lora_adapter"))
            found.append((loads, sorted(json.dumps(b) for b in server.bodies()[:12])))
    assert found[0] == found[1] and found[0][0] == 2


@pytest.mark.parametrize("kind, loss", [(GRPOModule, GroupLoss), (PPOModule, Loss)])
def test_stages_refuse_what_needs_exact_log_probs(kind, loss, tiny_model_dir, tmp_path):
    engine = VLLMEngine("http://127.0.0.1:9", "tiny", tmp_path / "weights")
    data = PromptDataModule([{"prompt": f"Say {i}"} for i in range(8)], batch_size=4, cache_dir=tmp_path / "cache")
    settings = dict(reward=lambda prompts, completions: [0.0] * len(prompts), lora=LoRA(r=2), engine=engine)
    for changes, message in (
        (dict(loss=loss(old_logprobs="rollout"), rollout=Rollout(2, Sampling(4))), "only near them.*recompute"),
        (dict(rollout=Rollout(2, Sampling(4, temperature=0.5))), "temperature=0.5"),
    ):
        module = kind(tiny_model_dir, **settings, **changes)
        with pytest.raises(ValueError, match=message):
            quiet(tmp_path, max_steps=1).fit(module, data)


def test_a_plan_has_no_cache_of_a_rollout_elsewhere(tiny_model_dir, tmp_path):
    engine = VLLMEngine("http://127.0.0.1:9", "tiny", tmp_path)
    module = GRPOModule(tiny_model_dir, reward=lambda prompts, completions: [0.0], engine=engine)
    assert sampled_together(module, None) == (0, 0, 0)
