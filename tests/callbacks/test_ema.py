"""The average is the hand-written recursion, is what is validated, shown and exported, and leaves training alone."""

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from grouping import grouped
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from runs import assert_equal, load_script
from transformers import AutoModelForCausalLM

from lightning_rlhf import HFExport, SampleCompletions, SFTModule
from lightning_rlhf.callbacks import EMA, averaged_weights
from lightning_rlhf.strategies import ColossalAIStrategy

STAGES = Path(__file__).resolve().parents[1] / "stages"


run_sft, run_reward, run_ppo = (load_script(STAGES / f"run_{stage}.py") for stage in ("sft", "reward", "ppo"))


def trained(module):
    return {k: p.detach().clone() for k, p in module.model_to_export.named_parameters() if p.requires_grad}


class ByHand(L.Callback):
    """The recursion in float64, once a counted step."""

    def __init__(self, decay):
        self.decay = decay

    def on_fit_start(self, trainer, pl_module):
        self.average = {k: w.double() for k, w in trained(pl_module).items()}
        self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.steps:
            self.steps += 1
            for k, w in trained(pl_module).items():
                self.average[k] = self.decay * self.average[k] + (1 - self.decay) * w.double()


RUNS = {
    "sft": (run_sft.run, dict()),
    "sft, accumulated": (run_sft.run, dict(accumulate=2, lora=True)),
    "reward": (run_reward.run, dict(lora=True)),
    "ppo, shared": (run_ppo.run, dict(lora=True)),
    "ppo, separate": (run_ppo.run, dict()),
}


@pytest.mark.parametrize("name", RUNS)
def test_average_is_the_recursion_over_counted_steps(name, tiny_model_dir, tmp_path):
    run, options = RUNS[name]
    hand, ema = ByHand(0.8), EMA(0.8)
    trainer, module = run(tiny_model_dir, tmp_path, callbacks=[hand, ema], **options)
    assert hand.steps == trainer.global_step > 3
    average = ema.state_dict()["average"]
    assert average.keys() == trained(module).keys()
    for k, want in hand.average.items():
        assert (average[k] - want).norm() <= 1e-7 * want.norm(), k
        assert not torch.equal(average[k], trained(module)[k])
    if "lora" in options:
        heads = ("score.", "value_head")
        assert all("lora_" in k or any(head in k for head in heads) for k in average), "frozen weights are not copied"


def test_half_precision_weights_are_averaged_in_fp32(short_fit, tiny_model_dir):
    hand, ema = ByHand(0.9), EMA(0.9)
    module = SFTModule(tiny_model_dir, **grouped(dtype="bfloat16", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)))
    short_fit([hand, ema], module)
    for k, average in ema.state_dict()["average"].items():
        assert average.dtype == torch.float32
        assert (average - hand.average[k]).norm() <= 1e-7 * hand.average[k].norm(), k
    with ema.applied(module):
        assert_equal(trained(module), {k: w.bfloat16() for k, w in ema.state_dict()["average"].items()})


class Late(L.Callback):
    """What weights callbacks find: others than the EMA, after a validation."""

    def on_validation_end(self, trainer, pl_module):
        self.found = trained(pl_module)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
def test_average_is_validated_shown_and_exported_and_training_goes_on_undisturbed(
    lora, first, tiny_model_dir, tmp_path, monkeypatch
):
    shown, generate = [], SampleCompletions._generate

    def spy(self, trainer, module, *args, **kwargs):
        shown.append((trainer.global_step, trained(module)))
        return generate(self, trainer, module, *args, **kwargs)

    monkeypatch.setattr(SampleCompletions, "_generate", spy)
    options = dict(lora=lora, dropout=0.2 if lora else 0.0, save_every=100)
    _, plain = run_sft.run(tiny_model_dir, tmp_path / "plain", **options)
    ema, hand, late = EMA(0.8), ByHand(0.8), Late()
    others = [
        hand,
        HFExport(monitor="val/loss"),
        SampleCompletions(["Say 1"], max_new_tokens=2, every_n_steps=1),
        ModelCheckpoint(tmp_path, filename="best", monitor="val/loss"),
        late,
    ]
    callbacks = [ema, *others] if first else [*others, ema]
    trainer, module = run_sft.run(tiny_model_dir, tmp_path / "ema", callbacks=callbacks, **options)
    assert_equal(trained(module), trained(plain))
    assert_equal(late.found, trained(plain))
    average = ema.state_dict()["average"]
    assert shown[-1][0] == trainer.global_step
    assert_equal(shown[-1][1], average)

    with averaged_weights(trainer):
        assert_equal(trained(module), average)
        logits = module.policy.model.eval()(input_ids=torch.arange(5, 25)[None]).logits
        quiet = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
        want = quiet.validate(module, trainer.datamodule, verbose=False)[0]["val/loss"]
    assert_equal(trained(module), trained(plain))
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(want, rel=1e-6)
    assert quiet.validate(module, trainer.datamodule, verbose=False)[0]["val/loss"] != pytest.approx(want, rel=1e-3)
    for name in ("last", "best"):  # the loss falls: both are of the end
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "ema" / "hf" / name)
        torch.testing.assert_close(exported(torch.arange(5, 25)[None]).logits, logits, atol=1e-5, rtol=0)

    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert_equal({k: saved["state_dict"][f"policy.{k}"] for k in average}, trained(plain))
    assert_equal(saved["callbacks"]["EMA"]["average"], average)
    again = SFTModule(tiny_model_dir, lora=module.lora)
    callbacks = [EMA()]
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=callbacks
    )
    found = trainer.validate(again, quiet.datamodule, ckpt_path=tmp_path / "best.ckpt", verbose=False)
    assert found[0]["val/loss"] == pytest.approx(want, rel=1e-6)
    assert_equal(trained(again), trained(plain))


