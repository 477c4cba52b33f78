"""What runs left is read back: whole, cut off, resumed, of several stages."""

import json

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_rlhf.callbacks import Report
from lightning_rlhf.report import Curve, StageReport, write_report
from lightning_rlhf.report.runs import read_run, read_runs


def test_of_two_values_of_a_step_the_later_holds_however_thin():
    once, twice = Curve(), Curve()
    for step in range(1000):
        once.add(step, step)
        twice.add(step, -1.0)
        twice.add(step, step)
    assert once == twice


class Toy(L.LightningModule):
    def __init__(self, offset: float = 0.0):
        super().__init__()
        self.save_hyperparameters()
        self.weight = torch.nn.Linear(1, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.log("train/kl", self.hparams.offset + (self.trainer.global_step + 1) ** 2 / 7, batch_size=1)
        return self.weight(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", self.hparams.offset + self.trainer.global_step / 100, batch_size=1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(20, 1), batch_size=1)

    val_dataloader = train_dataloader


def fit(folder, callbacks=(), steps=8, offset=0.0, ckpt_path=None, **options):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, default_root_dir=folder, callbacks=list(callbacks), val_check_interval=4,
        limit_val_batches=1, log_every_n_steps=1, logger=CSVLogger(folder), enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **{"enable_checkpointing": False, **options},
    )  # fmt: skip
    trainer.fit(Toy(offset), ckpt_path=ckpt_path)


def curves(path):
    (report,) = read_run(path)
    return {name: curve.all() for name, curve in report.curves.items()}


WANTED = {
    "train/kl": [[s, pytest.approx(s**2 / 7, rel=1e-5)] for s in range(1, 9)],
    "val/accuracy": [[4, pytest.approx(0.04)], [8, pytest.approx(0.08)]],
}


def test_report_and_log_say_the_same(tmp_path):
    fit(tmp_path, [Report()])
    log = tmp_path / "lightning_logs" / "version_0"
    assert curves(tmp_path) == curves(tmp_path / "report.html") == WANTED
    assert curves(log) == curves(log / "metrics.csv") == WANTED
    (report,) = read_run(log)
    assert report.status == "to step 8, from version_0/metrics.csv"
    assert report.settings == {"Model": [("offset", "0.0", False)]} and report.kind == "Runs"
    assert read_run(tmp_path)[0].kind == "Toy"


def test_a_resumed_run_is_whole_and_its_later_values_hold(tmp_path):
    saving = ModelCheckpoint(tmp_path / "c", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(tmp_path, [saving], steps=5, enable_checkpointing=True)
    fit(tmp_path, offset=100.0, ckpt_path=tmp_path / "c" / "step=3.ckpt")
    values = curves(tmp_path)["train/kl"]
    assert values == [[s, pytest.approx(s**2 / 7 + 100 * (s > 3), rel=1e-5)] for s in range(1, 9)]
    assert read_run(tmp_path)[0].status == "to step 8, from version_0/metrics.csv, version_1/metrics.csv"
    fit(tmp_path, steps=2, offset=-7.0)  # anew
    assert curves(tmp_path) == {"train/kl": [[s, pytest.approx(s**2 / 7 - 7, rel=1e-5)] for s in (1, 2)]}


def log(folder, rows, header="epoch,step,train/loss,val/loss", name="metrics.csv", end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([header, *rows]) + end)
    return folder / name


def test_the_config_tells_a_resumed_run_from_another(tmp_path):
    log(tmp_path / "version_9", ["0,0,4.0,", "0,9,3.0,", "0,19,2.0,"])
    log(tmp_path / "version_10", ["0,9,1.0,"])
    assert curves(tmp_path) == {"train/loss": [[1, 4.0], [10, 1.0]]}
    for path, wanted in ((None, [[10, 1.0]]), ("last.ckpt", [[1, 4.0], [10, 1.0]])):
        (tmp_path / "version_10" / "config.yaml").write_text(yaml.safe_dump({"ckpt_path": path}))
        assert curves(tmp_path) == {"train/loss": wanted}


def test_where_one_log_goes_back_the_later_values_hold_of_each_metric(tmp_path):
    path = log(tmp_path, ["0,0,4.0,", "0,1,3.0,", "0,1,,9.0", "0,2,2.0,", "0,1,30.0,", "0,2,20.0,", "0,2,,8.0"])
    assert curves(path) == {"train/loss": [[1, 4.0], [2, 30.0], [3, 20.0]], "val/loss": [[2, 9.0], [3, 8.0]]}


def test_what_validate_logged_after_a_run_is_not_the_run(tmp_path):
    log(tmp_path / "version_0", ["0,0,4.0,", "0,1,3.0,"])
    log(tmp_path / "version_1", ["0,1,9.0"], "epoch,step,val/loss")
    assert curves(tmp_path) == {"train/loss": [[1, 4.0], [2, 3.0]]}
    assert curves(tmp_path / "version_1") == {"val/loss": [[2, 9.0]]}


@pytest.mark.parametrize("rest", ["0,2,0.1", "0,2,0.125,", "0,", "0,2,0.1e"])
def test_of_a_log_that_was_cut_off_the_last_line_is_left_out_and_that_is_said(rest, tmp_path):
    path = log(tmp_path, ["0,0,4.0,", "0,1,3.0,", rest], end="")
    assert curves(path) == {"train/loss": [[1, 4.0], [2, 3.0]]}
    assert read_run(path)[0].status == (
        "to step 2, from metrics.csv; the last line of metrics.csv is incomplete and left out"
    )


@pytest.mark.parametrize(
    "row, message",
    [
        ("0,1,3.0", r"metrics\.csv, line 3: 3 values under 4 names\. Correct the line"),
        ("0,1,x,", r"metrics\.csv, line 3: could not convert string to float: 'x'"),
        ("0,,1.0,", r"metrics\.csv, line 3: could not convert string to float: ''"),
    ],
)
def test_a_bad_line_is_named(row, message, tmp_path):
    path = log(tmp_path, ["0,0,4.0,", row, "0,2,2.0,"])
    with pytest.raises(ValueError, match=message):
        read_run(path)


def test_what_is_no_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no column 'step', so it is not a log"):
        read_run(log(tmp_path / "a", ["1,2"], header="name,price"))
    for rows in ([], ["0,1,,"]):
        with pytest.raises(ValueError, match=r"metrics\.csv holds no values"):
            read_run(log(tmp_path / "b", rows))
    (tmp_path / "b" / "metrics.csv").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.csv holds no values"):
        read_run(tmp_path / "b")


def test_what_was_looked_for_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither report\.html, nor metrics\.csv or events"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone does not exist"):
        read_run(tmp_path / "gone")
    log(tmp_path / "a" / "version_0", ["0,1,1,1"])
    log(tmp_path / "b", ["0,1,1,1"])
    with pytest.raises(ValueError, match=r"has several runs.*: \S*/a, \S*/b\."):
        read_run(tmp_path)


def test_answers_are_the_first_and_the_latest_of_the_last_run(tmp_path):
    log(tmp_path, ["0,1,1,1"])
    row = dict(prompt="a", completion="x", ended=True)
    steps = [0, 5, 9, 0, 5, 9, 7, 11]  # the second run was interrupted behind 9, and resumed at 5
    lines = [json.dumps(dict(row, step=step, score=i)) for i, step in enumerate(steps)]
    lines.insert(3, '{"prompt": "a", "step": 3}')
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join([*lines, "no json", json.dumps(dict(row, step=0, prompt="b")), '{"prompt": "a", "st']))
    (report,) = read_run(tmp_path)
    assert [(r["step"], r["score"]) for r in report.samples["a"]] == [(0, 3), (11, 7)]
    assert [r["step"] for r in report.samples["b"]] == [0]
    assert report.status.endswith("; 3 lines of samples.jsonl without an answer are left out")


