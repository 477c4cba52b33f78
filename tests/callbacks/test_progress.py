"""What a terminal, a file and a notebook show of a run: the whole of it, and answers beside it."""

import math
import re
import shutil

import lightning.pytorch as L
import pytest
from grouping import grouped
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from safetensors.torch import load_file, save_file

from lightning_rlhf import InstructionDataModule, PPOModule, PromptDataModule, RewardModule, Sampling, SFTModule
from lightning_rlhf.callbacks import SampleCompletions
from lightning_rlhf.callbacks.progress import LineProgressBar, RunRichProgressBar, RunTQDMProgressBar

ROWS = [{"prompt": f"Say {i}", "completion": f"{i} fox"} for i in range(8)]
OFF = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)


def ones(prompts, completions):
    return [1.0] * len(completions)


def ppo(model_dir, out, *callbacks, ckpt=None, **options):
    """Seven iterations, two an epoch."""
    trainer = L.Trainer(
        default_root_dir=out, callbacks=list(callbacks), limit_val_batches=0, **{**OFF, "max_steps": 7, **options}
    )
    module = PPOModule(model_dir, ones, **grouped(sampling=Sampling(max_new_tokens=3), epochs=1))
    data = PromptDataModule(ROWS, val=ROWS, batch_size=4, cache_dir=out / "cache")
    trainer.fit(module, data, ckpt_path=ckpt)
    return trainer


def test_a_file_gets_lines_of_the_whole_run(tiny_model_dir, tmp_path, capfd):
    trainer = ppo(tiny_model_dir, tmp_path)
    out = capfd.readouterr().out
    assert type(trainer.progress_bar_callback) is LineProgressBar
    found = re.findall(
        r"^Iterations (\d)/7 \[\d:\d\d:\d\d<\d:\d\d:\d\d\] train/score=1, train/kl=.*$", out, re.MULTILINE
    )
    assert found == list("1234567") and "\r" not in out


def test_a_tqdm_bar_is_of_the_whole_run_also_when_resumed(tiny_model_dir, tmp_path, capfd):
    trainer = ppo(tiny_model_dir, tmp_path, TQDMProgressBar(leave=True), max_steps=5)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    out = capfd.readouterr().out
    assert re.search(r"Iterations: 100%\|.*\| 5/5 \[\d\d:\d\d<00:00", out) and "Epoch" not in out
    assert re.findall(r" (\d)/5 \[", out) == sorted(re.findall(r" (\d)/5 \[", out))  # never begun again
    trainer = ppo(tiny_model_dir, tmp_path, TQDMProgressBar(), ckpt=tmp_path / "x.ckpt")
    bar = trainer.progress_bar_callback
    assert type(bar) is RunTQDMProgressBar and bar.refresh_rate == 1
    assert (bar.train_progress_bar.total, bar.train_progress_bar.n, bar.train_progress_bar.initial) == (7, 7, 5)


