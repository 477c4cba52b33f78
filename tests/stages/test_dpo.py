"""The DPO stage: the loss's definition, invariance to every split, references, exact resume, what is refused."""

import json
import math
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import python
from runs import ROOT, assert_equal, difference, load_script, quiet, spawn
from safetensors.torch import load_file, save_file
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf import (
    DPOModule,
    HFExport,
    Load,
    LoRA,
    PairShaping,
    PreferenceDataModule,
    ReferenceUpdate,
    SaveOnInterrupt,
    WeightedLoss,
)
from lightning_rlhf.cli import main
from lightning_rlhf.data import Branch, Tree, pack
from lightning_rlhf.data.errors import DataError
from lightning_rlhf.data.packed import Pair
from lightning_rlhf.data.reference import ReferenceLogprobs
from lightning_rlhf.data.sources import BadRowError
from lightning_rlhf.functional import LOSSES, PairLoss
from lightning_rlhf.stages import references
from lightning_rlhf.stages.pair_losses import LossSum

SCRIPT = Path(__file__).with_name("run_dpo.py")
run_dpo = load_script(SCRIPT)
run, rows, real_pairs = run_dpo.run, run_dpo.rows, run_dpo.real_pairs
spawn = partial(spawn, SCRIPT)
STEP = dict(max_steps=1, val_fraction=0.0, batch_size=16, real=True)


def weights(module):
    return {k: v.detach().clone() for k, v in module.policy.named_parameters()}


# --------------------------------------------------------------------------------------- the same by plain transformers


def messages_of(row, answer):
    prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    text = answer if isinstance(answer, str) else answer[-1]["content"]
    return prompt, text


def plain_logprobs(model, tokenizer, data, names=("chosen", "rejected")):
    """For each name its answers' summed log-probs and tokens; all answers padded on the right."""
    texts, starts = [], []
    for row in data:
        for name in names:
            messages, answer = messages_of(row, row[name])
            prompt = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
            prompt += "<|im_start|>assistant\n"
            starts.append(len(tokenizer(prompt, add_special_tokens=False)["input_ids"]))
            texts.append(f"{prompt}{answer}<|im_end|>")
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
    tokens = logits[:, :-1].log_softmax(-1).gather(2, inputs.input_ids[:, 1:, None])[..., 0]
    place = torch.arange(1, inputs.input_ids.shape[1])
    read = (place >= torch.tensor(starts)[:, None]) & inputs.attention_mask[:, 1:].bool()
    sums, sizes = (tokens * read).sum(1), read.sum(1)
    return [(sums[i :: len(names)], sizes[i :: len(names)]) for i in range(len(names))]


def plain_model(path, state=None):
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float64)
    if state is not None:
        model.load_state_dict(state)
    return model.eval()


def plain_pairs(policy, reference, tokenizer, data):
    """Log-ratios, policy minus reference, of chosen and rejected answers, then log-probs and lengths."""
    own = plain_logprobs(policy, tokenizer, data)
    with torch.no_grad():
        base = plain_logprobs(reference, tokenizer, data)
    (c, cn), (r, rn) = own
    return c - base[0][0], r - base[1][0], c, r, cn, rn


def dpo(c, r, *_, beta=0.1):
    return -F.logsigmoid(beta * (c - r)).mean()


def simpo(_c, _r, c, r, cn, rn):
    return -F.logsigmoid(2.0 * (c / cn - r / rn) - 1.0).mean()


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def want(tiny_model_dir, other_model_dir, tokenizer):
    """The step's gradient by loss, in fp64."""
    found = {}
    for name, loss in (("sigmoid", dpo), ("simpo", simpo)):
        policy, reference = plain_model(tiny_model_dir), plain_model(other_model_dir)
        loss(*plain_pairs(policy, reference, tokenizer, real_pairs())).backward()
        found[name] = {f"model.{k}": p.grad for k, p in policy.named_parameters()}
    return found


def options_of(name, other_model_dir):
    return dict(loss=name, **({"reference": str(other_model_dir)} if name == "sigmoid" else {}))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(accumulate=4, order=1),
        dict(layout="padded", order=2),
        dict(layout="padded", accumulate=4),
        dict(accumulate=11),  # more micro-batches than rows
        dict(checkpointing=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["sigmoid", "simpo"])
def test_step_gradient_does_not_depend_on_the_split(name, options, tiny_model_dir, other_model_dir, want, tmp_path):
    """2e-6 relative to a padded model in fp64, on real pairs."""
    run(tiny_model_dir, tmp_path, **STEP, **options_of(name, other_model_dir), **options)
    assert difference(torch.load(tmp_path / "gradients.pt"), want[name]) < 2e-6


@pytest.mark.distributed
def test_step_gradient_on_two_processes(tiny_model_dir, other_model_dir, want, tmp_path):
    spawn(tiny_model_dir, tmp_path, devices=2, accumulate=4, order=3, **STEP, **options_of("sigmoid", other_model_dir))
    assert difference(torch.load(tmp_path / "gradients.pt"), want["sigmoid"]) < 2e-6


LORA = dict(**STEP, lora=True, fill=True)


def plain_adapter_gradients(model_dir, start, tokenizer, data=None, weights=None):
    """Of adapters at their values of ``start``, from the gradient of merged weights, in fp64."""
    policy, reference = plain_model(model_dir, weights), plain_model(model_dir, weights)
    gradients = run_dpo.merge(policy, start)
    dpo(*plain_pairs(policy, reference, tokenizer, data or real_pairs())).backward()
    return gradients()


