"""The SFT stage: the loss's definition, invariance to every split, exact resume."""

import json
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from grouping import grouped
from runs import assert_equal, load_script, spawn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_rlhf import InstructionDataModule, LoRA, SFTModule
from lightning_rlhf.data.packed import pad
from lightning_rlhf.stages.optim import CosineWarmup, parameter_groups

SCRIPT = Path(__file__).with_name("run_sft.py")
run_sft = load_script(SCRIPT)
run = run_sft.run
spawn = partial(spawn, SCRIPT)


def weights(module):
    return {k: v.detach().clone() for k, v in module.policy.named_parameters()}


def difference(a, b):
    flat = [torch.cat([w.flatten() for w in x.values()]) for x in (a, b)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


@pytest.fixture(scope="module")
def reference_gradient(tiny_model_dir, tmp_path_factory):
    """Mean over the scored tokens of a step of all rows, by plain transformers and autograd."""
    module = SFTModule(tiny_model_dir)
    module.configure_model()
    data = InstructionDataModule(
        run_sft.rows(),
        val_fraction=0.0,
        batch_size=24,
        cache_dir=tmp_path_factory.mktemp("c"),
        tokenizer=module.tokenizer,
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    p = pad(batch)
    lm = module.policy.model
    with module.policy.native_attention():
        logits = lm(input_ids=p.input_ids, attention_mask=p.attention_mask, use_cache=False).logits
        log_p = logits[p.row, p.column].log_softmax(-1).gather(-1, batch.target[:, None])
        (-log_p.mean()).backward()
    return {k: p.grad.clone() for k, p in module.policy.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(accumulate=5),
        dict(layout="padded"),
        dict(layout="padded", accumulate=5),
        dict(order=1),
        dict(order=2, accumulate=5),
        dict(devices=2),
        dict(devices=2, accumulate=3, workers=2, order=3),
    ],
    ids=str,
)
def test_step_gradient_does_not_depend_on_the_split(options, tiny_model_dir, reference_gradient, tmp_path):
    """1e-6 relative: K = 1 or 5, packed or padded, 1 rank or 2, rows in any order."""
    spawn(tiny_model_dir, tmp_path, max_steps=1, val_fraction=0.0, batch_size=24, **options)
    assert difference(torch.load(tmp_path / "gradients.pt"), reference_gradient) < 1e-6


def test_two_processes_train_as_one(tiny_model_dir, tmp_path):
    one = weights(run(tiny_model_dir, tmp_path / "one")[1])
    two = spawn(tiny_model_dir, tmp_path / "two", devices=2)
    assert difference(two, one) < 1e-4  # Adam divides by small numbers: rounding grows over the steps
    a, b = (json.loads((tmp_path / x / "metrics.json").read_text()) for x in ("one", "two"))
    for name in ("val/loss", "val/perplexity", "val/token_accuracy", "train/loss"):
        assert a[name] == pytest.approx(b[name], rel=1e-4), name


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(workers=2),
        dict(accumulate=2),
        dict(lora=True, dropout=0.2),
        dict(neftune_alpha=5.0, z_loss=1e-3),
        dict(lora=True, dropout=0.2, neftune_alpha=5.0, layout="padded", accumulate=2),
    ],
    ids=str,
)
def test_resume_mid_epoch_equals_uninterrupted_bit_for_bit(options, tiny_model_dir, tmp_path):
    options = {"save_every": 1, "max_epochs": 3, **options}
    _, whole = run(tiny_model_dir, tmp_path / "a", **options)
    steps = sorted((tmp_path / "a").glob("step*.ckpt"), key=lambda p: int(p.stem[4:]))
    assert len(steps) >= 9
    for place in (1, len(steps) // 2, len(steps) - 2):
        _, resumed = run(tiny_model_dir, tmp_path / f"b{place}", ckpt=str(steps[place]), seed=7, **options)
        assert_equal(weights(resumed), weights(whole))


@pytest.mark.distributed
def test_resume_on_two_processes_bit_for_bit(tiny_model_dir, tmp_path):
    options = dict(devices=2, save_every=1, workers=2, lora=True, dropout=0.2)
    whole = spawn(tiny_model_dir, tmp_path / "a", **options)
    place = tmp_path / "a" / "step2.ckpt"
    assert_equal(spawn(tiny_model_dir, tmp_path / "b", ckpt=str(place), seed=7, **options), whole)


def test_lora_checkpoint_holds_no_frozen_weights_and_loads(tiny_model_dir, tmp_path):
    trainer, module = run(tiny_model_dir, tmp_path, lora=True, save_every=2)
    path = next(tmp_path.glob("step*.ckpt"))
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved and all("lora_" in k or "modules_to_save" in k for k in saved if k.startswith("policy."))
    settings = dict(pretrained=tiny_model_dir, lora=LoRA(r=4), optimizer=AdamW)
    again = SFTModule.load_from_checkpoint(path, strict=True, **settings)
    assert_equal(weights(again), weights(module))


def test_it_learns_and_logs_the_documented_names(tiny_model_dir, tmp_path):
    trainer, _ = run(tiny_model_dir, tmp_path, max_epochs=15)
    names = {f"{s}/{n}" for s in ("train", "val") for n in ("loss", "perplexity", "token_accuracy")}
    assert names | {"train/tokens_per_second", "train/scored_share"} <= trainer.callback_metrics.keys()
    metrics = trainer.callback_metrics
    assert metrics["train/loss"] < 1.0 and metrics["train/token_accuracy"] > 0.7
    assert metrics["val/perplexity"] == pytest.approx(metrics["val/loss"].exp().item(), rel=1e-5)


def test_validation_metrics_equal_plain_transformers_for_any_batch_size(tiny_model_dir, tmp_path):
    results = []
    for size in (1, 3, 8):
        module = SFTModule(tiny_model_dir)
        data = InstructionDataModule(run_sft.rows(), val=run_sft.rows(7), eval_batch_size=size, cache_dir=tmp_path)
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
        results.append(trainer.validate(module, data, verbose=False)[0])
    data.setup("validate")
    nll = correct = count = 0
    lm = module.policy.model.eval()
    for batch in data.val_dataloader():
        p = pad(batch)
        with torch.no_grad():
            log_p = lm(input_ids=p.input_ids, attention_mask=p.attention_mask).logits[p.row, p.column].log_softmax(-1)
        nll -= log_p.gather(-1, batch.target[:, None]).sum().item()
        correct += (log_p.argmax(-1) == batch.target).sum().item()
        count += len(batch.target)
    for result in results:
        assert result["val/loss"] == pytest.approx(nll / count, rel=1e-5)
        assert result["val/token_accuracy"] == pytest.approx(correct / count)


def test_weight_decay_spares_norms_and_biases(tiny_model_dir):
    module = SFTModule(tiny_model_dir)
    module.configure_model()
    decay, rest = parameter_groups(module.policy.parameters())
    assert "weight_decay" not in decay and rest["weight_decay"] == 0.0
    assert all(p.dim() > 1 for p in decay["params"]) and all(p.dim() == 1 for p in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(list(module.policy.parameters()))


def test_warm_up_is_counted_in_optimizer_steps(tiny_model_dir, tmp_path):
    rates = []

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    module = SFTModule(
        tiny_model_dir,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1.0),
        lr_scheduler=lambda o: CosineWarmup(o, warmup=2, final=0.1),
    )
    data = InstructionDataModule(run_sft.rows(), batch_size=4, cache_dir=tmp_path)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=6, accumulate_grad_batches=3, callbacks=[Rates()], logger=False,
        enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, data)
    import math

    want = [0.5, 1.0, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4))]
    assert rates == pytest.approx(want)


