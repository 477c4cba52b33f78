"""A reference that follows the policy (TR-DPO): against a loop written by hand, exact resume, what is refused."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import assert_equal, load_script, spawn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf import DPOModule, KTOModule, LoRA, OnlineDPOModule, ReferenceUpdate
from lightning_rlhf.models import Load

SCRIPT = Path(__file__).with_name("run_dpo.py")
run_dpo = load_script(SCRIPT)
run, real_pairs = run_dpo.run, run_dpo.real_pairs
spawn = partial(spawn, SCRIPT)


def answer_logprobs(model, tokenizer, row, name):
    """The summed log-prob of one answer, without padding."""
    prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    answer = row[name] if isinstance(row[name], str) else row[name][-1]["content"]
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in prompt) + "<|im_start|>assistant\n"
    start = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = torch.tensor([tokenizer(f"{text}{answer}<|im_end|>", add_special_tokens=False)["input_ids"]])
    return model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :].sum()


def by_hand(path, steps, every, alpha, lr):
    """Policy and reference after steps of plain gradient descent on all pairs, in fp64."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for _ in range(2))
    for step in range(1, steps + 1):
        policy.zero_grad()
        for row in real_pairs():
            own = [answer_logprobs(policy, tokenizer, row, name) for name in ("chosen", "rejected")]
            with torch.no_grad():
                base = [answer_logprobs(reference, tokenizer, row, name) for name in ("chosen", "rejected")]
            (-F.logsigmoid(0.1 * (own[0] - base[0] - own[1] + base[1])) / 8).backward()
        with torch.no_grad():
            for p, r in zip(policy.parameters(), reference.parameters(), strict=True):
                p -= lr * p.grad
                if step % every == 0:
                    r.copy_(alpha * p + (1 - alpha) * r)
    return [dict(model.named_parameters()) for model in (policy, reference)]


def moved(a, b, start):
    """The relative difference of two moves from the start."""
    flat = [torch.cat([(x[k].double() - start[k].double()).flatten() for k in b]) for x in (a, b)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


@pytest.mark.parametrize("options", [dict(), dict(accumulate=4, order=1)], ids=str)
def test_policy_and_reference_are_those_of_a_loop_by_hand(options, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    constant = dict(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    options = dict(options, **constant, max_steps=5, max_epochs=-1, val_fraction=0.0, batch_size=16, real=True, lr=0.05)
    _, module, _ = run(tiny_model_dir, tmp_path, reference_update=dict(every=2, alpha=0.3), **options)
    start = dict(AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters())
    found = [dict(one.model.named_parameters()) for one in (module.policy, module.reference)]
    for own, hand in zip(found, by_hand(tiny_model_dir, 5, 2, 0.3, 0.05), strict=True):
        assert moved(own, hand, start) < 2e-5


def test_a_run_goes_on_from_the_reference_that_moved(tiny_model_dir, tmp_path):
    options = dict(save_every=1, reference_update=dict(every=2, alpha=0.3))
    _, whole, _ = run(tiny_model_dir, tmp_path / "a", **options)
    for place in (1, 2, 3):
        _, resumed, _ = run(tiny_model_dir, tmp_path / f"b{place}", ckpt=str(tmp_path / "a" / f"step{place}.ckpt"),
                            seed=7, **options)  # fmt: skip
        assert_equal(dict(resumed.named_parameters()), dict(whole.named_parameters()))
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert not torch.equal(whole.reference.model.lm_head.weight, start.lm_head.weight)
    again = DPOModule.load_from_checkpoint(tmp_path / "a" / "step4.ckpt", optimizer=torch.optim.AdamW)
    assert again.reference_update == ReferenceUpdate(2, 0.3)


def test_adapters_count_as_merged(tiny_model_dir, tmp_path):
    """A reference that was just replaced by the policy finds both alike."""
    _, module, _ = run(tiny_model_dir, tmp_path / "a", lora=True, max_steps=3,
                       reference_update=dict(every=3, alpha=1.0))  # fmt: skip
    assert module._reference == "copy"
    ids = torch.tensor([[5, 9, 7, 11]])
    with torch.no_grad(), module.policy.native_attention() as policy:
        assert torch.allclose(policy(ids).logits, module.reference.model(ids).logits, atol=1e-5)
    _, _, first = run(tiny_model_dir, tmp_path / "b", lora=True, max_steps=2, lr=1e-2,
                      reference_update=dict(every=1, alpha=1.0))  # fmt: skip
    assert first.metrics["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    _, _, first = run(tiny_model_dir, tmp_path / "c", lora=True, max_steps=2, lr=1e-2)
    assert abs(first.metrics["train/loss"] - math.log(2)) > 1e-3


@pytest.mark.distributed
def test_two_processes_move_it_as_one(tiny_model_dir, tmp_path):
    options = dict(max_steps=4, max_epochs=-1, lr=1e-3, reference_update={"every": 2, "alpha": 0.5})
    two = spawn(tiny_model_dir, tmp_path / "two", devices=2, **options)
    _, one, _ = run(tiny_model_dir, tmp_path / "one", **options)
    start = {f"model.{k}": p for k, p in AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters()}
    assert moved(two, dict(one.policy.named_parameters()), start) < 2e-3  # Adam divides by small numbers
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert b["train/margin"] == pytest.approx(a["train/margin"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            dict(reference="precomputed"),
            "reference_update moves the reference, but reference: precomputed is log-probs of the start, which stay as "
            "they are: set reference to copy, auto or a model of the policy's size, or leave out reference_update.",
        ),
        (
            dict(reference="adapter_off", lora=LoRA(r=4)),
            "but reference: adapter_off is the start's own weights, which the policy stands on: set reference to copy, "
            "auto or a model of the policy's size, or leave out reference_update.",
        ),
        (dict(reference="none"), "but reference is none: set reference to copy, auto or"),
        (
            dict(loss="simpo"),
            "but the loss reads none: leave out reference_update, or set loss to one that reads a reference, such as",
        ),
        (dict(loss="simpo", reference="none"), "but the loss reads none: leave out reference_update, or set loss to"),
        (dict(reference_update=2), "reference_update is 2: give ReferenceUpdate(every=..., alpha=...)."),
        (dict(lora=LoRA(r=4), load=Load(quantization="nf4")), "set load.quantization to null"),
    ],
)
def test_references_that_can_not_move_are_named(settings, words, tiny_model_dir):
    with pytest.raises(ValueError) as error:
        DPOModule(tiny_model_dir, **{"reference_update": ReferenceUpdate(), **settings})
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("stage", [KTOModule, OnlineDPOModule])
def test_stages_whose_references_never_move_say_so(stage, tiny_model_dir):
    with pytest.raises(TypeError, match=f"{stage.__name__}: there is no reference_update: .* Leave it out, or "):
        stage(tiny_model_dir, reference_update=ReferenceUpdate())


def test_a_reference_of_another_size_is_named(tiny_model_dir, wide_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"they differ in \S+: set reference to copy, auto or a model of"):
        run(tiny_model_dir, tmp_path, max_steps=1, reference=str(wide_model_dir), reference_update=dict(every=1))


@pytest.mark.parametrize(
    ("settings", "words"), [(dict(every=0), "every must be at least 1"), (dict(alpha=0.0), "alpha must be above 0")]
)
def test_settings_have_ranges(settings, words):
    with pytest.raises(ValueError, match=words):
        ReferenceUpdate(**settings)
