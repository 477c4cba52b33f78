"""Exports equal the trained model, on one rank and on two, and are refused before the run where they can't be."""

import json
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_rlhf.models.saving as saving
from lightning_rlhf import HFExport, LoRA, SFTModule
from lightning_rlhf.models import load_causal_lm

SCRIPT = Path(__file__).with_name("run_callbacks.py")
IDS = torch.arange(5, 25)[None]


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def load(path):
    return AutoModelForCausalLM.from_pretrained(path)


LORAS = {
    "full": None,
    "lora": LoRA(r=4),
    "dora": LoRA(r=4, dora=True),
    "head": LoRA(r=4, targets=["q_proj", "lm_head", "embed_tokens"]),
    "saved": LoRA(r=4, targets=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize(
    ("kind", "tied"), [*((kind, False) for kind in LORAS), ("full", True), ("lora", True), ("dora", True)]
)
def test_merged_export_equals_the_model_in_plain_transformers(kind, tied, tiny_model_dir, tmp_path):
    base = load(tiny_model_dir)
    if tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
    model = load_causal_lm(base, lora=LORAS[kind])
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    want = logits(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    saving.save_pretrained(model, tokenizer, tmp_path / "hf", stop_token_ids=(4,))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again = load(tmp_path / "hf")
    torch.testing.assert_close(logits(again), want, atol=1e-5, rtol=0)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("<|im_start|>user 你好").input_ids == tokenizer("<|im_start|>user 你好").input_ids
    assert again.generation_config.eos_token_id == 4 and (tmp_path / "hf" / ".complete").exists()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "rope_theta" in config and "tree" not in json.dumps(config)


def test_a_crash_while_exporting_leaves_the_former_directory(tiny_model_dir, tmp_path, monkeypatch):
    module = SFTModule(tiny_model_dir)
    module.configure_model()
    target = saving.save_pretrained(module.policy.model, module.tokenizer, tmp_path / "hf")
    before = (target / "model.safetensors").read_bytes()

    def crash(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(saving, "_portable_config", crash)
    with pytest.raises(OSError, match="disk full"):
        saving.save_pretrained(module.policy.model, module.tokenizer, target)
    assert (target / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("lora", [False, True])
def test_exports_do_not_disturb_training_and_equal_the_model(lora, fit, tiny_model_dir, tmp_path):
    from peft import PeftModel

    options = dict(lora=lora, dropout=0.2 if lora else 0.0, max_epochs=2)
    _, plain = fit(tmp_path / "a", **options)
    callbacks = [HFExport(monitor="val/loss")]
    if lora:
        callbacks.append(HFExport(str(tmp_path / "adapters"), when="end", adapter_only=True))
    _, module = fit(tmp_path / "b", callbacks, **options)
    for (n, a), (_, b) in zip(plain.policy.named_parameters(), module.policy.named_parameters(), strict=True):
        assert torch.equal(a, b), n
    want = logits(module.policy.model)
    torch.testing.assert_close(logits(load(tmp_path / "b" / "hf" / "last")), want, atol=1e-5, rtol=0)
    assert (tmp_path / "b" / "hf" / "best" / ".complete").exists()
    if lora:
        assert not list((tmp_path / "adapters" / "last").glob("model*"))
        again = PeftModel.from_pretrained(load(tiny_model_dir), tmp_path / "adapters" / "last")
        torch.testing.assert_close(logits(again), want, atol=1e-5, rtol=0)


class Scores(L.Callback):
    """Logs what is given, a value a validation."""

    def __init__(self, *values):
        self.values = iter(values)

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.log("score", next(self.values))


@pytest.mark.parametrize(("mode", "best"), [("min", 1.0), ("max", 3.0)])
def test_best_is_what_is_better_than_all_before_and_never_a_nan(mode, best, short_fit, tmp_path, monkeypatch, caplog):
    seen = []
    monkeypatch.setattr("lightning_rlhf.callbacks.export.save_pretrained", lambda *args, **kw: seen.append(export.best))
    export = HFExport(when="best", monitor="score", mode=mode)
    with caplog.at_level("INFO"):
        short_fit([Scores(float("nan"), 2.0, 3.0, 1.0, 2.0), export], max_epochs=5)
    assert f"Best by score, {best:g}: {tmp_path / 'hf' / 'best'}" in caplog.messages
    assert seen == ([2.0, 1.0] if mode == "min" else [2.0, 3.0]) and export.best == best
    again = HFExport(when="best", monitor="score", mode=mode)
    again.load_state_dict(export.state_dict())
    short_fit([Scores(2.0), again])
    assert again.best == best and len(seen) == 2


def test_a_metric_that_is_not_logged_is_named(short_fit):
    with pytest.raises(ValueError, match=r"val/lose.*val/loss"):
        short_fit([HFExport(monitor="val/lose")])
    with pytest.raises(ValueError, match="monitor"):
        HFExport(when="best")


class Never(L.Callback):
    def on_train_start(self, trainer, pl_module):
        pytest.fail("training started")


@pytest.mark.parametrize(("on", "name"), [("best", "best"), ("end", "last"), ("both", "best"), ("both", "last")])
def test_a_directory_that_holds_something_else_stops_the_run_before_it_starts(on, name, short_fit, tmp_path):
    (tmp_path / "hf" / name).mkdir(parents=True)
    (tmp_path / "hf" / name / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=f"{name} exists and is not an export"):
        short_fit([HFExport(when=on, monitor="val/loss"), Never()])
    assert (tmp_path / "hf" / name / "thesis.tex").exists()


def test_where_nothing_can_be_written_the_run_does_not_start(short_fit, tmp_path):
    (tmp_path / "hf").write_text("a file")
    with pytest.raises(
        NotADirectoryError, match=r"HFExport: .*config\.json can't be written: .*hf is a file\. Set its"
    ):
        short_fit([HFExport(), Never()])


def test_only_what_is_written_must_be_replaceable(short_fit, tmp_path, caplog):
    (tmp_path / "hf" / "best").mkdir(parents=True)
    (tmp_path / "hf" / "best" / "thesis.tex").write_text("years of work")
    short_fit([HFExport()])  # no monitor: no best
    with caplog.at_level("INFO"):
        short_fit([HFExport()])  # what an export wrote is replaced
    assert f"HFExport: this run will replace {tmp_path / 'hf' / 'last'} of an earlier run." in caplog.messages
    assert (tmp_path / "hf" / "last" / "config.json").exists()


def test_weights_that_stay_in_shards_are_refused(tmp_path):
    strategy = FSDPStrategy(state_dict_type="sharded")
    trainer = SimpleNamespace(default_root_dir=tmp_path, strategy=strategy, is_global_zero=False)
    with pytest.raises(ValueError, match="state_dict_type: full"):
        HFExport().setup(trainer, None, "fit")
    HFExport().setup(trainer, None, "validate")
    trainer.strategy = FSDPStrategy()
    HFExport().setup(trainer, None, "fit")


@pytest.fixture(scope="module")
def runs(start, tiny_model_dir, tmp_path_factory):
    """Folders of the same run of two processes, its weights replicated and sharded."""
    out = tmp_path_factory.mktemp("runs")
    for strategy in ("ddp", "fsdp"):
        start(SCRIPT, tiny_model_dir, out / strategy, dict(strategy=strategy))
    return {strategy: out / strategy for strategy in ("ddp", "fsdp")}


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_agree_on_the_best_and_export_whole_weights(strategy, runs, tiny_model_dir):
    from peft import PeftModel

    out, base = runs[strategy], load(tiny_model_dir)
    # what the ranks logged: -1 and 10.5, then -2 and 11: worse for the second, better in the mean
    assert [json.loads((out / f"rank{i}.json").read_text()) for i in (0, 1)] == [4.5, 4.5]
    best, last = (load(out / "hf" / name) for name in ("best", "last"))
    assert torch.equal(logits(best), logits(last))
    assert (logits(last) - logits(base)).abs().max() > 0.01
    again = PeftModel.from_pretrained(base, out / "adapters" / "last")
    torch.testing.assert_close(logits(again), logits(last), atol=1e-5, rtol=0)


@pytest.mark.distributed
def test_sharded_weights_export_and_answer_as_replicated_ones(runs):
    ddp, fsdp = (logits(load(out / "hf" / "last")) for out in runs.values())
    torch.testing.assert_close(fsdp, ddp, atol=1e-3, rtol=0)
    ddp, fsdp = ((out / "samples.jsonl").read_text().splitlines() for out in runs.values())
    assert ddp == fsdp and len(ddp) == 6