def test_a_plateau_schedule_watches_the_validation_loss(tiny_model_dir, tmp_path):
    module = SFTModule(tiny_model_dir, lr_scheduler=lambda o: ReduceLROnPlateau(o))
    data = InstructionDataModule(run_sft.rows(), cache_dir=tmp_path)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
                        enable_checkpointing=False)  # fmt: skip
    trainer.fit(module, data)
    assert trainer.lr_scheduler_configs[0].monitor == "val/loss"


def test_limit_train_batches_that_cuts_a_step_is_refused(tiny_model_dir, tmp_path):
    module = SFTModule(tiny_model_dir)
    data = InstructionDataModule(run_sft.rows(), cache_dir=tmp_path)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
                        enable_checkpointing=False, limit_train_batches=3, accumulate_grad_batches=2)  # fmt: skip
    with pytest.raises(ValueError, match="limit_train_batches=3"):
        trainer.fit(module, data)


def test_a_model_object_needs_its_tokenizer(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with pytest.raises(ValueError, match="tokenizer"):
        SFTModule(model)
    SFTModule(model, tokenizer=str(tiny_model_dir)).configure_model()


def test_one_trainer_validates_then_fits_then_validates(tiny_model_dir, tmp_path):
    module = SFTModule(tiny_model_dir)
    data = InstructionDataModule(run_sft.rows(), cache_dir=tmp_path)
    trainer = L.Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False,
                        enable_checkpointing=False)  # fmt: skip
    before = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    trainer.fit(module, data)
    after = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    assert after < before


