"""Exports equal the trained model; samples are shown and harmless; interrupts and kills lose nothing."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_rlhf.models.saving as saving
from lightning_rlhf import HFExport, LoRA, SFTModule
from lightning_rlhf.callbacks import AtomicCheckpointIO, SampleCompletions

SCRIPT = Path(__file__).parents[1] / "stages" / "run_sft.py"
spec = importlib.util.spec_from_file_location("run_sft", SCRIPT)
run_sft = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_sft)
ENV = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
IDS = torch.arange(5, 25)[None]


def fit(model_dir, out, callbacks=(), **options):
    return run_sft.run(model_dir, out, callbacks=list(callbacks), **options)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


LORAS = {
    "full": None,
    "lora": LoRA(r=4),
    "dora": LoRA(r=4, dora=True),
    "head": LoRA(r=4, targets=["q_proj", "lm_head", "embed_tokens"]),
    "saved": LoRA(r=4, targets=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", LORAS)
def test_merged_export_equals_the_model_in_plain_transformers(kind, tied, tiny_model_dir, tmp_path):
    from lightning_rlhf.models import load_causal_lm

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    if tied:
        if kind in ("head", "saved"):
            pytest.skip("peft refuses or unties adapters on tied heads by version")
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
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(again), want, atol=1e-5, rtol=0)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("<|im_start|>user 你好").input_ids == tokenizer("<|im_start|>user 你好").input_ids
    assert again.generation_config.eos_token_id == 4 and (tmp_path / "hf" / ".complete").exists()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "rope_theta" in config and "tree" not in json.dumps(config)


def test_adapters_alone(tiny_model_dir, tmp_path):
    from peft import PeftModel

    module = SFTModule(tiny_model_dir, lora=LoRA(r=4))
    module.configure_model()
    with torch.no_grad():
        for p in module.policy.parameters():
            if p.requires_grad:
                p += 0.05
    saving.save_pretrained(module.policy.model, module.tokenizer, tmp_path / "a", adapter_only=True)
    assert not (tmp_path / "a" / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    again = PeftModel.from_pretrained(base, tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(module.policy.model), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="adapter_only"):
        plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        saving.save_pretrained(plain, module.tokenizer, tmp_path / "b", adapter_only=True)


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


def test_export_and_samples_do_not_disturb_training(tiny_model_dir, tmp_path, capsys):
    options = dict(lora=True, dropout=0.2, max_epochs=2)
    _, plain = fit(tiny_model_dir, tmp_path / "a", **options)
    extra = [
        HFExport(str(tmp_path / "hf"), monitor="val/loss"),
        SampleCompletions(temperature=1.0, max_new_tokens=5),
        SampleCompletions(["Say 1"], max_new_tokens=5),
    ]
    _, module = fit(tiny_model_dir, tmp_path / "b", extra, **options)
    for (n, a), (_, b) in zip(plain.policy.named_parameters(), module.policy.named_parameters(), strict=True):
        assert torch.equal(a, b), n
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "last")
    torch.testing.assert_close(logits(last), logits(module.policy.model), atol=1e-5, rtol=0)
    assert (tmp_path / "hf" / "best" / ".complete").exists()
    rows = [json.loads(x) for x in (tmp_path / "b" / "samples.jsonl").read_text().splitlines()]
    assert {r["step"] for r in rows} == {0, 4, 8} and {"prompt", "completion", "ended"} <= rows[0].keys()
    assert "Answers at step 0" in capsys.readouterr().out


def test_a_metric_that_is_not_logged_is_named(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="val/lose"):
        fit(tiny_model_dir, tmp_path, [HFExport(monitor="val/lose")], max_epochs=1)
    with pytest.raises(ValueError, match="monitor"):
        HFExport(on="best")


INTERRUPTED = """
import sys, os, signal, json
sys.path.insert(0, {folder!r})
import run_sft, lightning.pytorch as L

class Send(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 1 and trainer.global_rank == trainer.world_size - 1 and batch_idx % 2 == 0:
            os.kill(os.getpid(), signal.{name})

run_sft.run(sys.argv[1], sys.argv[2], callbacks=[Send()], **json.loads(sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("name", "devices"), [("SIGTERM", 1), ("SIGINT", 1), pytest.param("SIGTERM", 2, marks=pytest.mark.distributed)]
)
def test_an_interrupt_saves_and_resumes_bit_for_bit(name, devices, tiny_model_dir, tmp_path):
    options = dict(lora=True, dropout=0.2, accumulate=2, devices=devices)
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED.format(folder=str(SCRIPT.parent), name=name))

    def start(file, out, **more):
        command = [sys.executable, str(file), str(tiny_model_dir), str(out), json.dumps({**options, **more})]
        return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240)

    done = start(script, tmp_path / "a")
    assert done.returncode == 0, done.stderr[-2000:]
    (saved,) = (tmp_path / "a").rglob("interrupted.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 2
    assert start(SCRIPT, tmp_path / "b", ckpt=str(saved), seed=5).returncode == 0
    assert start(SCRIPT, tmp_path / "c").returncode == 0
    b, c = (torch.load(tmp_path / x / "weights.pt") for x in "bc")
    assert all(torch.equal(b[k], c[k]) for k in c)


KILLED = """
import sys, time, torch
from lightning_rlhf.callbacks import AtomicCheckpointIO
io = AtomicCheckpointIO()
io.save_checkpoint({"x": torch.zeros(10)}, sys.argv[1])
print("first", flush=True)

class Slow:
    def __reduce__(self):
        print("writing", flush=True)
        time.sleep(60)

io.save_checkpoint({"x": torch.ones(10_000_000), "slow": Slow()}, sys.argv[1])
"""


def test_kill_9_while_saving_leaves_the_former_checkpoint(tmp_path):
    script, target = tmp_path / "killed.py", tmp_path / "x.ckpt"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, str(script), str(target)], env=ENV, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "first\n"
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.equal(torch.load(target, weights_only=True)["x"], torch.zeros(10))


def test_a_full_disk_leaves_the_former_checkpoint_and_no_rest(tmp_path, monkeypatch):
    io = AtomicCheckpointIO()
    io.save_checkpoint({"x": 1}, tmp_path / "a.ckpt")

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("lightning_rlhf.callbacks.atomic.sync", full)
    with pytest.raises(OSError, match="space"):
        io.save_checkpoint({"x": 2}, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