@pytest.mark.parametrize("reference", ["adapter_off", "copy"])
@pytest.mark.parametrize("options", [dict(checkpointing=True), dict(layout="padded", accumulate=4)], ids=str)
def test_adapters_get_the_same_gradient_from_either_reference(reference, options, tiny_model_dir, tokenizer, tmp_path):
    _, _, first = run(tiny_model_dir, tmp_path, **LORA, reference=reference, **options)
    want = plain_adapter_gradients(tiny_model_dir, first.start, tokenizer)
    assert difference(first.gradients, want) < 2e-6


@pytest.fixture
def pairs(assets):
    """Eight of the pairs that people ranked."""
    return real_pairs(files=[assets / "data" / "preference.jsonl"])


@pytest.mark.parametrize("options", [dict(), dict(layout="padded", accumulate=4)], ids=str)
def test_step_gradient_on_ranked_pairs(options, tiny_model_dir, other_model_dir, tokenizer, pairs, tmp_path):
    _, _, first = run(tiny_model_dir, tmp_path, **STEP, data=pairs, reference=str(other_model_dir), **options)
    policy, reference = plain_model(tiny_model_dir), plain_model(other_model_dir)
    dpo(*plain_pairs(policy, reference, tokenizer, pairs)).backward()
    assert difference(first.gradients, {f"model.{k}": p.grad for k, p in policy.named_parameters()}) < 2e-6


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_all_references_give_the_same_gradient_on_ranked_pairs(
    quantization, wide_model_dir, tokenizer, pairs, tmp_path
):
    """In NF4 too, beside a padded model in fp64 of the weights as they were rounded."""
    rounded = run_dpo.rounded_weights(wide_model_dir) if quantization else None
    found = {}
    for reference in ("adapter_off", "copy", "precomputed"):
        options = dict(**LORA, quantization=quantization, reference=reference, data=pairs, checkpointing=True)
        _, _, first = run(wide_model_dir, tmp_path / reference, **options)
        found[reference] = first.gradients
    want = plain_adapter_gradients(wide_model_dir, first.start, tokenizer, pairs, rounded)
    for gradients in found.values():
        assert difference(gradients, want) < 2e-6
        assert difference(gradients, found["adapter_off"]) < 2e-6