def test_neftune_is_in_training_alone(tiny_model_dir, tmp_path):
    """A rate of 0 leaves the weights: the training loss is another, validation and predictions are the same."""
    found = {}
    for alpha in (None, 0.0, 20.0):
        trainer, module = run(tiny_model_dir, tmp_path / str(alpha), lr=0.0, max_epochs=1, neftune_alpha=alpha)
        losses = [trainer.callback_metrics[f"{stage}/loss"].item() for stage in ("train", "val")]
        found[alpha] = (*losses, [r for batch in trainer.predict(module, trainer.datamodule) for r in batch])
    assert found[0.0] == found[None]
    assert found[20.0][1:] == found[None][1:]
    assert abs(found[20.0][0] - found[None][0]) > 1e-3


def test_z_loss_pulls_the_denominator_to_one_and_is_logged(tiny_model_dir, tmp_path):
    """Logged is c log(Z)^2, beside a loss without it."""
    trainer, module = run(tiny_model_dir, tmp_path / "a", lr=0.0, max_steps=1, val_fraction=0.0, batch_size=24,
                          accumulate=3, z_loss=0.1)  # fmt: skip
    data = trainer.datamodule
    squares, nll = [], []
    for batch in data.train_dataloader():
        p = pad(batch)
        with torch.no_grad(), module.policy.native_attention() as lm:
            logits = lm(input_ids=p.input_ids, attention_mask=p.attention_mask).logits[p.row, p.column]
        squares.append(0.1 * logits.logsumexp(-1) ** 2)
        nll.append(-logits.log_softmax(-1).gather(-1, batch.target[:, None])[:, 0])
    metrics = trainer.callback_metrics
    assert metrics["train/z_loss"] == pytest.approx(torch.cat(squares).mean().item(), rel=1e-5)
    assert metrics["train/loss"] == pytest.approx(torch.cat(nll).mean().item(), rel=1e-5)
    few, many = (run(tiny_model_dir, tmp_path / str(c), max_epochs=4, z_loss=c)[0] for c in (1e-6, 1.0))
    assert many.callback_metrics["train/z_loss"] < 0.8 * few.callback_metrics["train/z_loss"] / 1e-6
    assert "train/z_loss" not in run(tiny_model_dir, tmp_path / "none", max_steps=1)[0].callback_metrics


@pytest.mark.parametrize("setting", ["neftune_alpha", "z_loss"])
def test_negative_regularisers_are_refused(setting, tiny_model_dir):
    with pytest.raises(ValueError, match=f"{setting}=-1"):
        SFTModule(tiny_model_dir, **grouped(**{setting: -1.0}))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_step_that_is_not_finite_on_one_rank_is_dropped_on_all(tiny_model_dir, tmp_path):
    options = dict(max_steps=4, spoiled=[1, [1, 2]], max_skipped=3)
    two = spawn(tiny_model_dir, tmp_path / "two", devices=2, **options)
    one = spawn(tiny_model_dir, tmp_path / "one", **{**options, "spoiled": [0, [1, 2]]})
    assert all(p.isfinite().all() for p in two.values()) and difference(two, one) < 1e-5
