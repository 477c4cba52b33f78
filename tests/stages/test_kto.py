"""The KTO stage: the loss's definition, what the split changes, references, exact resume, what is refused."""

import json
import math
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from runs import assert_equal, difference, load_script, quiet, spawn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf import HFExport, KTOModule, LoRA, PreferenceDataModule, UnpairedDataModule
from lightning_rlhf.cli import main
from lightning_rlhf.data import Branch, Tree, pack

SCRIPT = Path(__file__).with_name("run_kto.py")
run_kto = load_script(SCRIPT)
run, rows = run_kto.run, run_kto.rows
spawn = partial(spawn, SCRIPT)
STEP = dict(max_steps=1, val_fraction=0.0, batch_size=24)
WEIGHTS = dict(beta=0.2, desirable_weight=1.5, undesirable_weight=0.75)


def weights(module):
    return {k: v.detach().clone() for k, v in module.policy.named_parameters()}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


# --------------------------------------------------------------------------------------- the same by plain transformers


class Seen(L.Callback):
    """Keeps which answers stood in which micro-batch, with their mismatches, as token ids."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((answers_of(batch), answers_of(batch.mismatched), batch.labels.good.tolist()))


def answers_of(batch):
    """(prompt, answer) of each branch; none of a filler."""
    ids = batch.input_ids.tolist()
    cut = lambda span: ids[span.start : span.start + span.length]  # noqa: E731
    found = [(cut(prompt), cut(branch)) for prompt, branches in batch.forest.trees for branch in branches]
    return found if batch.weight.any() else []


def plain_logprobs(model, pairs):
    """Summed log-probs of answers behind their prompts, padded on the right."""
    width = max(len(p) + len(a) for p, a in pairs)
    ids = torch.tensor([[*p, *a, *[0] * (width - len(p) - len(a))] for p, a in pairs])
    mask = torch.tensor([[1] * (len(p) + len(a)) + [0] * (width - len(p) - len(a)) for p, a in pairs])
    read = torch.tensor([[0] * len(p) + [1] * len(a) + [0] * (width - len(p) - len(a)) for p, a in pairs])[:, 1:]
    logits = model(input_ids=ids, attention_mask=mask).logits
    return (logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * read).sum(1)


def plain_model(path, state=None):
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float64)
    if state is not None:
        model.load_state_dict(state)
    return model.eval()


def plain_ratios(policy, reference, pairs):
    with torch.no_grad():
        base = plain_logprobs(reference, pairs)
    return plain_logprobs(policy, pairs) - base


def plain_loss(policy, reference, batches, loss="kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.75):
    """The step's loss: a z0 for each micro-batch, the mean over all answers; and the z0s."""
    total, points = 0.0, []
    for own, mismatched, good in batches:
        if not own:
            continue
        with torch.no_grad():
            z0 = plain_ratios(policy, reference, mismatched).mean().clamp(min=0)
        z0 = z0 if loss == "kto" else torch.zeros(())
        points.append(z0.item())
        good = torch.tensor(good)
        value = torch.sigmoid(beta * torch.where(good, 1.0, -1.0) * (plain_ratios(policy, reference, own) - z0))
        total = total + (torch.where(good, desirable_weight, undesirable_weight) * (1 - value)).sum()
    return total / sum(len(own) for own, _, _ in batches), points