def test_a_rich_bar_is_of_the_whole_run_and_knows_the_time_left(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, a terminal
    import rich

    monkeypatch.setattr(rich, "_console", None)
    found = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            task = trainer.progress_bar_callback.train_progress_bar
            found.append((task.description, task.completed, task.total, task.remaining))

    trainer = ppo(tiny_model_dir, tmp_path, RichProgressBar(refresh_rate=2), Look())
    bar = trainer.progress_bar_callback
    assert type(bar) is RunRichProgressBar and bar.refresh_rate == 2
    assert found == [("Iterations", step, 7, 7 - step) for step in range(1, 8)]
    assert bar.progress.speed_estimate_period == math.inf


@pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
def test_a_run_resumed_inside_an_epoch_is_shown_whole(tiny_model_dir, tmp_path, capfd, monkeypatch, terminal):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    ppo(tiny_model_dir, tmp_path, saving, enable_checkpointing=True, enable_progress_bar=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        import rich

        monkeypatch.setattr(rich, "_console", None)
    capfd.readouterr()
    trainer = ppo(tiny_model_dir, tmp_path, ckpt=tmp_path / "step=5.ckpt")
    if terminal:
        task = trainer.progress_bar_callback.train_progress_bar
        assert (task.description, task.completed, task.total) == ("Iterations", 7, 7)
    else:
        assert re.findall(r"^Iterations (\d)/7 \[", capfd.readouterr().out, re.MULTILINE) == list("67")


def test_steps_of_a_run_of_epochs_are_counted_too(tiny_model_dir, tmp_path, capfd):
    trainer = L.Trainer(max_epochs=2, accumulate_grad_batches=2, limit_val_batches=0, default_root_dir=tmp_path, **OFF)
    trainer.fit(SFTModule(tiny_model_dir), InstructionDataModule(ROWS, val=ROWS, batch_size=4, cache_dir=tmp_path))
    assert re.findall(r"^Steps (\d)/4 ", capfd.readouterr().out, re.MULTILINE) == list("1234")


def test_a_bar_of_ones_own_and_none_stay_as_they_are(tiny_model_dir, tmp_path, capfd):
    class Mine(TQDMProgressBar):
        pass

    bar = Mine()
    assert ppo(tiny_model_dir, tmp_path, bar, max_steps=1).progress_bar_callback is bar
    capfd.readouterr()
    assert ppo(tiny_model_dir, tmp_path, max_steps=1, enable_progress_bar=False).progress_bar_callback is None
    assert capfd.readouterr().out == ""


def test_answers_stand_above_the_bar_and_leave_the_figures_on_the_screen(tiny_model_dir, tmp_path, capfd, monkeypatch):
    answers = SampleCompletions(["a fox", "a dog"] * 12, max_new_tokens=2, every_n_steps=3)
    ppo(tiny_model_dir, tmp_path, answers, TQDMProgressBar(), max_steps=3)
    out = capfd.readouterr().out
    *_, last = out.split("Answers at step 3")
    assert last.count("a fox") == 12  # in a file there is room
    assert "Latest metrics: train/score 1, train/kl " in last
    assert (
        re.search(r"\nIterations: 100%\|.*\| 3/3 \[", out.split("Answers at step 3")[0][-1:] + last) or "3/3 [" in out
    )

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("LINES", "16")
    ppo(tiny_model_dir, tmp_path, answers, TQDMProgressBar(), max_steps=3)
    shown = capfd.readouterr().out.split("Answers at step 3")[1].splitlines()
    end = next(i for i, line in enumerate(shown) if line.startswith("Latest metrics"))
    assert shown[end - 1] == "… (the file has the rest)" and end <= 12


def test_a_notebook_of_the_default_trainer_with_answers_runs(stories_model_dir, tmp_path):
    """rich, beside which nothing can be printed there, is left for tqdm."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cell = f"""
import lightning.pytorch as L
from lightning_rlhf import InstructionDataModule, SampleCompletions, SFTModule
rows = [{{"prompt": f"Tell me about {{i}}.", "completion": f"It is {{i}}."}} for i in range(64)]
trainer = L.Trainer(accelerator="cpu", max_steps=4, logger=False, enable_checkpointing=False,
                    default_root_dir={str(tmp_path)!r},
                    callbacks=[SampleCompletions(["Once upon a time"], max_new_tokens=4, every_n_steps=2)])
module = SFTModule({str(stories_model_dir)!r}, chat_template="plain")
trainer.fit(module, InstructionDataModule(rows, batch_size=8, cache_dir={str(tmp_path)!r}))
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbclient.NotebookClient(notebook, timeout=240).execute()
    text = "".join(o.get("text", "") for o in notebook.cells[0].outputs)
    for step in (0, 2, 4):
        assert text.count(f"Answers at step {step} ") == 1
    assert "4/4 [" in text and "RecursionError" not in text


@pytest.mark.parametrize("kind", [SFTModule, RewardModule, PPOModule])
def test_the_table_of_the_model_lists_models_and_one_line_of_metrics(kind, tiny_model_dir):
    module = kind(tiny_model_dir, *([ones] if kind is PPOModule else []))
    module.configure_model()
    names = [name for name, _ in module.named_children()]
    assert names.count("metrics") == 1
    assert set(names) <= {"policy", "reward_model", "critic", "reference", "reward", "metrics"}
    assert not [name for name in module.state_dict() if name.startswith("metrics")]


def test_a_fresh_head_is_no_report_of_missing_weights(tiny_model_dir, capfd, caplog):
    RewardModule(tiny_model_dir).configure_model()
    said = "".join(capfd.readouterr()) + caplog.text
    assert "MISSING" not in said and "LOAD REPORT" not in said and "newly initialized" not in said


def test_weights_that_are_missing_beside_the_head_are_told(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.stray.weight"] = weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"missing or not used: model.layers.0.stray.weight, model.norm.weight\."):
        RewardModule(tmp_path / "model").configure_model()
