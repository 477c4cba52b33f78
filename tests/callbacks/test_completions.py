"""The table of completions: all of them, once, with what is known of each, after a resume and on several ranks too."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pyarrow.parquet as pq
import pytest
from runs import load_script, spawn

from lightning_rlhf import GRPOModule
from lightning_rlhf.callbacks import CompletionsTable, Report
from lightning_rlhf.callbacks.completions import write_records
from lightning_rlhf.report import read_report
from lightning_rlhf.report.groups import choose_groups
from lightning_rlhf.rewards import WeightedReward

HERE = Path(__file__).parent
run_grpo = load_script(HERE.parent / "stages" / "run_grpo.py")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def length(prompts, completions):
    return [{"score": len(c) / 10, "vowels": float(sum(c.count(v) for v in "aeiou"))} for c in completions]


class Kept(GRPOModule):
    """Keeps what each iteration learned from."""

    def update_policy(self, experience, beside):
        self.experiences = [*getattr(self, "experiences", []), experience]
        return super().update_policy(experience, beside)


@pytest.fixture(scope="module")
def table(tiny_model_dir, tmp_path_factory):
    """Four iterations with a refill, a table of every second."""
    out = tmp_path_factory.mktemp("table")
    reward = [WeightedReward(run_grpo.has, 1.0, "has"), WeightedReward(length, 0.0, "length")]
    callbacks = [Report(), CompletionsTable(2)]
    _, module = run_grpo.run(tiny_model_dir, out, kind=Kept, reward=reward, batch_size=6, max_steps=4,
                                   groups=dict(flat_groups="refill", spare=1, rounds=2), callbacks=callbacks,
                                   save_every=1)  # fmt: skip
    return SimpleNamespace(out=out, module=module)


def test_every_completion_is_there_with_what_is_known_of_it(table):
    assert [p.name for p in sorted((table.out / "completions").iterdir())] == [
        "iteration_000002.jsonl", "iteration_000004.jsonl"]  # fmt: skip
    records = rows(table.out / "completions" / "iteration_000004.jsonl")
    experience = table.module.experiences[3]
    used = [record for record in records if record["learned"]]
    assert len(used) == len(experience.scores) and {record["iteration"] for record in records} == {4}
    advantages = experience.sum_by_sequence(experience.advantages) / experience.sum_by_sequence(experience.counts)
    by_row = dict(zip(experience.rows, range(99), strict=False))
    assert [record["row"] for record in records] == sorted(record["row"] for record in records)
    used.sort(key=lambda record: by_row[record["row"]])
    for record, score, advantage, tokens in zip(
        used, experience.scores.tolist(), advantages.tolist(), experience.lengths, strict=True
    ):
        assert record["score"] == record["score/has"] == score == float(record["data/wanted"] in record["completion"])
        assert record["advantage"] == pytest.approx(advantage, abs=1e-6)
        assert record["length"] == tokens and record["score/length"] == pytest.approx(len(record["completion"]) / 10)
        assert record["reward/length/vowels"] == sum(record["completion"].count(v) for v in "aeiou")
        assert record["prompt"].startswith("Say ") and not record["flat"]
    vain = [record for record in records if not record["learned"]]
    assert all(record["advantage"] is None for record in vain)
    assert len({record["row"] for record in records}) * 3 == len(records) >= len(used)


def test_a_report_shows_groups_of_the_last_table(table):
    records = rows(table.out / "completions" / "iteration_000004.jsonl")
    [stage] = read_report(table.out / "report.html")[1]
    assert stage.groups == choose_groups(records) and stage.groups[0]["iteration"] == 4
    best, worst = stage.groups[0]["answers"]
    assert best["score"] > worst["score"] and best["advantage"] > 0 > worst["advantage"]
    page = (table.out / "report.html").read_text()
    assert "<h3>Groups of iteration 4</h3>" in page and "<b>best</b> · score 1 " in page


def test_a_resumed_run_writes_the_same_rows_once(table, tiny_model_dir, tmp_path):
    before = {p.name: p.read_bytes() for p in (table.out / "completions").iterdir()}
    reward = [WeightedReward(run_grpo.has, 1.0, "has"), WeightedReward(length, 0.0, "length")]
    folder = tmp_path / "completions"
    folder.mkdir()
    for name, data in before.items():
        (folder / name).write_bytes(data)
    run_grpo.run(tiny_model_dir, tmp_path, reward=reward, batch_size=6, max_steps=4, ckpt=table.out / "step1.ckpt",
                 groups=dict(flat_groups="refill", spare=1, rounds=2), callbacks=[CompletionsTable(2)])  # fmt: skip
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


class Begun(L.Callback):
    """Stops a run in which training starts."""

    def on_train_start(self, trainer, pl_module):
        raise KeyError("training started")


def grpo(model, folder, *callbacks):
    callbacks = [*callbacks, Begun()]
    run_grpo.run(model, folder, reward=run_grpo.has, batch_size=3, max_steps=1, callbacks=callbacks)


def test_a_new_run_keeps_the_tables_of_an_earlier_one(tiny_model_dir, tmp_path, caplog):
    folder = tmp_path / "completions"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for number in (1, 2):
        for name in ("iteration_000002.jsonl", "iteration_000004.parquet"):
            (folder / name).write_text(f"{number}")
        with caplog.at_level("INFO"), pytest.raises(KeyError, match="training started"):
            grpo(tiny_model_dir, tmp_path, CompletionsTable(2))
        assert f"the tables of an earlier run are now in {tmp_path}/completions.{number}." in caplog.text
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    for number in (1, 2):
        old = sorted((tmp_path / f"completions.{number}").iterdir())
        assert [(p.name, p.read_text()) for p in old] == [
            ("iteration_000002.jsonl", str(number)), ("iteration_000004.parquet", str(number))]  # fmt: skip


def test_a_folder_that_can_not_be_written_is_told_before_training(tiny_model_dir, tmp_path):
    (tmp_path / "completions").write_text("a file")
    for options, folder in (({}, tmp_path / "completions"), ({"dirpath": "/proc/tables"}, Path("/proc/tables"))):
        with pytest.raises(OSError, match=rf"CompletionsTable: {folder}/.* can't be written: .* Set its dirpath to"):
            grpo(tiny_model_dir, tmp_path, CompletionsTable(2, **options))


@pytest.mark.distributed
def test_rows_of_all_ranks_in_the_order_of_one(tiny_model_dir, tmp_path):
    for n in (1, 2):
        options = dict(devices=n, batch_size=3, max_steps=1, table=1)
        spawn(HERE.parent / "stages" / "run_grpo.py", tiny_model_dir, tmp_path / str(n), **options)
    one, two = (rows(tmp_path / str(n) / "completions" / "iteration_000001.jsonl") for n in (1, 2))
    assert len(one) == 9
    for a, b in zip(one, two, strict=True):
        assert b == {**a, "advantage": pytest.approx(a["advantage"], abs=1e-5)}


def test_parquet_has_the_same_values(tmp_path):
    records = [
        {"row": 1, "score": 1.0, "completion": "a\n", "flat": True, "data/x": [1, 2], "advantage": None},
        {"row": 2, "score": None, "completion": "你", "flat": False, "data/x": "z", "advantage": None},
    ]
    for name in ("a.jsonl", "b.parquet"):
        write_records(tmp_path / name, records)
    assert rows(tmp_path / "a.jsonl") == records
    want = [{**r, "data/x": json.dumps(r["data/x"])} for r in records]
    assert pq.read_table(tmp_path / "b.parquet").to_pylist() == want
    write_records(tmp_path / "c.parquet", [])
    assert pq.read_table(tmp_path / "c.parquet").num_rows == 0
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError):
        write_records(tmp_path / "a.jsonl", [{"row": endless}])
    assert rows(tmp_path / "a.jsonl") == records and len(list(tmp_path.iterdir())) == 3  # whole, and no rest of it


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_any_value_of_the_data_can_be_written(tmp_path, name):
    values = [datetime.date(2024, 2, 29), b"x", Decimal("0.10"), 10**30, "half a pair: \ud83d"]
    records = [{f"data/{i}": value for i, value in enumerate(values)}, {"data/3": 0.5}]
    records = [{key: record.get(key) for key in records[0]} for record in records]
    write_records(tmp_path / name, records)
    found, last = rows(tmp_path / name) if name.endswith("jsonl") else pq.read_table(tmp_path / name).to_pylist()
    text = str.strip if name.endswith("jsonl") else json.loads
    assert [text(found[f"data/{i}"]) for i in range(3)] == ["2024-02-29", "b'x'", "0.10"]
    assert (int(found["data/3"]), found["data/4"], float(last["data/3"])) == (10**30, "half a pair: ?", 0.5)


def test_loggers_get_the_first_groups(tmp_path):
    logged = []
    trainer = SimpleNamespace(
        loggers=[SimpleNamespace(log_table=lambda **given: logged.append(given))],
        fast_dev_run=False, is_global_zero=True, default_root_dir=tmp_path,
    )  # fmt: skip
    records = [{"row": row, "completion": f"{row}", "score": row / 3} for row in (2, 1, 2, 0)]
    module = SimpleNamespace(iteration=1, completion_records=lambda: records)
    CompletionsTable(1, log_groups=2).on_train_batch_end(trainer, module, None, None, 0)
    [given] = logged
    assert given["key"] == "completions" and given["columns"] == ["row", "completion", "score"] and given["step"] == 1
    assert given["data"] == [["0", "0", "0"], ["1", "1", "0.3333"]]
    trainer.fast_dev_run = True
    CompletionsTable(1).on_train_batch_end(trainer, module, None, None, 0)
    assert len(logged) == 1


def test_groups_that_differ_most_come_first():
    def record(row, score, **more):
        return {"iteration": 3, "row": row, "prompt": f"p{row}", "completion": f"{score}", "truncated": False,
                "length": 4, "advantage": None, "score": score, **more}  # fmt: skip

    records = [record(0, 0.5), record(0, 0.5), record(1, 0.0), record(1, 0.9), record(2, None), record(3, 0.2),
               record(3, 0.1)]  # fmt: skip
    found = choose_groups(records, 3)
    assert [group["prompt"] for group in found] == ["p1", "p3", "p0"]
    assert [answer["score"] for answer in found[0]["answers"]] == [0.9, 0.0]
    assert len(found[2]["answers"]) == 1 and found[0]["mean"] == pytest.approx(0.45) and found[0]["size"] == 2


def test_what_it_refuses(short_fit):
    with pytest.raises(ValueError, match="every_n_iterations must be at least 1"):
        CompletionsTable(0)
    with pytest.raises(ValueError, match="format"):
        CompletionsTable(format="csv")
    with pytest.raises(ValueError, match="SFTModule samples nothing"):
        short_fit([CompletionsTable()])