def plain_gradient(model_dir, other, batches, **settings):
    policy, reference = plain_model(model_dir), plain_model(other)
    loss, points = plain_loss(policy, reference, batches, **settings)
    loss.backward()
    return {f"model.{k}": p.grad for k, p in policy.named_parameters()}, loss.item(), points


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(each=4),
        dict(each=4, order=1, layout="padded"),
        dict(each=4, max_answers=1),
        dict(each=4, accumulate=3, order=2),
        dict(accumulate=30),  # more micro-batches than answers
        dict(each=4, checkpointing=True),
        dict(each=4, loss="apo_zero_unpaired", accumulate=2),
    ],
    ids=str,
)
def test_step_gradient_is_that_of_a_padded_model(options, tiny_model_dir, other_model_dir, tmp_path):
    """2e-6 relative to a padded model in fp64, with the z0 of each micro-batch."""
    seen, loss = Seen(), options.get("loss", "kto")
    if loss != "kto":
        seen.on_train_batch_start = lambda trainer, module, batch, i: seen.batches.append(
            (answers_of(batch), (), batch.labels.good.tolist())
        )
    _, _, first = run(
        tiny_model_dir, tmp_path, **STEP, **WEIGHTS, **options, reference=str(other_model_dir), callbacks=[seen]
    )
    batches = seen.batches
    if loss != "kto":
        assert all(not mismatched for _, mismatched, _ in batches)
        batches = [(own, own, good) for own, _, good in batches]
    want, value, points = plain_gradient(tiny_model_dir, other_model_dir, batches, loss=loss)
    assert difference(first.gradients, want) < 2e-6
    assert first.metrics["train/loss"] == pytest.approx(value, rel=1e-5)
    counts = [len(own) for own, _, _ in batches if own]
    mean = sum(n * z0 for n, z0 in zip(counts, points, strict=True)) / sum(counts)
    assert first.metrics["train/z0"] == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert loss != "kto" or mean > 0.1  # otherwise nothing is tested


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_all_references_give_the_same_gradient_on_ranked_pairs(quantization, wide_model_dir, assets, tmp_path):
    """Eight pairs taken apart, beside a padded model in fp64; in NF4 one of the weights as they were rounded."""
    rounded = run_kto.rounded_weights(wide_model_dir) if quantization else None
    answers = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in run_kto.real_pairs(files=[assets / "data" / "preference.jsonl"])
        for name in ("chosen", "rejected")
    ]
    found = {}
    for reference in ("adapter_off", "copy", "precomputed"):
        seen = Seen()
        data = UnpairedDataModule(answers, batch_size=16, val_fraction=0.0, cache_dir=tmp_path / reference)
        options = dict(lora=True, fill=True, quantization=quantization, checkpointing=True, callbacks=[seen])
        _, _, first = run(wide_model_dir, tmp_path, max_steps=1, **WEIGHTS, **options, data=data, reference=reference)
        found[reference] = first.gradients
    policy, start = plain_model(wide_model_dir, rounded), plain_model(wide_model_dir, rounded)
    gradients = run_kto.merge(policy, first.start)
    loss, [z0] = plain_loss(policy, start, seen.batches)
    loss.backward()
    assert z0 > 0.01  # otherwise it is not tested
    for one in found.values():
        assert difference(one, gradients()) < 2e-6
        assert difference(one, found["adapter_off"]) < 2e-6


@pytest.mark.distributed
def test_two_ranks_have_the_gradient_of_one(tiny_model_dir, other_model_dir, tmp_path):
    """One micro-batch a step: z0 is the mean over both ranks."""
    options = dict(**STEP, **WEIGHTS, each=4, reference=str(other_model_dir))
    _, _, first = run(tiny_model_dir, tmp_path / "one", **options)
    spawn(tiny_model_dir, tmp_path / "two", devices=2, **options)
    assert difference(torch.load(tmp_path / "two" / "gradients.pt"), first.gradients) < 2e-6
    logged = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert {k: logged[k] for k in first.metrics} == pytest.approx(first.metrics, rel=1e-5)


@pytest.mark.distributed
def test_ranks_without_rows_wait_for_nobody(tiny_model_dir, tmp_path):
    """One tree a step: the second rank has fillers alone, in training and in validation."""
    options = dict(batch_size=1, max_steps=4, n=8, val_fraction=0.4)
    found = spawn(tiny_model_dir, tmp_path / "two", devices=2, **options)
    _, one, _ = run(tiny_model_dir, tmp_path / "one", **options)
    assert difference(found, weights(one)) < 1e-4


def test_micro_batches_change_the_reference_point_and_nothing_else(tiny_model_dir, other_model_dir, tmp_path):
    found = {}
    for loss in ("kto", "apo_zero_unpaired"):
        for accumulate in (1, 3):
            options = dict(**STEP, loss=loss, accumulate=accumulate, reference=str(other_model_dir))
            found[loss, accumulate] = run(tiny_model_dir, tmp_path, **options)[2].gradients
    assert difference(found["apo_zero_unpaired", 3], found["apo_zero_unpaired", 1]) < 2e-6
    assert 1e-5 < difference(found["kto", 3], found["kto", 1]) < 0.1


def test_the_reference_point_takes_no_gradient_under_autocast(tiny_model_dir, other_model_dir, tmp_path):
    """Weights that were cast without gradients must not serve the pass that has them."""
    options = dict(**STEP, reference=str(other_model_dir))
    _, _, half = run(tiny_model_dir, tmp_path, precision="bf16-mixed", **options)
    _, _, whole = run(tiny_model_dir, tmp_path, **options)
    assert difference(half.gradients, whole.gradients) < 0.1


# ---------------------------------------------------------------------------------------------------- the beginning


