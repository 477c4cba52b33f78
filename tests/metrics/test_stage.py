"""The metrics of a stage: apart by part of the data, logged once, then anew."""

import torch

from lightning_rlhf.metrics import PreferenceAccuracy, StageMetrics, TokenMean


def test_a_report_logs_each_value_and_starts_anew():
    metrics, logged = StageMetrics("loss"), {}

    def log(name, value, prog_bar, batch_size):
        logged[name] = (value.item(), prog_bar)

    metrics.declare("train", loss=TokenMean(), z_loss=TokenMean())
    metrics.declare("val", loss=TokenMean(), preference=PreferenceAccuracy())
    weight = torch.tensor([1.0, 3.0])
    metrics.update("train", weight, loss=torch.tensor([1.0, 5.0]), z_loss=torch.ones(2))
    metrics.update("val", weight, loss=torch.zeros(2))
    assert {name: value.item() for name, value in metrics.report("train", log).items()} == {"loss": 4, "z_loss": 1}
    assert logged == {"train/loss": (4, True), "train/z_loss": (1, False)}
    metrics.update("train", weight, loss=torch.ones(2))
    assert metrics.report("train", log)["loss"] == 1  # without what was reported before
    metrics.get("val", "preference").update(*torch.tensor([[2.0], [1.0], [5.0], [9.0]]))
    found = metrics.report("val", log)
    assert found["loss"] == 0 and found["accuracy"] == 1 and "preference" not in found  # a metric of several values


def test_an_epochs_log_leaves_metrics_to_lightning():
    metrics, logged = StageMetrics("score"), {}
    metrics.declare("test", score=TokenMean(), length=TokenMean())
    metrics.log_epoch("test", lambda name, metric, **options: logged.update({name: (metric, options["prog_bar"])}))
    assert logged == {f"test/{n}": (metrics.get("test", n), n == "score") for n in ("score", "length")}
    assert not metrics.state_dict()  # nothing for checkpoints
