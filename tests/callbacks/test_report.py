"""The report says what happened, of the whole run, in one file that is safe to open."""

import json
import re
import signal

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf.callbacks import Interrupted, MeasureWinRate, Report, SampleCompletions, SaveOnInterrupt
from lightning_rlhf.report import read_report

NASTY = "</script><script>alert('x')</script> & \"你好\" <!-- ]]> \ud800"


class Toy(L.LightningModule):
    """Logs what is easily foretold, at the moments at which the stages do: ``late`` after the callbacks."""

    def __init__(self, late=True, fail_at=None, rate: float = 0.1):
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.late, self.fail_at, self.rate = late, fail_at, rate

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step + 1
        if step == self.fail_at:
            raise RuntimeError(f"broken {NASTY[:-2]}")
        self.log("train/kl", step**2 / 4.0, batch_size=1)
        self.log("train/constant", 7.0, batch_size=1)
        self.log("loss", 1 / step, batch_size=1)
        return self.weight(batch).sum()

    def on_train_batch_end(self, *_):
        if self.late:
            self.log("train/late", 100.0 + self.trainer.global_step, batch_size=1)

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", 0.5 + self.trainer.global_step / 100, batch_size=1)

    test_step = validation_step

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(10, 1), batch_size=1)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(2, 1), batch_size=1)

    test_dataloader = val_dataloader


def trainer(folder, callbacks, steps=8, **options):
    settings = dict(accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, val_check_interval=4,
                    enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder)  # fmt: skip
    return L.Trainer(callbacks=callbacks, **{**settings, **options})


def curves(path, stage=0):
    return {name: curve.all() for name, curve in read_report(path)[1][stage].curves.items()}


WANTED = {
    "train/kl": [[s, s**2 / 4] for s in range(1, 9)],
    "train/constant": [[s, 7.0] for s in range(1, 9)],
    "train/late": [[s, 100.0 + s] for s in range(1, 9)],
    "loss": [[s, pytest.approx(1 / s, rel=1e-5)] for s in range(1, 9)],
    "val/accuracy": [[4, 0.54], [8, 0.58]],
}


@pytest.mark.parametrize("late", [True, False])
def test_every_logged_value_is_there_at_its_step(late, tmp_path):
    trainer(tmp_path, [Report()]).fit(Toy(late))
    assert curves(tmp_path / "report.html") == {k: v for k, v in WANTED.items() if late or k != "train/late"}


def test_the_page_shows_settings_figures_and_answers(parse, short_fit, tmp_path):
    samples = SampleCompletions(["Say 1", NASTY[:-2]], max_new_tokens=5)
    short_fit([Report(title="My run"), samples], val_check_interval=2)
    html = parse(tmp_path / "report.html")
    assert html.texts("title") == html.texts("h1") == ["My run"] and html.texts("h2") == ["SFT"]
    assert html.texts("p", class_="when")[0].startswith("finished · 20")
    assert html.texts("p", class_="prompt") == ["Say 1", NASTY[:-2]]
    notes = [text for text in html.texts("p", class_="note") if text.startswith("step")]
    assert notes == ["step 0", "step 4"] * 2
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert lines.count('"step": 2') == 2  # between the two that are shown
    assert len(html.texts("p", class_="text")) == 4
    figures = {e["text"].split()[0] for e in html.all("figcaption")}
    assert figures >= {"train/loss", "train/perplexity", "val/loss", "val/token_accuracy", "train/tokens_per_second"}
    assert [t for t in html.texts("h3") if "Curves" in t] == ["Curves: train, by step", "Curves: val, by step"]
    settings = {row["text"] for row in html.all("tr")}
    assert "batch_size4" in settings and "train16 rows" in settings and "max_epochs1" in settings
    assert "optimizerAdamW" in settings and any(row.startswith("optimizer.lr") for row in settings)
    changed = {row["text"] for row in html.all("tr", class_="changed")}
    assert "batch_size4" in changed and not any(row.startswith(("val_fraction", "layout")) for row in changed)


# -------------------------------------------------------------------------------------------------------------- safety


def test_the_file_needs_nothing_else(parse, short_fit, tmp_path):
    short_fit([Report(), SampleCompletions(["see http://example.com/x.js"], max_new_tokens=3)])
    html = parse(tmp_path / "report.html")
    values = [v for e in html.elements for k, v in e.items() if k.startswith("@") and k != "@content" and v]
    assert not [v for v in values if "//" in v or v.startswith("data:")]
    assert {e["tag"] for e in html.elements}.isdisjoint({"link", "img", "iframe", "base", "object", "embed"})
    (style,) = html.texts("style")
    assert "prefers-color-scheme: dark" in style and not re.search(r"url\(|@import|//", style)
    assert {e["@href"][0] for e in html.all("a")} <= {"#"}
    policy = html.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["@content"]
    assert policy.startswith("default-src 'none'")
    assert html.all("meta", name="viewport")


def test_what_is_no_report_is_left_alone(tmp_path):
    path = tmp_path / "mine.html"
    path.write_text("<h1>Mine</h1>")
    for append in (True, False):
        with pytest.raises(ValueError, match=r"mine\.html is not a report"):
            trainer(tmp_path, [Report(path, append=append)]).fit(Toy(fail_at=1))
    assert path.read_text() == "<h1>Mine</h1>"