@pytest.mark.parametrize(
    "options",
    [dict(), dict(lora=True, each=4), dict(lora=True, reference="copy"), dict(loss="apo_zero_unpaired"),
     dict(lora=True, checkpointing=True, accumulate=3), dict(reference="precomputed")],
    ids=str,
)  # fmt: skip
def test_at_the_start_the_loss_is_half_the_weights(options, tiny_model_dir, tmp_path):
    _, _, first = run(tiny_model_dir, tmp_path, **STEP, **WEIGHTS, **options)
    found, near = first.metrics, 1e-6 if options.get("reference") == "precomputed" else 0.0
    assert found["train/loss"] == pytest.approx(0.5 * (16 * 1.5 + 8 * 0.75) / 24, abs=near)
    for name in ("z0", "margin", "chosen_reward", "rejected_reward", "kl"):
        assert found[f"train/{name}"] == pytest.approx(0.0, abs=10 * near)


@pytest.mark.parametrize("reference", ["copy", "precomputed"])
def test_references_agree(reference, tiny_model_dir, tmp_path):
    """With adapters that are not zero, over two epochs with different mismatches."""
    options = dict(lora=True, fill=True, each=4, batch_size=24, val_fraction=0.0, lr=1e-3)
    _, _, want = run(tiny_model_dir, tmp_path / "a", reference="adapter_off", **options)
    _, module, found = run(tiny_model_dir, tmp_path / "b", reference=reference, **options)
    assert difference(found.gradients, want.gradients) < 2e-6
    assert found.metrics == pytest.approx(want.metrics, rel=2e-3, abs=1e-5)
    assert hasattr(module, "reference") == (reference == "copy")


# ------------------------------------------------------------------------------------------------------- metrics


