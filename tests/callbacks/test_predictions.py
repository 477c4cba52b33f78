"""Predictions reach a file, a line a record, in the order of the data."""

import json

import lightning.pytorch as L
import pytest

from lightning_rlhf import InstructionDataModule, PreferenceDataModule, RewardModule, SFTModule, WritePredictions

ROWS = [{"prompt": f"Say {i}", "completion": f"{i} " * (1 + i % 4)} for i in range(9)]


def predict(module, data, tmp_path, callback=None, **options):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
                        callbacks=[callback or WritePredictions()], **options)  # fmt: skip
    return trainer.predict(module, data)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_scores_of_conversations_are_written_with_their_places(tiny_model_dir, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = PreferenceDataModule(predict=str(source), eval_batch_size=4, cache_dir=tmp_path)
    found = predict(RewardModule(tiny_model_dir), data, tmp_path)
    written = lines(tmp_path / "predictions.jsonl")
    assert [r["where"] for r in written] == [f"{source}:{i + 1}" for i in range(9)]
    assert [r["score"] for r in written] == [r["score"] for batch in found for r in batch]
    assert sorted(p.name for p in tmp_path.glob("predictions*")) == ["predictions.jsonl"]


def test_log_probs_of_answers_sum_to_the_loss(tiny_model_dir, tmp_path):
    data = InstructionDataModule(ROWS, predict=ROWS, val=ROWS, eval_batch_size=4, cache_dir=tmp_path)
    module = SFTModule(tiny_model_dir)
    predict(module, data, tmp_path, WritePredictions(tmp_path / "deep" / "x.jsonl"))
    written = lines(tmp_path / "deep" / "x.jsonl")
    assert [r["row"] for r in written] == list(range(9))
    loss = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(module, data, verbose=False)
    mean = -sum(r["logprob"] for r in written) / sum(r["tokens"] for r in written)
    assert mean == pytest.approx(loss[0]["val/loss"], rel=1e-5)


def test_predictions_of_an_earlier_run_are_kept(tiny_model_dir, tmp_path):
    data = PreferenceDataModule(predict=ROWS, eval_batch_size=4, cache_dir=tmp_path)
    (tmp_path / "predictions.jsonl").write_text("old\n")
    predict(RewardModule(tiny_model_dir), data, tmp_path)
    assert (tmp_path / "predictions.1.jsonl").read_text() == "old\n"
    assert len(lines(tmp_path / "predictions.jsonl")) == 9
    with pytest.raises(IsADirectoryError, match=r"WritePredictions: .* can't be written: it is a directory\."):
        predict(RewardModule(tiny_model_dir), data, tmp_path, WritePredictions(tmp_path))


def test_a_run_cut_off_leaves_what_it_had(tiny_model_dir, tmp_path):
    class Cut(L.Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 1:
                raise RuntimeError("cut")

    data = PreferenceDataModule(predict=ROWS, eval_batch_size=4, cache_dir=tmp_path)
    with pytest.raises(RuntimeError, match="cut"):
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
                            callbacks=[WritePredictions(), Cut()])  # fmt: skip
        trainer.predict(RewardModule(tiny_model_dir), data)
    assert len(lines(tmp_path / "predictions.jsonl.part0")) == 8
    assert not (tmp_path / "predictions.jsonl").exists()