@pytest.mark.parametrize("name", ["sft, accumulated", "ppo, shared"])
def test_a_resumed_run_equals_an_uninterrupted_one(name, tiny_model_dir, tmp_path):
    run, options = RUNS[name]
    whole = EMA(0.8)
    options = dict(options, dropout=0.2, save_every=1, val_fraction=0.2)
    trainer, module = run(tiny_model_dir, tmp_path / "a", callbacks=[whole], **options)
    for step in (1, trainer.global_step // 2, trainer.global_step - 1):
        ema = EMA(0.8)
        place = tmp_path / "a" / f"step{step}.ckpt"
        again, other = run(tiny_model_dir, tmp_path / f"{step}", callbacks=[ema], ckpt=place, seed=7, **options)
        assert again.global_step == trainer.global_step
        assert_equal(trained(other), trained(module))
        assert_equal(ema.state_dict()["average"], whole.state_dict()["average"])


def test_ppo_samples_from_the_trained_weights_and_validates_the_average(tiny_model_dir, tmp_path):
    options = dict(lora=True, val_fraction=0.3, max_steps=5, lr=1e-2)
    _, module = run_ppo.run(tiny_model_dir, tmp_path / "plain", **options)
    ema = EMA(0.7)
    shown = SampleCompletions(["Say 1"], max_new_tokens=4, every_n_steps=1)
    trainer, other = run_ppo.run(tiny_model_dir, tmp_path / "ema", callbacks=[ema, shown], **options)
    assert_equal(run_ppo.trained(other), run_ppo.trained(module))
    quiet = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with averaged_weights(trainer):
        want = quiet.validate(other, trainer.datamodule, verbose=False)[0]
    found = trainer.validate(other, trainer.datamodule, verbose=False)[0]
    assert found == want != quiet.validate(other, trainer.datamodule, verbose=False)[0]


@pytest.mark.parametrize("every", [1, 3], ids=["validated", "measured at the end"])
def test_a_reward_models_offset_is_that_of_the_average(every, tiny_model_dir, tmp_path):
    options = dict(check_val_every_n_epoch=every, callbacks=[EMA(0.8)])
    trainer, module = run_reward.run(tiny_model_dir, tmp_path, **options)
    offset = module.reward_model.score_offset
    quiet = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with averaged_weights(trainer):
        found = quiet.validate(module, trainer.datamodule, verbose=False)[0]
    assert offset == pytest.approx(found["val/chosen_score"], abs=1e-5)
    found = quiet.validate(module, trainer.datamodule, verbose=False)[0]
    assert offset != pytest.approx(found["val/chosen_score"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_average_as_one_and_resume_bit_for_bit(start, tiny_model_dir, tmp_path):
    one = EMA(0.8)
    options = dict(lora=True, lr=1e-3)
    run_sft.run(tiny_model_dir, tmp_path / "one", callbacks=[one], **options)
    options |= dict(devices=2, ema=0.8, save_every=1)
    script = STAGES / "run_sft.py"
    start(script, tiny_model_dir, tmp_path / "two", options)
    start(script, tiny_model_dir, tmp_path / "again", dict(options, ckpt=str(tmp_path / "two" / "step3.ckpt"), seed=7))
    average = torch.load(tmp_path / "two" / "average.pt")
    for k, want in one.state_dict()["average"].items():
        torch.testing.assert_close(average[k], want, atol=1e-4, rtol=0)
    assert_equal(torch.load(tmp_path / "again" / "average.pt"), average)


def test_a_validation_that_breaks_off_leaves_the_trained_weights(short_fit, tiny_model_dir):
    class Broken(SFTModule):
        def validation_step(self, batch, batch_idx):
            if self.global_step:
                self.kept = trained(self)
                raise RuntimeError("out of memory")

    ema, module = EMA(0.5), Broken(tiny_model_dir, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    with pytest.raises(RuntimeError, match="out of memory"):
        short_fit([ema], module)
    assert_equal(module.kept, ema.state_dict()["average"])
    assert not torch.equal(trained(module)["model.lm_head.weight"], module.kept["model.lm_head.weight"])


def test_what_is_refused(short_fit, tiny_model_dir, tmp_path):
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="decay must be in"):
            EMA(decay)
    for strategy in (FSDPStrategy(), ColossalAIStrategy("zero2")):
        with pytest.raises(ValueError, match=f"not {type(strategy).__name__}"):
            EMA().setup(SimpleNamespace(strategy=strategy, callbacks=[]), None, "fit")
    ema = EMA()
    run_sft.run(tiny_model_dir, tmp_path, lora=True, max_steps=1, callbacks=[ema])
    other = EMA()
    other.load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match=r"does not match the module.*missing in the average"):
        short_fit([other])