def test_logged_values_equal_a_plain_computation(tiny_model_dir, other_model_dir, tmp_path):
    data = rows(12, each=3)
    made = partial(UnpairedDataModule, data, val=data, cache_dir=tmp_path)
    module = KTOModule(tiny_model_dir, reference=other_model_dir)
    seen = made(eval_batch_size=12)
    found = quiet(tmp_path).validate(module, seen, verbose=False)[0]
    [batch] = seen.val_dataloader()
    with torch.no_grad():
        policy, reference = plain_model(tiny_model_dir), plain_model(other_model_dir)
        loss, [z0] = plain_loss(
            policy, reference, [(answers_of(batch), answers_of(batch.mismatched), batch.labels.good.tolist())],
            beta=0.1, desirable_weight=1.0, undesirable_weight=1.0,
        )  # fmt: skip
        pairs = answers_of(batch)
        ratio, logprob = plain_ratios(policy, reference, pairs), plain_logprobs(policy, pairs)
    good = torch.tensor([row["label"] for row in data])
    assert batch.labels.good.tolist() == good.tolist()
    better = [(i, j) for i in range(12) for j in range(12) if i // 3 == j // 3 and good[i] and not good[j]]
    assert len(better) == 8
    margins = torch.tensor([ratio[i] - ratio[j] for i, j in better])
    longer = torch.tensor([float(len(pairs[i][1]) - len(pairs[j][1])) for i, j in better])
    want = {
        "loss": loss.item(),
        "z0": z0,
        "accuracy": (margins > 0).double().mean().item(),
        "length_accuracy": ((longer > 0).double() + 0.5 * (longer == 0)).mean().item(),
        "chosen_reward": 0.1 * ratio[good].mean().item(),
        "rejected_reward": 0.1 * ratio[~good].mean().item(),
        "margin": 0.1 * (ratio[good].mean() - ratio[~good].mean()).item(),
        "chosen_logprob": logprob[good].mean().item(),
        "rejected_logprob": logprob[~good].mean().item(),
    }
    assert {k: found[f"val/{k}"] for k in want} == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert {"val/accuracy/hh", "val/accuracy/books", "val/kl"} <= found.keys()
    small = quiet(tmp_path).test(module, made(test=data, eval_batch_size=3), verbose=False)[0]
    same = [k for k in want if k not in ("loss", "z0")]  # z0 is the batch's
    assert {k: small[f"test/{k}"] for k in same} == pytest.approx({k: want[k] for k in same}, rel=1e-4, abs=1e-6)


# -------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("options", [dict(each=2), dict(lora=True, accumulate=2, workers=2)], ids=str)
def test_resume_mid_epoch_equals_uninterrupted_bit_for_bit(options, tiny_model_dir, tmp_path):
    options = {"save_every": 1, "batch_size": 6, **options}
    whole_seen = Seen()
    _, whole, _ = run(tiny_model_dir, tmp_path / "a", callbacks=[whole_seen], **options)
    steps = sorted((tmp_path / "a").glob("step*.ckpt"), key=lambda p: int(p.stem[4:]))
    for place in (1, len(steps) - 2)[bool(options.get("workers")) :]:
        seen = Seen()
        _, resumed, _ = run(tiny_model_dir, tmp_path / f"b{place}", ckpt=str(steps[place]), seed=7, callbacks=[seen],
                            **options)  # fmt: skip
        assert_equal(weights(resumed), weights(whole))
        assert_equal(dict(resumed.named_parameters()), dict(whole.named_parameters()))  # and the reference
        assert seen.batches == whole_seen.batches[-len(seen.batches) :]
    first, second = (
        whole_seen.batches[: len(whole_seen.batches) // 2],
        whole_seen.batches[len(whole_seen.batches) // 2 :],
    )
    pairing = [
        {json.dumps(own): other for batch in epoch for own, other in zip(batch[0], batch[1], strict=True)}
        for epoch in (first, second)
    ]
    assert pairing[0].keys() == pairing[1].keys() and pairing[0] != pairing[1]


@pytest.mark.parametrize("lora", [True, False])
def test_a_checkpoint_holds_the_policy_alone_and_loads_by_itself(lora, tiny_model_dir, tmp_path):
    trainer, module, _ = run(tiny_model_dir, tmp_path, lora=lora, max_steps=2, **WEIGHTS)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    names = {k for k in saved["state_dict"] if not k.startswith("metrics.")}
    assert names == {f"policy.{k}" for k, p in module.policy.named_parameters() if p.requires_grad}
    given = dict(lora=LoRA(r=4)) if lora else {}
    again = KTOModule.load_from_checkpoint(tmp_path / "x.ckpt", optimizer=AdamW, **given)
    assert_equal(weights(again), weights(module))
    assert {k: again.hparams[k] for k in WEIGHTS} == WEIGHTS


# --------------------------------------------------------------------------------------------- predict and export


@pytest.mark.parametrize("reference", ["other", "precomputed"])
def test_predictions_come_in_order_with_implicit_rewards(reference, tiny_model_dir, other_model_dir, tmp_path):
    """Of answers with and without labels, of pairs, and of answers of one prompt that are not side by side."""
    data = [{"prompt": "Say", "completion": "fox"}, {"prompt": "Hello", "chosen": "Paris", "rejected": "dog"},
            {"prompt": "Say", "completion": "dog dog", "label": False}]  # fmt: skip
    module = KTOModule(tiny_model_dir, beta=0.2, reference=other_model_dir if reference == "other" else reference)
    made = UnpairedDataModule(rows(), predict=data, eval_batch_size=2, cache_dir=tmp_path)
    found = [record for batch in quiet(tmp_path).predict(module, made) for record in batch]
    assert [(f["row"], f["answer"]) for f in found] == [(0, 0), (1, 0), (1, 1), (2, 0)]
    assert [made.where("predict", i) for i in range(3)] == [
        made.where("predict", f["row"]) for f in found if not f["answer"]
    ]
    batches = [answers_of(batch) for batch in made.predict_dataloader()]
    pairs = [pair for batch in batches for pair in batch]
    with torch.no_grad():
        policy, other = plain_model(tiny_model_dir), plain_model(other_model_dir)
        ratio, logprob = plain_ratios(policy, other, pairs), plain_logprobs(policy, pairs)
    assert [f["logprob"] for f in found] == pytest.approx(logprob.tolist(), rel=1e-5)
    want = (0.2 * ratio).tolist() if reference == "other" else [0.0] * 4
    assert [f["reward"] for f in found] == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert [f["tokens"] for f in found] == [len(answer) for _, answer in pairs]


def test_the_export_is_the_policy(tiny_model_dir, tokenizer, tmp_path):
    export = HFExport(str(tmp_path / "hf"), when="last")
    _, module, _ = run(tiny_model_dir, tmp_path, max_steps=3, callbacks=[export])
    [saved] = [file.parent for file in (tmp_path / "hf").rglob("config.json")]
    again = AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.tensor([tokenizer("The quick brown fox")["input_ids"]])
    with torch.no_grad(), module.policy.native_attention() as model:
        assert torch.allclose(again.eval()(ids).logits, model(ids).logits, atol=1e-5)


def test_a_command_computes_log_probs_ahead(tiny_model_dir, tmp_path, capsys):
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    main([
        "score-reference", "--model", "KTOModule", "--model.pretrained", str(tiny_model_dir), "--data",
        "UnpairedDataModule", "--data.train", str(tmp_path / "my.jsonl"), "--data.cache_dir", str(tmp_path / "cache"),
        "--data.val_fraction", "0.3", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path),
        "--trainer.max_epochs", "2",
    ])  # fmt: skip
    assert "The reference's log-probs are in" in capsys.readouterr().out
    assert len(list((tmp_path / "cache" / "reference").glob("*.logprobs"))) == 5  # 2 epochs' mismatches, and val's


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(beta=0.0), "beta must be above 0, got 0.0"),
        (dict(beta=math.nan), "beta must be above 0"),
        (dict(desirable_weight=-0.1), "desirable_weight must be at least 0, got -0.1"),
        (dict(undesirable_weight=-1.0), "undesirable_weight must be at least 0, got -1.0"),
        (dict(undesirable_weight=math.nan), "undesirable_weight must be at least 0"),
        (dict(loss="dpo"), "loss is 'dpo'. Choose one of: kto, apo_zero_unpaired"),
        (dict(reference="none"), "reference is none, but the loss reads one"),
        (dict(reference="adapter_off"), "there are no adapters"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, words, tiny_model_dir):
    with pytest.raises(ValueError) as error:
        KTOModule(tiny_model_dir, **settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_one_prompt_is_enough_without_a_reference_point(tiny_model_dir, tmp_path):
    data = [{"prompt": "Say", "completion": f"{i} fox", "label": i % 2 == 0} for i in range(6)]
    options = dict(val_fraction=0.0, cache_dir=tmp_path)
    trainer = quiet(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"The train data have one first user turn alone.*apo_zero_unpaired"):
        trainer.fit(KTOModule(tiny_model_dir), UnpairedDataModule(data, **options))
    trainer = quiet(tmp_path, max_steps=1)
    trainer.fit(KTOModule(tiny_model_dir, loss="apo_zero_unpaired"), UnpairedDataModule(data, **options))
    assert trainer.callback_metrics["train/loss"] == 0.5


def test_batches_of_ones_own_need_labels_and_mismatches(tiny_model_dir, tmp_path):
    tree = Tree([1, 5, 6], [Branch([8, 9, 4]), Branch([7])], labels=[True, False])
    for trees, words in (
        ([tree._replace(labels=())], r"Trees say by labels=\[True, False\] which branches are good"),
        ([tree], "needs mismatched answers, and the batch has none"),
    ):
        with pytest.raises(Exception, match=words):
            quiet(tmp_path, max_steps=1).fit(KTOModule(tiny_model_dir), DataLoader(trees, collate_fn=pack))
    trainer = quiet(tmp_path, max_steps=1)
    trainer.fit(KTOModule(tiny_model_dir, loss="apo_zero_unpaired"), DataLoader([tree], collate_fn=pack))
    assert trainer.callback_metrics["train/loss"] == 0.5
    with pytest.raises(ValueError, match="reference: precomputed needs a UnpairedDataModule"):
        module = KTOModule(tiny_model_dir, loss="apo_zero_unpaired", reference="precomputed")
        quiet(tmp_path, max_steps=1).fit(module, DataLoader([tree], collate_fn=pack))


def test_a_run_without_an_end_can_not_precompute(tiny_model_dir, tmp_path):
    made = UnpairedDataModule(rows(), val_fraction=0.0, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"change with the epoch\. Set trainer\.max_epochs"):
        quiet(tmp_path, max_epochs=-1).fit(KTOModule(tiny_model_dir, reference="precomputed"), made)


def test_pairs_are_taken_apart_when_asked(tiny_model_dir, tmp_path):
    data = [{"prompt": f"Say {i}", "chosen": f"fox {i}", "rejected": "dog"} for i in range(6)]
    with pytest.raises(Exception, match=r"train on such rows, by PreferenceDataModule.*take_apart: true"):
        quiet(tmp_path, max_steps=1).fit(KTOModule(tiny_model_dir), UnpairedDataModule(data, cache_dir=tmp_path))
    with pytest.raises(Exception, match="KTOModule trains on UnpairedDataModule's batches"):
        quiet(tmp_path, max_steps=1).fit(KTOModule(tiny_model_dir), PreferenceDataModule(data, cache_dir=tmp_path))
    made = UnpairedDataModule(data, take_apart=True, val_fraction=0.0, cache_dir=tmp_path)
    trainer = quiet(tmp_path, max_steps=1)
    trainer.fit(KTOModule(tiny_model_dir), made)
    assert trainer.callback_metrics["train/loss"] == 0.5