@pytest.mark.parametrize("callback", [Report(), SampleCompletions(["Say 1"]), MeasureWinRate("f", prompts=["Say 1"])])
def test_what_can_not_be_written_is_told_before_training(callback, short_fit, tmp_path):
    name = {Report: "report.html", SampleCompletions: "samples.jsonl", MeasureWinRate: "win_rate.jsonl"}[type(callback)]
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{type(callback).__name__}: .*{name} can't be written: it is a dir"):
        short_fit([callback])


def test_the_first_rank_alone_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda self: False))
    report = Report(every_n_steps=1)
    trainer(tmp_path, [report]).fit(Toy())
    assert not (tmp_path / "report.html").exists()
    assert report.report.curves["train/kl"].last == [8, 16.0]


# --------------------------------------------------------------------------------------------------- ends and returns


class At(L.Callback):
    """Does something once a step is done."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.action()


def status(path):
    return read_report(path)[1][0].status


def test_a_failed_run_has_its_report(parse, tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, [Report()]).fit(Toy(fail_at=6))
    assert status(tmp_path / "report.html") == f"stopped at step 5 by RuntimeError: broken {NASTY[:-2]}"
    assert len(parse(tmp_path / "report.html").all("script")) == 1
    found = curves(tmp_path / "report.html")
    assert found["train/kl"] == WANTED["train/kl"][:5] and found["train/late"] == WANTED["train/late"][:5]


def test_a_broken_off_run_has_its_report(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        trainer(tmp_path, [Report(), At(3, interrupt)]).fit(Toy())
    signal.signal(signal.SIGINT, before)  # Lightning leaves Ctrl-C ignored
    assert status(tmp_path / "report.html") == "stopped at step 3 by KeyboardInterrupt"
    assert curves(tmp_path / "report.html")["train/kl"] == WANTED["train/kl"][:3]


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("step", [3, 4, 7])
def test_the_report_of_a_resumed_run_is_whole(step, elsewhere, tmp_path):
    first = [Report(), At(step, lambda: signal.raise_signal(signal.SIGTERM)), SaveOnInterrupt(str(tmp_path))]
    with pytest.raises(Interrupted):
        trainer(tmp_path / "a", first).fit(Toy())
    path = tmp_path / "a" / "report.html"
    assert status(path) == f"interrupted at step {step}"
    assert curves(path)["train/late"] == WANTED["train/late"][:step]
    started = read_report(path)[1][0].started
    folder = tmp_path / ("b" if elsewhere else "a")
    trainer(folder, [Report()]).fit(Toy(), ckpt_path=tmp_path / "interrupted.ckpt")
    path = folder / "report.html"
    assert status(path) == "finished" and read_report(path)[1][0].started == started
    found = curves(path)
    if elsewhere:  # what a module logs after the checkpoint of a step, only the old file knows
        assert found.pop("train/late") == [point for point in WANTED["train/late"] if point[0] != step]
    else:
        assert found.pop("train/late") == WANTED["train/late"]
    constant = found.pop("train/constant")
    assert [value for _, value in constant] == [7.0] * len(constant) and constant[-1][0] == 8
    assert found == {k: WANTED[k] for k in ("train/kl", "loss", "val/accuracy")}


def test_steps_after_the_checkpoint_that_one_goes_on_from_are_forgotten(tmp_path):
    saving = ModelCheckpoint(tmp_path / "c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, [Report(), saving], enable_checkpointing=True).fit(Toy())
    resumed = Toy(late=False)
    trainer(tmp_path, [Report()], steps=6).fit(resumed, ckpt_path=tmp_path / "c" / "step=5.ckpt")
    found = curves(tmp_path / "report.html")
    assert found["train/kl"] == WANTED["train/kl"][:6] and found["train/late"] == WANTED["train/late"][:5]


def test_a_metric_that_is_only_logged_behind_the_checkpoint_is_none_of_the_resumed_run(tmp_path):
    saving = ModelCheckpoint(tmp_path / "c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, [Report(), saving], enable_checkpointing=True).fit(Toy())
    trainer(tmp_path, [Report()], steps=3).fit(Toy(), ckpt_path=tmp_path / "c" / "step=2.ckpt")
    assert curves(tmp_path / "report.html").keys() == {"train/kl", "train/constant", "train/late", "loss"}


def test_a_file_of_another_run_completes_nothing(tmp_path):
    saving = ModelCheckpoint(tmp_path / "c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path / "a", [Report(), saving], enable_checkpointing=True).fit(Toy())
    trainer(tmp_path / "b", [Report()]).fit(Toy())
    trainer(tmp_path / "b", [Report()]).fit(Toy(), ckpt_path=tmp_path / "c" / "step=5.ckpt")
    assert [step for step, _ in curves(tmp_path / "b" / "report.html")["train/late"]] == [1, 2, 3, 4, 6, 7, 8]


def test_answers_before_training_survive_a_resume_and_are_not_those_of_another_run(short_fit, tmp_path):
    def callbacks(*further):
        return [SampleCompletions(["Say 1", *further], max_new_tokens=3), Report()]

    short_fit(callbacks("Say 2"))
    with pytest.raises(Interrupted):  # a new run, with files of its own
        short_fit([*callbacks(), At(2, lambda: signal.raise_signal(signal.SIGTERM))])
    path = tmp_path / "interrupted.ckpt"
    (stage,) = read_report(tmp_path / "report.html")[1]
    assert stage.samples.keys() == {"Say 1"}
    assert [answer["step"] for answer in stage.samples["Say 1"]] == [0]
    (earlier,) = read_report(tmp_path / "report.1.html")[1]
    assert earlier.samples.keys() == {"Say 1", "Say 2"}
    lines = {n: (tmp_path / f"samples{n}.jsonl").read_text().splitlines() for n in ("", ".1")}
    assert len(lines[""]) == 1 and {json.loads(line)["prompt"] for line in lines[".1"]} == {"Say 1", "Say 2"}
    first = stage.samples["Say 1"][0]

    from lightning_rlhf import InstructionDataModule, SFTModule

    data = [{"prompt": f"Say {i}", "completion": f"{i} " * (1 + i % 3)} for i in range(16)]
    module = SFTModule(torch.load(path, weights_only=True)["hyper_parameters"]["pretrained"])
    trainer(tmp_path / "b", callbacks(), steps=-1, max_epochs=1, val_check_interval=1.0).fit(
        module, InstructionDataModule(data, val=data[:4], batch_size=4, cache_dir=tmp_path / "cache"), ckpt_path=path
    )
    (stage,) = read_report(tmp_path / "b" / "report.html")[1]
    assert stage.samples["Say 1"][0] == first
    assert [answer["step"] for answer in stage.samples["Say 1"]] == [0, 4]
    assert [step for step, _ in stage.curves["val/loss"].all()] == [4]


def test_validation_before_and_after_training_belongs_to_the_report(parse, tmp_path):
    fitting = trainer(tmp_path, [Report()], val_check_interval=None, limit_val_batches=1)
    module = Toy()
    fitting.validate(module, verbose=False)
    assert not (tmp_path / "report.html").exists()
    fitting.fit(module)
    fitting.validate(module, verbose=False)
    fitting.test(module, verbose=False)
    found = curves(tmp_path / "report.html")
    assert found["val/accuracy"][0] == [0, 0.5] and found["val/accuracy"][-1] == [8, 0.58]
    assert parse(tmp_path / "report.html").texts("dd")[-1] == "0.5 → 0.58"
    fitting = trainer(tmp_path, [report := Report()], steps=2)
    fitting.fit(Toy())
    assert report.report.curves.keys() == {"train/kl", "train/constant", "train/late", "loss"}  # nothing of before


def test_it_is_written_every_few_steps_where_asked(tmp_path):
    seen = []

    def look():
        seen.append(curves(path)["train/late"][-1][0] if path.exists() else 0)

    path = tmp_path / "report.html"
    trainer(tmp_path, [Report(every_n_steps=3), *(At(step, look) for step in range(1, 9))]).fit(Toy())
    assert seen == [0, 0, 0, 3, 3, 3, 6, 6]
    with pytest.raises(ValueError, match="every_n_steps"):
        Report(every_n_steps=0)


def test_a_micro_batch_does_not_speak_for_a_step_that_is_done(tmp_path):
    class Counting(Toy):
        def training_step(self, batch, batch_idx):
            self.log("train/batch", float(batch_idx), batch_size=1)
            return self.weight(batch).sum()

    trainer(tmp_path, [Report()], steps=4, accumulate_grad_batches=2).fit(Counting())
    assert curves(tmp_path / "report.html")["train/batch"] == [[1, 1.0], [2, 3.0], [3, 5.0], [4, 7.0]]


# -------------------------------------------------------------------------------------------------------------- stages


def test_stages_make_one_report(parse, tmp_path):
    path = tmp_path / "all.html"
    for name, title in (("SFT", "Demo"), ("Reward", None), ("PPO", None)):
        trainer(tmp_path / name, [Report(path, title, stage=name, append=True)], steps=2).fit(Toy())
    html = parse(path)
    assert html.texts("h1") == ["Demo"] and html.texts("h2") == ["SFT", "Reward", "PPO"]
    ids = {e["@id"] for e in html.all("section")}
    assert [e["text"] for e in html.all("a")] == ["SFT", "Reward", "PPO"]
    assert {e["@href"][1:] for e in html.all("a")} == ids
    before = read_report(path)[1]
    trainer(tmp_path / "again", [Report(path, stage="Reward", append=True)], steps=3).fit(Toy())
    title, stages = read_report(path)
    assert title == "Demo" and [stage.name for stage in stages] == ["SFT", "Reward", "PPO"]
    assert (stages[0], stages[2]) == (before[0], before[2])
    assert stages[1].curves["train/kl"].last[0] == 3
    trainer(tmp_path, [Report(path)], steps=1).fit(Toy())
    assert parse(path).texts("h2") == ["Toy"] and not parse(path).all("nav")