def test_names_tell_runs_apart(tmp_path):
    paths = [log(tmp_path / name, ["0,1,1,1"]).parent for name in ("x/ppo", "y/ppo", "sft")]
    write_report(tmp_path / "sft" / "old.html", "t", [StageReport("Runs")])
    paths += [tmp_path / "sft" / "old.html"]
    assert list(read_runs(paths)["Runs"]) == ["x/ppo", "y/ppo", "sft", "old"]
    assert list(read_runs([paths[0] / "metrics.csv"])["Runs"]) == ["ppo"]
    with pytest.raises(ValueError, match="sft is given twice"):
        read_runs([paths[2], tmp_path / "x" / ".." / "sft"])


def test_stages_of_one_report_stand_with_those_of_others(tmp_path):
    def stage(name, kind):
        curves = {"x": Curve([[1, 1.0]], 1, 1, [1, 1.0])}
        return StageReport(name, settings={"Model": [("class", kind, False)]}, curves=curves)

    first = [stage("warm", "SFTModule"), stage("PPO", "PPOModule")]
    second = [stage("one", "PPOModule"), stage("two", "PPOModule"), stage("X", "Module")]
    write_report(tmp_path / "a" / "report.html", "A", first)
    write_report(tmp_path / "b" / "report.html", "B", second)
    found = read_runs([tmp_path / "a", tmp_path / "b"])
    assert {name: list(runs) for name, runs in found.items()} == {
        "SFT": ["a"],
        "PPO": ["a", "b · one", "b · two"],
        "Module": ["b"],
    }


def test_events_are_read_where_tensorboard_is(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path)
    for step in range(500):
        logger.log_metrics({"train/loss": step / 8, "epoch": 0}, step)
    logger.finalize("success")
    (report,) = read_run(tmp_path)
    assert report.curves.keys() == {"train/loss"} and report.curves["train/loss"].last == [500, 499 / 8]


def test_events_without_tensorboard_are_an_error_that_says_so(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "events.out.tfevents.1.x").write_bytes(b"")
    with pytest.raises(ValueError, match="pip install tensorboard"):
        read_run(tmp_path)