def test_quantized_weights_are_those_of_the_copy_too(wide_model_dir, tmp_path):
    """NF4: with adapters at zero, both references say the same log-probs as the policy."""
    pytest.importorskip("bitsandbytes")
    for reference in ("adapter_off", "copy"):
        _, _, first = run(wide_model_dir, tmp_path / reference, **STEP, lora=True, quantization="nf4",
                          reference=reference)  # fmt: skip
        assert first.metrics["train/loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert first.metrics["train/kl"] == 0.0


# ---------------------------------------------------------------------------------------------------- the beginning


@pytest.mark.parametrize(
    "options",
    [dict(), dict(lora=True), dict(lora=True, reference="copy"), dict(layout="padded"),
     dict(lora=True, checkpointing=True, accumulate=4)],
    ids=str,
)  # fmt: skip
def test_at_the_start_nothing_is_preferred(options, tiny_model_dir, tmp_path):
    _, _, first = run(tiny_model_dir, tmp_path, **STEP, **options)
    found = first.metrics
    assert found["train/loss"] == torch.tensor(2.0).double().log().float().item()
    assert found["train/accuracy"] == 0.5
    for name in ("margin", "chosen_reward", "rejected_reward", "kl"):
        assert found[f"train/{name}"] == 0.0


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_trains_and_loads_the_reference_that_it_reads(name, tiny_model_dir, tmp_path):
    _, module, first = run(tiny_model_dir, tmp_path, **{**STEP, "max_steps": 2}, loss=name)
    assert hasattr(module, "reference") == LOSSES[name].reference
    assert all(math.isfinite(value) for value in first.metrics.values())
    assert ("train/kl" in first.metrics) == LOSSES[name].reference


def test_swapped_pairs_have_the_mirrored_gradient(tiny_model_dir, tmp_path):
    """At the start the loss's slope is the same on both sides."""
    found = []
    for flip in (False, True):
        data = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} if flip else row for row in real_pairs()]
        module = DPOModule(tiny_model_dir, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        first = run_dpo.First(False)
        quiet(tmp_path, max_steps=1, callbacks=[first]).fit(
            module, PreferenceDataModule(data, batch_size=16, val_fraction=0.0, cache_dir=tmp_path)
        )
        found.append({k: -g if flip else g for k, g in first.gradients.items()})
    assert difference(*found) < 1e-6


def test_a_ranking_equals_its_pairs_written_out(tiny_model_dir, other_model_dir, tmp_path):
    answers = ["fox dog", "Paris", "fine fine fine", "good"]
    ranking = [{"prompt": "Say it", "ranked": answers}]
    pairs = [{"prompt": "Say it", "chosen": a, "rejected": b} for i, a in enumerate(answers) for b in answers[i + 1 :]]
    found = []
    for data in (ranking, pairs):
        module = DPOModule(tiny_model_dir, reference=other_model_dir, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        first = run_dpo.First(False)
        quiet(tmp_path, max_steps=1, callbacks=[first]).fit(
            module, PreferenceDataModule(data, batch_size=12, val_fraction=0.0, cache_dir=tmp_path)
        )
        found.append(first.gradients)
    assert difference(*found) < 2e-6


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        (dict(lora=LoRA(r=4)), "adapter_off"),
        (dict(), "copy"),
        (dict(loss="simpo", lora=LoRA(r=4)), "none"),
        (dict(lora=LoRA(r=4), reference_update=ReferenceUpdate()), "copy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_reference_that_is_chosen_is_told(settings, chosen, tiny_model_dir, caplog):
    caplog.set_level("INFO")
    DPOModule(tiny_model_dir, **settings)
    assert f"DPOModule: reference {chosen}." in caplog.text


# ------------------------------------------------------------------------------------------------------- metrics


def test_logged_values_equal_a_plain_computation_for_any_batch_size(
    tiny_model_dir, other_model_dir, tokenizer, tmp_path
):
    data = [{**row, "source": f"s{i % 2}"} for i, row in enumerate(real_pairs())]
    with torch.no_grad():
        c, r, cp, rp, cn, rn = plain_pairs(plain_model(tiny_model_dir), plain_model(other_model_dir), tokenizer, data)
    margin = 0.1 * (c - r)
    won = (margin > 0).double()
    want = {
        "loss": dpo(c, r).item(),
        "accuracy": won.mean().item(),
        "margin": margin.mean().item(),
        "chosen_reward": 0.1 * c.mean().item(),
        "rejected_reward": 0.1 * r.mean().item(),
        "chosen_logprob": cp.mean().item(),
        "rejected_logprob": rp.mean().item(),
    }
    for size in (1, 5, 16):
        module = DPOModule(tiny_model_dir, reference=other_model_dir)
        made = PreferenceDataModule(data, val=data, eval_batch_size=size, cache_dir=tmp_path)
        found = quiet(tmp_path).validate(module, made, verbose=False)[0]
        assert {k: found[f"val/{k}"] for k in want} == pytest.approx(want, rel=1e-4, abs=1e-6)
        assert found["val/accuracy/s0"] == pytest.approx(won[::2].mean().item())
        assert found["val/length_accuracy"] == pytest.approx(((cn > rn).double() + 0.5 * (cn == rn)).mean().item())
        assert found["val/kl"] > 0
    _, _, first = run(tiny_model_dir, tmp_path, **STEP, reference=str(other_model_dir), accumulate=4)
    assert {k: first.metrics[f"train/{k}"] for k in want} == pytest.approx(want, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm", "simpo"])
def test_rewards_are_per_token_where_the_loss_reads_means(name, tiny_model_dir, other_model_dir, tokenizer, tmp_path):
    with torch.no_grad():
        found = plain_pairs(plain_model(tiny_model_dir), plain_model(other_model_dir), tokenizer, real_pairs())
    c, _, cp, _, cn, _ = found
    beta, chosen = {"ipo": (0.1, c), "sigmoid_norm": (2.0, c), "simpo": (2.0, cp)}[name]
    reference = {} if name == "simpo" else {"reference": str(other_model_dir)}
    _, _, first = run(tiny_model_dir, tmp_path, **STEP, loss=name, **reference)
    assert first.metrics["train/chosen_reward"] == pytest.approx(beta * (chosen / cn).mean().item(), rel=1e-4)


def test_two_processes_train_as_one(tiny_model_dir, tmp_path):
    options = dict(max_steps=4, max_epochs=-1, lr=1e-3, use_margin=True, pair_weight="prompt", loss="bco")
    options |= dict(use_margin=False)
    _, one, _ = run(tiny_model_dir, tmp_path / "one", **options)
    two = spawn(tiny_model_dir, tmp_path / "two", devices=2, **options)
    assert difference(two, weights(one)) < 1e-4  # Adam divides by small numbers: rounding grows over the steps
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert a.keys() == b.keys() and "val/accuracy/hh" in a
    for name in a:
        assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name


def test_margins_and_length_penalties_are_subtracted(tiny_model_dir, other_model_dir, tokenizer, tmp_path):
    data = [{**row, "margin": 0.25 * i} for i, row in enumerate(real_pairs())]
    with torch.no_grad():
        c, r, _, _, cn, rn = plain_pairs(plain_model(tiny_model_dir), plain_model(other_model_dir), tokenizer, data)
    want = -F.logsigmoid(0.5 * (c - r) - 0.25 * torch.arange(8) - 0.01 * (cn - rn)).mean().item()
    module = DPOModule(tiny_model_dir, beta=0.5, reference=other_model_dir, shaping=PairShaping(length_alpha=0.01))
    made = PreferenceDataModule(data, val=data, use_margin=True, cache_dir=tmp_path)
    assert quiet(tmp_path).validate(module, made, verbose=False)[0]["val/loss"] == pytest.approx(want, rel=1e-5)


def test_losses_are_added_by_weight(tiny_model_dir, other_model_dir, tokenizer, tmp_path):
    with torch.no_grad():
        c, r, cp, _, cn, _ = plain_pairs(
            plain_model(tiny_model_dir), plain_model(other_model_dir), tokenizer, real_pairs()
        )
    x = 0.3 * (c - r)
    smooth = -0.9 * F.logsigmoid(x) - 0.1 * F.logsigmoid(-x)
    want = (0.8 * smooth - 0.2 * cp / cn).mean().item()
    loss = [WeightedLoss("sigmoid", 0.8, {"label_smoothing": 0.1}), {"name": "sft", "weight": 0.2}]
    _, _, first = run(tiny_model_dir, tmp_path, **STEP, loss=loss, beta=0.3, reference=str(other_model_dir))
    assert first.metrics["train/loss"] == pytest.approx(want, rel=1e-5)


def test_one_is_told_once_that_better_answers_become_less_likely(tiny_model_dir, tmp_path):
    module = DPOModule(tiny_model_dir, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-2, maximize=True), loss="sft",
                       reference="auto")  # fmt: skip
    data = PreferenceDataModule(real_pairs(), batch_size=8, val_fraction=0.0, cache_dir=tmp_path)
    quiet(tmp_path, max_epochs=3).fit(module, data)  # without a reference nobody can tell
    module = DPOModule(tiny_model_dir, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-2, maximize=True),
                       loss=[{"name": "sigmoid", "weight": 1e-6}, {"name": "sft"}])  # fmt: skip
    with pytest.warns(UserWarning, match=r"log-prob fell from -\d.* nats: .*dpop prevents it") as found:
        quiet(tmp_path, max_epochs=3).fit(module, data)
    assert sum("log-prob fell" in str(w.message) for w in found) == 1


# -------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "options", [dict(loss="bco"), dict(lora=True, accumulate=2, workers=2, pair_weight="prompt")], ids=str
)
def test_resume_mid_epoch_equals_uninterrupted_bit_for_bit(options, tiny_model_dir, tmp_path):
    options = {"save_every": 1, **options}
    _, whole, _ = run(tiny_model_dir, tmp_path / "a", **options)
    steps = sorted((tmp_path / "a").glob("step*.ckpt"), key=lambda p: int(p.stem[4:]))
    for place in (1, 5)[bool(options.get("workers")) :]:
        _, resumed, _ = run(tiny_model_dir, tmp_path / f"b{place}", ckpt=str(steps[place]), seed=7, **options)
        assert_equal(weights(resumed), weights(whole))
        assert resumed._delta == whole._delta != 0.0
        assert_equal(dict(resumed.named_parameters()), dict(whole.named_parameters()))  # and the reference


@pytest.mark.parametrize("lora", [True, False])
def test_a_checkpoint_holds_the_policy_alone_and_loads_by_itself(lora, tiny_model_dir, tmp_path):
    loss = [WeightedLoss("sigmoid", 0.5, {"label_smoothing": 0.1}), WeightedLoss("sft")]
    shaping = dict(ld_alpha=0.5)
    trainer, module, _ = run(tiny_model_dir, tmp_path, lora=lora, max_steps=2, loss=loss, shaping=shaping)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    names = {k for k in saved["state_dict"] if not k.startswith("metrics.")}
    assert names == {f"policy.{k}" for k, p in module.policy.named_parameters() if p.requires_grad}
    given = dict(lora=LoRA(r=4)) if lora else {}
    again = DPOModule.load_from_checkpoint(tmp_path / "x.ckpt", optimizer=AdamW, **given)
    assert_equal(weights(again), weights(module))
    assert again.hparams["loss"] == loss and again.hparams["shaping"] == PairShaping(**shaping)
    assert again._reference == module._reference == ("adapter_off" if lora else "copy")


KILLED_SAVING = """
import os, signal, sys, torch
from lightning_rlhf import SaveOnInterrupt
save = torch.save
def killed(content, path):
    save(content, path)
    if isinstance(content, dict) and content.get("global_step") == 3:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed
sys.path.insert(0, {folder!r})
import run_dpo
run_dpo.run({model!r}, {out!r}, callbacks=[SaveOnInterrupt()], **{options!r})
"""


def test_a_run_that_is_killed_while_a_checkpoint_is_written_goes_on(tiny_model_dir, tmp_path):
    """kill -9 with half of the third checkpoint on the disk: the second is whole, and leads to the same end."""
    options = dict(save_every=1, max_steps=5, loss="bco", reference_update=dict(every=2, alpha=0.5), accumulate=2)
    out = tmp_path / "a"
    script = KILLED_SAVING.format(folder=str(SCRIPT.parent), model=str(tiny_model_dir), out=str(out), options=options)
    done = subprocess.run([python(), "-c", script], capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert sorted(file.name for file in out.glob("*step*")) == [".step3.ckpt.partial", "step1.ckpt", "step2.ckpt"]
    second, again = (out / "step2.ckpt").read_bytes(), [SaveOnInterrupt()]
    _, resumed, _ = run(tiny_model_dir, out, ckpt=str(out / "step2.ckpt"), seed=7, callbacks=again, **options)
    _, whole, _ = run(tiny_model_dir, tmp_path / "b", **options)
    assert_equal(dict(resumed.named_parameters()), dict(whole.named_parameters()))  # and the reference
    assert resumed._delta == whole._delta != 0.0
    assert len(list(out.glob("*step*"))) == 5  # the half has made room for the whole
    assert (out / "step2.ckpt").read_bytes() == second  # and no micro-batch of the third step is in it


# --------------------------------------------------------------------------------------------- predict and export


def test_predictions_come_in_order_with_implicit_rewards(tiny_model_dir, other_model_dir, tokenizer, tmp_path):
    data = real_pairs()
    module = DPOModule(tiny_model_dir, beta=0.2, reference=other_model_dir)
    made = PreferenceDataModule(data, predict=data, eval_batch_size=5, cache_dir=tmp_path)
    found = [record for batch in quiet(tmp_path).predict(module, made) for record in batch]
    with torch.no_grad():
        c, r, cp, rp, cn, rn = plain_pairs(plain_model(tiny_model_dir), plain_model(other_model_dir), tokenizer, data)
    pick = lambda a, b: torch.stack([a, b], 1).flatten().tolist()  # noqa: E731
    assert [(f["row"], f["answer"]) for f in found] == [(i, j) for i in range(8) for j in range(2)]
    assert [f["reward"] for f in found] == pytest.approx(pick(0.2 * c, 0.2 * r), rel=1e-4)
    assert [f["logprob"] for f in found] == pytest.approx(pick(cp, rp), rel=1e-5)
    assert [f["tokens"] for f in found] == pick(cn, rn)
    assert all(f.keys() == {"row", "answer", "reward", "logprob", "tokens"} for f in found)


@pytest.mark.parametrize("lora", [True, False])
def test_the_export_is_the_policy(lora, tiny_model_dir, tokenizer, tmp_path):
    export = HFExport(str(tmp_path / "hf"), when="last")
    _, module, _ = run(tiny_model_dir, tmp_path, lora=lora, max_steps=3, callbacks=[export])
    [saved] = [file.parent for file in (tmp_path / "hf").rglob("config.json")]
    again = AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.tensor([tokenizer("The quick brown fox")["input_ids"]])
    with torch.no_grad(), module.policy.native_attention() as model:
        assert torch.allclose(again.eval()(ids).logits, model(ids).logits, atol=1e-5)
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert not torch.allclose(again(ids).logits, start(ids).logits, atol=1e-3)


# ------------------------------------------------------------------------------------------ precomputed references


@pytest.fixture
def counted(monkeypatch):
    """Counts the batches that a reference scores."""
    found = []
    make = ReferenceLogprobs.make

    def counting(self, loader, score, progress):
        return make(self, loader, lambda batch: found.append(len(batch.rows)) or score(batch), progress)

    monkeypatch.setattr(ReferenceLogprobs, "make", counting)
    return found


@pytest.mark.parametrize("options", [dict(accumulate=4, order=1), dict(layout="padded")], ids=str)
def test_a_precomputed_reference_gives_the_gradient_of_the_others(options, tiny_model_dir, tokenizer, tmp_path):
    _, module, first = run(tiny_model_dir, tmp_path, **LORA, reference="precomputed", **options)
    assert difference(first.gradients, plain_adapter_gradients(tiny_model_dir, first.start, tokenizer)) < 2e-6
    assert not hasattr(module, "reference")
    assert type(module.policy).__name__ == "Policy"


def test_validation_and_predictions_read_precomputed_log_probs(tiny_model_dir, tmp_path):
    found = {}
    for reference in ("copy", "precomputed"):
        trainer, module, _ = run(tiny_model_dir, tmp_path / reference, max_steps=3, lr=1e-3, reference=reference)
        data = PreferenceDataModule(rows(), predict=rows(5), val=rows(7), eval_batch_size=3, cache_dir=tmp_path / "c")
        records = quiet(tmp_path).predict(module, data)
        found[reference] = [
            {
                **{k: v.item() for k, v in trainer.callback_metrics.items()},
                **quiet(tmp_path).test(module, data, verbose=False)[0],
            },
            [record["reward"] for batch in records for record in batch],
        ]
    for one, other in zip(found["copy"], found["precomputed"], strict=True):
        assert one == pytest.approx(other, abs=2e-5)
    assert max(map(abs, found["copy"][1])) > 1e-3


@pytest.fixture
def loaded(monkeypatch):
    """Counts how often a reference is loaded."""
    found, load = [], references.load_reference
    monkeypatch.setattr(references, "load_reference", lambda *given: found.append(1) or load(*given))
    return found


@pytest.fixture
def scored(tmp_path, counted, loaded):
    """Trains a step of a start; returns the trees that the reference scored, and how often it was loaded."""

    def once(base, data=None, tokenizer=None, precision="32-true", **settings):
        counted.clear(), loaded.clear()
        L.seed_everything(0, verbose=False)
        module = DPOModule(base, tokenizer, reference="precomputed", **settings)
        made = PreferenceDataModule(data or rows(), batch_size=12, val_fraction=0.3, cache_dir=tmp_path / "cache")
        trainer = quiet(tmp_path, max_steps=1, limit_val_batches=0, precision=precision)
        trainer.fit(module, made)
        once.weights = weights(module)
        assert trainer.callback_metrics["train/margin"] == pytest.approx(0.0, abs=1e-5)
        return sum(counted), len(loaded)

    return once


def changed(base, name, change):
    """Writes a model's weights again, one of which changed, and nothing else of its directory."""
    tensors = load_file(base / name)
    first = sorted(tensors)[0]
    change(tensors[first].view(-1)[:1])
    save_file(tensors, base / name, metadata={"format": "pt"})


def changed_in_place(base):
    """Flips a bit of the weights, and sets the file's time back."""
    file = base / "model.safetensors"
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-2] ^= 1
    with open(file, "r+b") as out:
        out.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def replaced(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def other_tokenizer(base):
    """Of as many tokens, which joins other letters."""
    kept = json.loads((base / "tokenizer.json").read_text())
    kept["model"]["merges"] = kept["model"]["merges"][:-60]
    (base / "tokenizer.json").write_text(json.dumps(kept))


#: What is changed in the directory, and settings that change.
STALE = {
    "data": (None, dict(data=rows(words="cat "))),
    "template": (None, dict(chat_template="zephyr")),
    "tokenizer": (other_tokenizer, {}),
    "dtype": (None, dict(load=Load(dtype="bfloat16"))),
    "quantization": (None, dict(load=Load(quantization="nf4"))),
    "precision": (None, dict(precision="bf16-mixed")),
    "weights": (lambda base: changed(base, "model.safetensors", lambda value: value.add_(1e-3)), {}),
    "weights in place": (changed_in_place, {}),
    "config": (lambda base: replaced(base / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), {}),
}


@pytest.mark.parametrize("name", STALE)
def test_a_stale_cache_is_never_read(name, wide_model_dir, tmp_path, scored):
    if name == "quantization":
        pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"
    shutil.copytree(wide_model_dir, base)
    change, settings = STALE[name]
    assert scored(base, lora=LoRA(r=4)) == (24, 1)
    if change is not None:
        change(base)
    assert scored(base, lora=LoRA(r=4), **settings) == (24, 1)
    assert scored(base, lora=LoRA(r=4), **settings) == (0, 0)


def test_stale_adapters_and_their_base_are_never_read(tiny_model_dir, tmp_path, scored):
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    shutil.copytree(tiny_model_dir, base)
    model = LoRA(r=4).wrap(AutoModelForCausalLM.from_pretrained(base))
    for name, p in model.named_parameters():
        p.data += 0.01 * ("lora_B" in name)
    model.save_pretrained(adapters)
    AutoTokenizer.from_pretrained(base).save_pretrained(adapters)
    assert json.loads((adapters / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert scored(adapters) == (24, 1) and scored(adapters) == (0, 0)
    changed(adapters, "adapter_model.safetensors", lambda value: value.add_(1e-2))
    assert scored(adapters) == (24, 1)
    replaced(adapters / "adapter_config.json", '"lora_alpha": 32.0', '"lora_alpha": 16.0')
    assert scored(adapters) == (24, 1)
    changed(base, "model.safetensors", lambda value: value.add_(1e-3))
    assert scored(adapters) == (24, 1) and scored(adapters) == (0, 0)


def test_a_start_that_is_found_trains_as_one_that_is_loaded(tiny_model_dir, tmp_path, scored):
    """Adapters begin from the same random numbers; of the same weights elsewhere the log-probs are the same."""
    assert scored(tiny_model_dir, lora=LoRA(r=4)) == (24, 1)
    first = scored.weights
    assert scored(tiny_model_dir, lora=LoRA(r=4)) == (0, 0)
    assert_equal(scored.weights, first)
    assert scored(tiny_model_dir) == (0, 0)  # without adapters the same start
    shutil.copytree(tiny_model_dir, tmp_path / "elsewhere")
    assert scored(tmp_path / "elsewhere") == (0, 1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    for added in (0.0, 1e-3):  # a model object is hashed each time
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        model.lm_head.weight.data[7, 3] += added
        assert scored(model, tokenizer=tokenizer) == (24 if added else 0, 1)


def test_a_command_computes_them_ahead(tiny_model_dir, tmp_path, counted, capsys):
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    options = [
        "--model", "DPOModule", "--model.pretrained", str(tiny_model_dir), "--data", "PreferenceDataModule",
        "--data.train", str(tmp_path / "my.jsonl"), "--data.cache_dir", str(tmp_path / "cache"),
        "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps", "1",
        "--trainer.enable_progress_bar", "false", "--trainer.logger", "false",
    ]  # fmt: skip
    main(["score-reference", *options])
    assert sum(counted) == 24
    out, error = capsys.readouterr()
    assert f"The reference's log-probs are in {tmp_path / 'cache' / 'reference'}." in out
    assert "reference log-probs, train  " in error
    assert not list(tmp_path.rglob("*.ckpt"))
    main(["fit", *options, "--model.reference", "precomputed", "--trainer.enable_checkpointing", "false"])
    main(["score-reference", *options])
    assert sum(counted) == 24
    with pytest.raises(SystemExit, match=r"score-reference: .*SFTModule has no reference\."):
        main(["score-reference", "--model", "SFTModule", *options[2:]])


KILLED = """
import os, signal, sys
from lightning_rlhf.data.reference import ReferenceLogprobs
make = ReferenceLogprobs.make
def killed(self, loader, score, progress):
    make(self, loader, score, lambda done: os.kill(os.getpid(), signal.SIGKILL) if done == 2 else None)
ReferenceLogprobs.make = killed
sys.path.insert(0, {folder!r})
import run_dpo
run_dpo.run({model!r}, {out!r}, max_steps=2, reference="precomputed")
"""


def test_a_run_that_is_killed_while_they_are_computed_goes_on(tiny_model_dir, tmp_path, counted):
    script = KILLED.format(folder=str(SCRIPT.parent), model=str(tiny_model_dir), out=str(tmp_path / "a"))
    done = subprocess.run([python(), "-c", script], capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    [partial] = (tmp_path / "a" / "cache" / "reference").iterdir()
    assert partial.suffix == ".partial"
    _, again, _ = run(tiny_model_dir, tmp_path / "a", max_steps=2, reference="precomputed")
    went_on = sum(counted)
    counted.clear()
    _, whole, _ = run(tiny_model_dir, tmp_path / "b", max_steps=2, reference="precomputed")
    assert 0 < went_on < sum(counted)
    assert_equal(weights(again), weights(whole))
    assert {file.suffix for file in (tmp_path / "a" / "cache" / "reference").iterdir()} == {".logprobs"}


def test_a_disk_that_is_full_ends_it_with_a_line_and_loses_nothing(tiny_model_dir, tmp_path, counted, monkeypatch):
    options = dict(max_steps=2, val_fraction=0.0, reference="precomputed")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, start: pwrite(file, data if start < 600 else b"", start))
    with pytest.raises(DataError, match=r"reference can't be written: No space left on device\. Set data\.cache_dir"):
        run(tiny_model_dir, tmp_path / "a", **options)
    monkeypatch.undo()
    counted.clear()
    _, again, _ = run(tiny_model_dir, tmp_path / "a", **options)
    _, whole, _ = run(tiny_model_dir, tmp_path / "b", **options)
    assert_equal(weights(again), weights(whole))


def test_a_file_that_was_cut_off_is_made_again(tiny_model_dir, tmp_path):
    options = dict(max_steps=2, val_fraction=0.0, reference="precomputed")
    _, whole, _ = run(tiny_model_dir, tmp_path, **options)
    [file] = (tmp_path / "cache" / "reference").iterdir()
    size = file.stat().st_size
    os.truncate(file, size // 2)
    _, again, _ = run(tiny_model_dir, tmp_path, **options)
    assert_equal(weights(again), weights(whole))
    assert file.stat().st_size == size and len([*file.parent.iterdir()]) == 1


def test_two_processes_share_the_work(tiny_model_dir, tmp_path):
    options = dict(max_steps=3, lr=1e-3, reference="precomputed")
    two = spawn(tiny_model_dir, tmp_path / "two", devices=2, **options)
    _, one, _ = run(tiny_model_dir, tmp_path / "one", **options)
    assert difference(two, weights(one)) < 1e-4
    files = [sorted((tmp_path / name / "cache" / "reference").iterdir()) for name in ("one", "two")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    for one, two in zip(*files, strict=True):
        values = [np.fromfile(file, np.float32) for file in (one, two)]
        assert np.allclose(*values, atol=1e-5)


def test_resumed_from_a_checkpoint_the_reference_is_the_start(tiny_model_dir, tmp_path):
    options = dict(save_every=1, reference="precomputed", max_epochs=1)
    _, whole, _ = run(tiny_model_dir, tmp_path / "a", **options)
    place = tmp_path / "a" / "step2.ckpt"
    _, resumed, _ = run(tiny_model_dir, tmp_path / "b", ckpt=str(place), seed=7, **options)  # with another cache
    assert_equal(weights(resumed), weights(whole))


def test_what_can_not_be_precomputed_is_named(tiny_model_dir, tmp_path):
    tree = Tree([1, 5, 6], [Branch([8, 9, 4]), Branch([7])], pairs=[Pair(0, 1)])
    with pytest.raises(ValueError, match=r"reference: precomputed needs a PreferenceDataModule"):
        quiet(tmp_path, max_steps=1).fit(
            DPOModule(tiny_model_dir, reference="precomputed"), DataLoader([tree], collate_fn=pack)
        )
    with pytest.raises(ValueError, match="reference is precomputed, but the loss reads none"):
        DPOModule(tiny_model_dir, loss="simpo", reference="precomputed")


# ------------------------------------------------------------------------------------------------------ own losses


def squared(pairs, target: float = 1.0):
    """A loss of one's own."""
    return (pairs.better_ratio - pairs.worse_ratio - target) ** 2


def averaged(pairs):
    return pairs.better.mean()


unreferred = PairLoss(lambda pairs: -pairs.better, reference=False)


def test_a_loss_of_ones_own_is_taken_by_import_path(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_losses.py").write_text(
        "from lightning_rlhf.functional import PairLoss\n"
        "def squared(pairs, target=1.0):\n    return (pairs.better_ratio - pairs.worse_ratio - target) ** 2\n"
        "likely = PairLoss(lambda pairs: -pairs.better, reference=False)\n"
    )
    _, module, first = run(tiny_model_dir, tmp_path, **STEP, loss="my_losses.squared")
    assert first.metrics["train/loss"] == pytest.approx(1.0) and module._reference == "copy"
    loss = [WeightedLoss("my_losses:squared", settings={"target": 2.0})]
    assert run(tiny_model_dir, tmp_path, **STEP, loss=loss)[2].metrics["train/loss"] == pytest.approx(4.0)
    assert DPOModule(tiny_model_dir, loss="my_losses.likely")._reference == "none"
    assert DPOModule(tiny_model_dir, loss=squared)._reference == "copy"
    with pytest.raises(ImportError, match=r"Can't import the loss 'my_losses\.square': my_losses has no square"):
        DPOModule(tiny_model_dir, loss="my_losses.square")


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(beta=0.0), "beta must be above 0, got 0.0"),
        (dict(beta=-0.1), "beta must be above 0, got -0.1"),
        (dict(beta=math.nan), "beta must be above 0"),
        (dict(beta=0.1, loss="orpo"), "beta is 0.1, but the loss orpo has no beta"),
        (dict(loss="sigmod"), "There is no loss 'sigmod'; did you mean sigmoid? All: sigmoid, robust"),
        (dict(loss=[]), "loss is an empty list"),
        (dict(loss=["sigmoid", "sft"]), "loss has the part 'sigmoid': give a WeightedLoss, or a dict of name, weight"),
        (dict(loss=[{"names": "sigmoid"}]), "loss has the part {'names': 'sigmoid'}: give"),
        (dict(loss=[{"name": "sigmoid", "settings": None}]), "The settings of the loss sigmoid are None: give {name"),
        (
            dict(loss=[WeightedLoss("ipo", settings={"label_smoothing": 0.1})]),
            "The loss ipo has no setting 'label_smoothing'. It has: beta, average.",
        ),
        (
            dict(loss=[WeightedLoss("robust", settings={"label_smoothing": -0.1})]),
            "The setting label_smoothing of the loss robust must be at least 0 and below 0.5, got -0.1",
        ),
        (
            dict(loss=[WeightedLoss("sigmoid", settings={"label_smoothing": 0.5})]),
            "The setting label_smoothing of the loss sigmoid must be at least 0 and below 0.5, got 0.5",
        ),
        (
            dict(loss=[WeightedLoss("exo", settings={"label_smoothing": 0.0})]),
            "The setting label_smoothing of the loss exo must be above 0 and below 0.5, got 0.0",
        ),
        (dict(loss=[WeightedLoss("ipo", settings={"average": 1.0})]), "average of the loss ipo must be true or false"),
        (dict(loss=[WeightedLoss("ipo", settings={"beta": True})]), "beta of the loss ipo must be a number, got True"),
        (dict(loss="simpo", reference="copy"), "reference is copy, but the loss reads none"),
        (dict(loss="simpo", shaping=PairShaping(f_divergence="forward_kl")), "but the loss reads no reference"),
        (dict(loss="ipo", shaping=PairShaping(length_alpha=0.1)), "length_alpha is set, but the loss has no place"),
        (dict(reference="none"), "reference is none, but the loss reads one"),
        (dict(reference="adapter_off"), "there are no adapters"),
        (dict(loss="math.pi"), "loss: math.pi is a float"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, words, tiny_model_dir):
    with pytest.raises(ValueError) as error:
        DPOModule(tiny_model_dir, **settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_settings_of_groups_have_ranges():
    for wrong, words in (
        (dict(ld_alpha=1.5), "shaping.ld_alpha must be at least 0 and at most 1"),
        (dict(f_alpha=0.0), "shaping.f_alpha must be above 0 and below 1"),
        (dict(length_alpha=-1.0), "shaping.length_alpha must be at least 0"),
        (dict(f_divergence="kl"), "shaping.f_divergence is 'kl'. Choose one of: reverse_kl"),
    ):
        with pytest.raises(ValueError, match=words):
            PairShaping(**wrong)
    with pytest.raises(ValueError, match=r"loss\.weight must be above 0"):
        WeightedLoss("sigmoid", 0.0)


def test_a_reference_that_reads_tokens_as_others_is_named(tiny_model_dir, stories_model_dir):
    with pytest.raises(ValueError, match=r"^reference='.*stories260K' has another tokenizer than the policy.* copy\.$"):
        DPOModule(tiny_model_dir, reference=str(stories_model_dir))
    small = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    small.resize_token_embeddings(16)
    with pytest.raises(ValueError, match="The reference has 16 embeddings"):
        DPOModule(tiny_model_dir, reference=small)


def test_margins_that_no_loss_reads_are_named(tiny_model_dir, tmp_path):
    made = PreferenceDataModule(rows(), use_margin=True, val_fraction=0.0, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="this loss has no place for them: set"):
        quiet(tmp_path, max_steps=1).fit(DPOModule(tiny_model_dir, loss="ipo"), made)


def test_a_loss_that_is_no_loss_per_pair_is_named(tiny_model_dir, tmp_path):
    made = PreferenceDataModule(real_pairs(), val_fraction=0.0, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"The loss averaged returned the shape \(\) for \d pairs"):
        quiet(tmp_path, max_steps=1).fit(DPOModule(tiny_model_dir, loss=averaged), made)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (dict(chosen="b", rejected="b"), "no difference: the column 'chosen' and the column 'rejected' are the same"),
        (dict(chosen="b", rejected=""), r"with the column 'rejected', turn 2 \(assistant\) is empty"),
        (dict(chosen="b", rejected="c", margin=math.nan), "the column 'margin' is nan"),
        (dict(answers=["b", "c"], scores=[1, 1]), "all answers are tied"),
        (dict(ranked=["b"]), "the column 'ranked' holds 1 of the two or more answers that a comparison needs"),
        (dict(completion="b", label=True), "the column 'label' rates a single answer.* KTOModule and Unpaired"),
        (dict(completion="b", rating=4), "the column 'rating' rates a single answer.* KTOModule and Unpaired"),
    ],
    ids=["equal", "empty", "margin", "tied", "alone", "unpaired", "rated"],
)
def test_bad_rows_are_named_with_file_and_line(row, words, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = dict(prompt="a", chosen="b", rejected="c")
    Path("my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (good, {"prompt": "a", **row})))
    made = PreferenceDataModule("my.jsonl", val_fraction=0.0, use_margin=True, cache_dir=tmp_path)
    with pytest.raises(BadRowError, match=rf"^my\.jsonl:2: .*{words}"):
        quiet(tmp_path, max_steps=1).fit(DPOModule(tiny_model_dir), made)


def test_data_without_a_pair_are_named(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for rows, words in (
        ([], r"there is none\. Add rows"),
        ([dict(prompt="a", answers=["b", "c"], scores=[1, 1])] * 2, r"all 2 were skipped: 2 x no pair .*my\.jsonl:1"),
    ):
        Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = PreferenceDataModule("my.jsonl", on_bad_row="skip", cache_dir=tmp_path)
        with pytest.raises(DataError, match=rf"No usable row in the train data \(my\.jsonl\): {words}"):
            quiet(tmp_path, max_steps=1).fit(DPOModule(tiny_model_dir), made)


def test_settings_of_the_table_are_all_known():
    """Each loss takes its defaults, and its settings are in range."""
    for name in LOSSES:
        found = LossSum(name, None)
        [part] = found._parts
        settings = {k: v for k, v in part.settings.items() if k != "delta"}
        LossSum([WeightedLoss(name, settings=settings)], None)


def test_a_model_object_keeps_its_start_as_the_reference(tiny_model_dir, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    module = DPOModule(model, tokenizer, optimizer=lambda p: AdamW(p, lr=1e-2))
    data = PreferenceDataModule(real_pairs(), batch_size=4, val_fraction=0.0, cache_dir=tmp_path)
    quiet(tmp_path, max_steps=3).fit(module, data)
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert_equal(dict(module.reference.transformer.named_parameters()), dict(start.named_parameters()))
    assert not any(p.requires_grad for p in module.reference.parameters())


def test_dropout_is_off(tiny_model_dir, tmp_path):
    module = DPOModule(tiny_model_dir, lora=LoRA(r=4, dropout=0.5), load=Load(gradient_checkpointing=True))
    first = run_dpo.First(False)
    data = PreferenceDataModule(real_pairs(), batch_size=16, val_fraction=0.0, cache_dir=tmp_path)
    quiet(tmp_path, max_steps=1, callbacks=[first]).fit(module, data)
    assert first.metrics["train/margin"] == 0.0
