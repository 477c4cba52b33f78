"""What the data modules share: weighted sources, tables, streaming."""

import json
import shutil
import tracemalloc
import warnings
import weakref
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import lightning_rlhf.data.base as home
from lightning_rlhf import HFExport, SFTModule
from lightning_rlhf.data import (
    InstructionDataModule,
    PreferenceDataModule,
    PromptDataModule,
    Ptx,
    WeightedSource,
    token_cache,
)
from lightning_rlhf.data.errors import DataError
from lightning_rlhf.data.formats import Conversation
from lightning_rlhf.data.packed import Size, unpack
from lightning_rlhf.data.planner import Planner
from lightning_rlhf.data.sources import BadRowError
from lightning_rlhf.data.token_cache import TokenCache, batched, map_in_order

SIDES = ("chosen", "rejected")


def row(name, i):
    """One that every data module takes."""
    return {
        "prompt": f"{name} {i}",
        "completion": "fox " * (1 + i % 4),
        "chosen": "dog " * (1 + i % 3),
        "rejected": "b",
    }


MODULES = {"instruction": InstructionDataModule, "preference": PreferenceDataModule, "prompts": PromptDataModule}
EACH = pytest.mark.parametrize("kind", MODULES)


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def ready(kind, tokenizer, source, stage="fit", ranks=(1, 0), micro_batches=1, **options):
    options = {"max_length": 200, "val_fraction": 0.0, "batch_size": 4, **options}
    data = MODULES[kind](source, tokenizer=tokenizer, **options)
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=micro_batches, lightning_module=None, state=SimpleNamespace(fn=stage),
        distributed_sampler_kwargs=dict(num_replicas=ranks[0], rank=ranks[1]),
    )  # fmt: skip
    data.prepare_data()
    data.setup(stage)
    return data


def names(data, batches, part="train"):
    """The prompts of rows, in the order in which they come."""
    return [data._rows[part].row(i)["where"].split(":")[0].rsplit("/")[-1] + str(i) for b in batches for i in b.rows]


# ---------------------------------------------------------------------------------------------------------- weights


@EACH
def test_weights_are_passes_an_epoch(kind, tiny_tokenizer, tmp_path, caplog):
    a = write(tmp_path / "a.jsonl", [row("a", i) for i in range(9)])
    b = write(tmp_path / "b.parquet", [row("b", i) for i in range(7)])
    sources = [{"source": a, "weight": 2.0}, WeightedSource(b, 0.5)]
    with caplog.at_level("INFO"):
        data = ready(kind, tiny_tokenizer, sources)
    assert f"{a}: 9 rows x 2.0" in caplog.text and f"{b}: 7 rows x 0.5" in caplog.text
    loader = data.train_dataloader()
    halves = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader)
        rows = [i for batch in batches for i in batch.rows]
        assert sorted(i for i in rows if i < 9) == sorted([*range(9)] * 2)
        halves.append([i for i in rows if i >= 9])
        assert len(halves[-1]) == 4  # a half of 7, rounded up
    assert set(halves[0] + halves[1]) == set(range(9, 16)) and halves[0] != halves[2]
    counts = [sum(half.count(i) for half in halves) for i in range(9, 16)]
    assert max(counts) - min(counts) <= 1  # no row comes again before all others came as often


@EACH
@pytest.mark.parametrize("window", [None, 8])
def test_weighted_rows_are_dealt_over_ranks_and_resumed_exactly(kind, window, tiny_tokenizer, tmp_path):
    a = write(tmp_path / "a.jsonl", [row("a", i) for i in range(23)])
    b = write(tmp_path / "b.jsonl", [row("b", i) for i in range(10)])
    options = dict(streaming_window=window, batch_size=4)
    sources = [{"source": a, "weight": 1.5}, {"source": b}]

    def loaders(ranks, **more):
        return [
            ready(kind, tiny_tokenizer, sources, ranks=(ranks, r), **options, **more).train_dataloader()
            for r in range(ranks)
        ]

    alone, *group = loaders(1) + loaders(2)
    for epoch in (0, 1, 2):
        for loader in (alone, *group):
            loader.set_epoch(epoch)
        assert len({len(loader) for loader in (alone, *group)}) == 1
        for whole, *parts in zip(alone, *group, strict=True):
            assert sorted(whole.rows) == sorted(row for part in parts for row in part.rows)
    for place in (0, 1, 5, len(alone) - 1):
        whole = loaders(2)[1]
        whole.set_epoch(1)
        it = iter(whole)
        for _ in range(place):
            next(it)
        state, rest = json.loads(json.dumps(whole.state_dict())), [b.rows for b in it]
        other = loaders(2)[1]
        other.load_state_dict(state)
        other.set_epoch(1)
        assert [b.rows for b in other] == rest
    changed = [{"source": a, "weight": 1.0}, {"source": b}]
    with pytest.raises(ValueError, match="another plan"):
        ready(kind, tiny_tokenizer, changed, **options).train_dataloader().load_state_dict(alone.state_dict())


def test_sources_may_differ_in_format_and_count_their_own_bad_rows(tiny_tokenizer, tmp_path):
    a = write(tmp_path / "a.jsonl", [{"text": "plain", "instruction": "Say", "output": "dog"}, {"instruction": 3}])
    b = write(tmp_path / "b.jsonl", [row("b", i) for i in range(3)])
    sources = [WeightedSource(a, format="text"), {"source": b, "weight": 1, "format": "prompt_completion"}]
    with pytest.warns(UserWarning, match=r"1 of 2 rows of train \(.*a\.jsonl\) was skipped: 1 x missing column"):
        data = ready("instruction", tiny_tokenizer, sources, on_bad_row="skip")
    texts = [tiny_tokenizer.decode([*t.prompt, *t.branches[0].input_ids]) for batch in data.train_dataloader()
             for t in unpack(batch)]  # fmt: skip
    assert len(texts) == 4 and sum(text.startswith("<|im_start|>") for text in texts) == 3


def test_a_source_is_tokenized_once_whatever_its_weight_and_neighbors(tiny_tokenizer, tmp_path, monkeypatch):
    calls = []
    real = TokenCache.write
    monkeypatch.setattr(TokenCache, "write", lambda *a: calls.append(1) or real(*a))
    a, b = ([row(name, i) for i in range(3)] for name in "ab")

    def count(*sources):
        calls.clear()
        ready("instruction", tiny_tokenizer, list(sources), cache_dir=tmp_path, val=a)
        return len(calls)

    assert count({"source": a, "weight": 2}, {"source": b}) == 2  # the validation rows are those of a
    assert count({"source": b, "weight": 0.1}, {"source": a}) == 0
    assert count({"source": [*b, row("c", 0)]}, {"source": a}) == 1


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "2", True])
def test_impossible_weights_are_refused(weight):
    with pytest.raises(ValueError, match=r"weight of a\.jsonl"):
        InstructionDataModule([{"source": "a.jsonl", "weight": weight}])


def test_evaluation_has_no_weights_and_sources_are_written_alike():
    with pytest.raises(ValueError, match=r"val gives b\.jsonl the weight 2"):
        InstructionDataModule("bundled", val=[{"source": "b.jsonl", "weight": 2}])
    with pytest.raises(ValueError, match="Weighted sources contain a dict"):
        InstructionDataModule([{"source": "a.jsonl"}, {"text": "a row"}])
    assert [s.source for s in InstructionDataModule([{"source": "a"}, "b.jsonl"])._weighted["train"]] == [
        "a",
        "b.jsonl",
    ]


def test_rows_with_a_column_source_are_rows(tiny_tokenizer):
    data = ready("instruction", tiny_tokenizer, [{"source": "books", "text": "a"}, {"source": "web", "text": "b"}])
    assert len(data._rows["train"]) == 2


def instantiate(parser, config):
    return (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config)


@EACH
def test_weights_in_a_configuration(kind, tmp_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(MODULES[kind], "data")
    (tmp_path / "my.yaml").write_text(
        "data:\n  train:\n  - {source: a.jsonl, weight: 2.0}\n  - {source: [b.parquet, c.csv], weight: 0.5}\n"
        "  - {source: org/set, format: text}\n  streaming_window: 64\n"
    )
    data = instantiate(parser, parser.parse_args(["--config", str(tmp_path / "my.yaml")])).data
    assert data._weighted["train"] == [
        WeightedSource("a.jsonl", 2.0),
        WeightedSource(["b.parquet", "c.csv"], 0.5),
        WeightedSource("org/set", 1, "text"),
    ]
    assert data.streaming_window == 64
    there = write(tmp_path / "a.jsonl", [row("a", 0)])  # a file that is there stays a path, too
    for path in ("a.jsonl", there):
        one = instantiate(parser, parser.parse_args(["--data.train", path])).data
        assert one._weighted["train"] == [WeightedSource(path)]


# ----------------------------------------------------------------------------------------------------------- epochs


def test_epochs_have_the_same_number_of_steps_whatever_the_order(tiny_tokenizer):
    """Lightning takes the first epoch's length for all: one that is longer would lose its last rows."""
    rows = [{"prompt": f"q {i}", "ranked": [f"{x}" for x in range(2 + i * i % 5)]} for i in range(30)]
    loader = ready("preference", tiny_tokenizer, rows, batch_size=9).train_dataloader()
    lengths = set()
    for epoch in range(20):
        loader.set_epoch(epoch)
        batches = list(loader)
        lengths.add(len(batches))
        assert sorted(i for b in batches for i in b.rows) == list(range(30))
        assert max(b.num_sequences for b in batches) < 9 + 2 * 6
    assert lengths == {len(loader)}


class Reader(L.LightningModule):
    """Notes what it is given."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.context_length = tokenizer, 200
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        rows = batch.rows
        self.seen.append((rows, batch.input_ids.tolist() if hasattr(batch, "input_ids") else batch.prompts))
        return self.weight * 1.0


def test_lightning_loses_no_row_of_any_epoch(tiny_tokenizer):
    rows = [{"prompt": f"q {i}", "ranked": [f"{x}" for x in range(2 + i * i % 5)]} for i in range(30)]
    module = Reader(tiny_tokenizer)
    data = PreferenceDataModule(rows, val_fraction=0.0, batch_size=9)
    L.Trainer(accelerator="cpu", max_epochs=4, logger=False, enable_progress_bar=False, enable_checkpointing=False,
              enable_model_summary=False).fit(module, data)  # fmt: skip
    assert sorted(i for rows, _ in module.seen for i in rows) == sorted([*range(30)] * 4)


# -------------------------------------------------------------------------------------------------------- streaming


@EACH
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_streaming_gives_the_same_rows(kind, suffix, tiny_tokenizer, tmp_path):
    path = write(tmp_path / f"my.{suffix}", [row("q", i) for i in range(50)])
    held, streamed = (
        ready(kind, tiny_tokenizer, path, val_fraction=0.3, streaming_window=window) for window in (None, 16)
    )

    def content(data, part):
        rows = data._rows[part]
        return [rows.row(i) for i in range(len(rows))]

    for part in ("train", "val"):
        assert content(held, part) == content(streamed, part) != []
    assert held.sample_prompts(5) == streamed.sample_prompts(5)
    assert names(held, held.val_dataloader(), "val") == names(streamed, streamed.val_dataloader(), "val")
    a, b = held.train_dataloader(), streamed.train_dataloader()
    assert len(a) == len(b)
    orders = [names(data, loader) for data, loader in ((held, a), (streamed, b))]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_streaming_reads_again_when_a_file_or_an_argument_changes(tiny_tokenizer, tmp_path, monkeypatch):
    read = []
    real = home.read_rows
    monkeypatch.setattr(home, "read_rows", lambda *a: read.append(1) or real(*a))
    path = write(tmp_path / "my.jsonl", [row("q", i) for i in range(5)])

    def count(kind="instruction", **options):
        read.clear()
        options = {"streaming_window": 16, **options}
        ready(kind, tiny_tokenizer, path, cache_dir=tmp_path / "cache", val=path, **options)
        return len(read)

    assert count() == 1  # training and validation rows are the same
    assert count() == 0
    assert count(batch_size=2, seed=1, streaming_window=3) == 1  # rows that are held out depend on the seed
    assert count(system="Be brief.") == 1
    assert count(format="prompt_completion") == 1
    assert count("preference") == 1 and count("preference", use_margin=True) == 1 and count("preference") == 0
    assert count("prompts") == 1 and count("prompts", as_text=True) == 1
    write(tmp_path / "my.jsonl", [row("q", i) for i in range(6)])
    assert count() == 1


@EACH
def test_streaming_counts_bad_rows_when_they_are_read_and_when_they_are_not(kind, tiny_tokenizer, tmp_path):
    path = tmp_path / "my.jsonl"
    write(path, [row("q", i) for i in range(5)])
    with open(path, "a") as file:
        file.write('{"broken\n' + json.dumps({"nothing": 1}) + "\n" + json.dumps(row("long " * 300, 1)) + "\n")
    for _ in range(2):  # read, then found in the cache
        with pytest.warns(UserWarning, match="skipped") as seen:
            ready(kind, tiny_tokenizer, str(path), streaming_window=65_536, on_bad_row="skip")
        texts = [str(w.message) for w in seen if "skipped" in str(w.message)]
        assert len(texts) == 2 and "2 of 8 rows of train were" in texts[0] and "1 of 6 rows of train was" in texts[1]
        assert "my.jsonl:6: malformed JSON" in texts[0] and "my.jsonl:8: " in texts[1]
    with pytest.raises(BadRowError, match=r"my\.jsonl:6: malformed JSON"):  # the same cache, but another policy
        ready(kind, tiny_tokenizer, str(path), streaming_window=65_536)


def test_streaming_stops_at_the_first_bad_row(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "_ROWS", 1)
    monkeypatch.setattr(token_cache, "_BLOCK", 1)
    path = tmp_path / "my.jsonl"
    write(path, [row("q", 0), row("long " * 300, 1), *(row("q", i) for i in range(2, 9))])
    seen = []
    real = InstructionDataModule.parse
    monkeypatch.setattr(InstructionDataModule, "parse", lambda *a, **kw: seen.append(a) or real(*a, **kw))
    with pytest.raises(BadRowError, match=r"my\.jsonl:2: .*max_length=200"):
        ready("instruction", tiny_tokenizer, str(path), streaming_window=65_536, cache_dir=tmp_path / "cache")
    assert len(seen) == 2
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []  # nothing half made stays


@pytest.mark.parametrize("num_proc", [None, 2])
def test_streaming_holds_few_rows(num_proc, tiny_tokenizer, tmp_path, monkeypatch):
    """Rows that are alive at a time: no more than are being tokenized, however many there are."""
    monkeypatch.setattr(token_cache, "_ROWS", 4)
    monkeypatch.setattr(token_cache, "_BLOCK", 2)
    path = write(tmp_path / "my.jsonl", [row("q", i) for i in range(400)])
    alive, most = 0, 0
    real = InstructionDataModule.parse

    def gone():
        nonlocal alive
        alive -= 1

    def parse(self, *args):
        nonlocal alive, most
        item = real(self, *args)
        weakref.finalize(item, gone)
        alive += 1
        most = max(most, alive)
        return item

    monkeypatch.setattr(InstructionDataModule, "parse", parse)
    data = ready("instruction", tiny_tokenizer, path, num_proc=num_proc, streaming_window=64)
    assert len(data._rows["train"]) == 400 and data._items == {}
    assert 1 <= most <= 3
    records = []
    for block in batched(map_in_order(list, batched(iter(range(1000)), 4), num_proc), 2):
        records.append(sum(map(len, block)))
    assert sum(records) == 1000 and max(records) == 8
    taken = 0

    def counted():
        nonlocal taken
        for taken in range(1000):
            yield [taken]

    mapped = map_in_order(list, counted(), num_proc)
    next(mapped)
    assert taken <= 5  # processes are given no more than they can start with
    mapped.close()


def test_a_plan_in_windows_holds_a_window(tmp_path):
    """Of half a million rows, whose sizes alone are 24 MB, less than 1 MB is held."""
    rows, window, numbers = 500_000, 4096, len(Size.NAMES)
    np.random.default_rng(0).integers(1, 9, (rows, numbers)).astype(np.float64).tofile(tmp_path / "sizes")
    sizes = np.memmap(tmp_path / "sizes", np.float64, mode="r").reshape(-1, numbers)

    def peak(window):
        planner = Planner(sizes, 64, window=window)
        tracemalloc.start()
        steps = planner.windows(epoch=0, start=4000)
        next(steps)
        assert planner.num_steps > 30_000
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    assert peak(window) < 1_000_000 + rows * 9  # and 9 bytes a row while the sizes are looked through, once


@pytest.mark.parametrize(("kind", "workers"), [("instruction", 2), *((kind, 0) for kind in MODULES)])
def test_resume_within_a_window_gives_the_rest_bit_for_bit(kind, workers, tiny_tokenizer, tmp_path):
    path = write(tmp_path / "my.jsonl", [row("q", i) for i in range(61)])
    options = dict(streaming_window=16, batch_size=6, **({"num_workers": workers} if workers else {}))

    def make(**more):
        return ready(kind, tiny_tokenizer, path, micro_batches=2, **options, **more).train_dataloader()

    def spell(batch):
        return batch.rows, batch.prompts if kind == "prompts" else (batch.input_ids.tolist(), batch.totals)

    whole = make()
    for epoch, place in ((0, 1), (1, 8), (2, len(whole) - 1))[: 1 if workers else 3]:
        whole.set_epoch(epoch)
        whole.position = 0
        it = iter(whole)
        for _ in range(place):
            next(it)
        state = json.loads(json.dumps(whole.state_dict()))
        rest = [spell(b) for b in it]
        other = make(cache_dir=tmp_path / f"{epoch}{place}")  # tokenized anew
        other.load_state_dict(state)
        other.set_epoch(epoch)
        assert len(other) == len(whole) and len(rest) == len(whole) - place
        assert [spell(b) for b in other] == rest


@pytest.mark.parametrize("kind", ["instruction", "preference"])
def test_a_resumed_run_streams_on_where_it_was_stopped(kind, tiny_tokenizer, tmp_path):
    path = write(tmp_path / "my.jsonl", [row("q", i) for i in range(40)])

    def fit(steps, ckpt=None):
        data = MODULES[kind](path, val=path, batch_size=6, streaming_window=8, cache_dir=tmp_path / "cache")
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[saving], limit_val_batches=0,
        )  # fmt: skip
        module = Reader(tiny_tokenizer)
        trainer.fit(module, data, ckpt_path=ckpt)
        return module.seen

    whole = fit(17)
    for step in (2, 7, 13):
        shutil.rmtree(tmp_path / "cache")
        assert fit(17, tmp_path / f"step={step}.ckpt") == whole[step:], step


def test_another_window_is_another_plan(tiny_tokenizer, tmp_path):
    path = write(tmp_path / "my.jsonl", [row("q", i) for i in range(20)])

    def make(**options):
        return ready("instruction", tiny_tokenizer, path, **options).train_dataloader()

    state = make(streaming_window=8).state_dict()
    for options in (dict(streaming_window=9), {}):
        with pytest.raises(ValueError, match="another plan"):
            make(**options).load_state_dict(state)


def test_texts_beside_prompts_stream_too(tiny_tokenizer, tmp_path):
    path = write(tmp_path / "my.jsonl", [row("q", i) for i in range(20)])
    loader = ready("prompts", tiny_tokenizer, path, ptx=Ptx(path, 3), streaming_window=8)
    batches = list(loader.train_dataloader())
    assert sorted(i for b in batches for i in b["prompts"].rows) == list(range(20))
    assert loader.beside["ptx"].streaming_window == 8


# ----------------------------------------------------------------------------------------------------------- tables


@EACH
def test_tables_fill_columns_that_a_row_has_not(kind, tiny_tokenizer, tmp_path):
    """Two shapes of rows in one file: the cells of the other are empty, or null."""
    if kind == "preference":
        pair = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5}
        other = {"prompt": "d", "answers": ["e", "f", "g"], "scores": [1, 3, 2]}
    else:
        pair = {"instruction": "a", "input": "b", "output": "c"}
        other = {"messages": [{"role": "user", "content": "d\ne"}, {"role": "assistant", "content": 'f, "g"'}]}
    names = [*pair, *(name for name in other if name not in pair)]
    pq.write_table(pa.Table.from_pylist([{n: r.get(n) for n in names} for r in (pair, other)]), tmp_path / "my.parquet")
    import csv

    with open(tmp_path / "my.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for r in (pair, other):
            writer.writerow([v if isinstance(v := r.get(n, ""), str) else json.dumps(v) for n in names])
    write(tmp_path / "my.jsonl", [pair, other])

    def content(name):
        data = ready(kind, tiny_tokenizer, str(tmp_path / name))
        rows = data._rows["train"]
        found = [rows.row(i) for i in range(len(rows))]
        for r in found:
            r.pop("where")
            r.pop("further", None)
        return found

    assert content("my.jsonl") == content("my.csv") == content("my.parquet")
    assert len(content("my.csv")) == 2


# ------------------------------------------------------------------------------------------------------- empty sides


def talk(question, answer="fox", **columns):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **columns}


def seed_that_holds_out(question, fraction=0.1):
    data = InstructionDataModule([talk(question)], val_fraction=fraction)
    for data.seed in range(1000):
        if data._held_out(Conversation(tuple(talk(question)["messages"]))):
            return data.seed
    raise AssertionError


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("others", [0, 20])
def test_a_usual_opening_is_never_held_out(tiny_tokenizer, tmp_path, window, others):
    rows = [talk("Hello", f"friend {i}") for i in range(50)] + [talk(f"Hi {i}") for i in range(others)]
    seed = seed_that_holds_out("Hello")
    source = write(tmp_path / "a.jsonl", rows)
    data = InstructionDataModule(source, tokenizer=tiny_tokenizer, max_length=200, seed=seed, streaming_window=window)
    if others:
        data.setup("fit")
        openings = [{tuple(data._rows[p].row(i)["input_ids"][:12]) for i in range(len(data._rows[p]))} for p in PARTS]
        assert not openings[0] & openings[1]  # what opens alike is on one side
    else:
        with pytest.warns(UserWarning, match="holds out none of the 50 rows.*1 first user turn.*Give data.val"):
            data.setup("fit")
    assert len(data._rows["train"]) + len(data._rows["val"]) == len(rows) and len(data._rows["train"]) >= 50


PARTS = ("train", "val")


def test_a_side_without_rows_to_train_on_is_an_error_with_the_counts(tiny_tokenizer, tmp_path):
    rows = [talk(f"{i}") for i in range(2)]
    data = InstructionDataModule(rows, tokenizer=tiny_tokenizer, max_length=200, val_fraction=0.9)
    for data.seed in range(100):
        if all(data._held_out(Conversation(tuple(r["messages"]))) for r in rows):
            break
    with pytest.raises(DataError, match=r"No usable row in the train data.*2 of 2 are held out.*Give data\.val"):
        data.setup("fit")
    long = InstructionDataModule(rows, tokenizer=tiny_tokenizer, max_length=3, val_fraction=0.0, on_bad_row="skip")
    with (
        pytest.warns(UserWarning, match="2 of 2 rows"),
        pytest.raises(DataError, match="train data: all 2 were skipped: 2 x too long"),
    ):
        long.setup("fit")


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_without_rows_is_an_error(tiny_tokenizer, stage):
    data = InstructionDataModule([talk("a"), talk("b")], tokenizer=tiny_tokenizer, max_length=200, val_fraction=0.0)
    part = {"validate": "val"}.get(stage, stage)
    with pytest.raises(DataError, match=rf"no {part} rows\. No row is held out.*is 0\. Give data.{part}"):
        data.setup(stage)


def test_an_empty_source_among_several_is_one_line(tiny_tokenizer, tmp_path):
    empty = str(tmp_path / "b.jsonl")
    open(empty, "w").close()
    for nothing in ([], empty):
        sources = [WeightedSource([talk("a"), talk("b")]), WeightedSource(nothing, 2.0)]
        data = InstructionDataModule(sources, tokenizer=tiny_tokenizer, max_length=200, val_fraction=0.0)
        with pytest.warns(UserWarning, match="has no row") as caught:
            data.setup("fit")
        assert sum("has no row" in str(one.message) for one in caught) == 1
        assert [len(b.rows) for b in data.train_dataloader()] == [2]
    data = InstructionDataModule([WeightedSource([]), WeightedSource(empty)], tokenizer=tiny_tokenizer)
    with (
        warnings.catch_warnings(),
        pytest.raises(DataError, match=r"No usable row in the train data.*b\.jsonl\): there is none\."),
    ):
        warnings.simplefilter("error")  # the error is enough
        data.setup("fit")


def test_texts_beside_prompts_may_not_be_empty(tiny_tokenizer, tmp_path):
    data = PromptDataModule([{"prompt": "a"}], ptx=Ptx([talk("a" * 300)], max_length=5), max_length=50,
                            tokenizer=tiny_tokenizer, val_fraction=0.0, on_bad_row="skip")  # fmt: skip
    with pytest.warns(UserWarning, match="rows of ptx train"), pytest.raises(DataError, match="the ptx train data"):
        data.setup("fit")


def fit(tiny_model_dir, tmp_path, data, callbacks=(), **options):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), max_steps=1,
                        default_root_dir=tmp_path, callbacks=list(callbacks), **options)  # fmt: skip
    trainer.fit(SFTModule(str(tiny_model_dir)), data)
    return trainer


def test_what_waits_for_validation_in_vain_is_told_at_the_start(tiny_model_dir, tmp_path):
    def data():
        return InstructionDataModule([talk("a"), talk("b")], val_fraction=0.0, max_length=200)

    checkpoint = ModelCheckpoint(tmp_path / "c", monitor="val/loss")
    with pytest.warns(UserWarning) as caught:
        fit(tiny_model_dir, tmp_path, data(), [HFExport(monitor="val/loss"), checkpoint])
    told = [str(w.message) for w in caught]
    assert any("HFExport (val/loss), ModelCheckpoint (val/loss)" in t and "Give data.val" in t for t in told)
    assert not any(t.startswith(("HFExport", "Total length of `list`")) for t in told), "it is said again"
    assert (tmp_path / "hf" / "last").is_dir() and not (tmp_path / "hf" / "best").exists()
    with pytest.raises(ValueError, match=r"nothing is validated.*when: end"):
        fit(tiny_model_dir, tmp_path / "x", data(), [HFExport(monitor="val/loss", when="best")])
    with pytest.raises(DataError, match="EarlyStopping waits for val/loss, which never comes"):
        fit(tiny_model_dir, tmp_path / "y", data(), [EarlyStopping("val/loss")])
    with pytest.warns(UserWarning, match="limit_val_batches is 0.*HFExport"):
        both = InstructionDataModule([talk("a")], [talk("b")], max_length=200)
        fit(tiny_model_dir, tmp_path / "z", both, [HFExport(monitor="val/loss")], limit_val_batches=0)


# ----------------------------------------------------------------------------------------------- what nothing reads


@pytest.mark.parametrize("window", [None, 64])
def test_keys_that_nothing_reads_are_counted_in_a_line(tiny_tokenizer, tmp_path, caplog, window):
    rows = [talk(f"{i}", category="a") for i in range(30)]
    rows[0]["messages"][0]["id"] = 5
    rows[1] |= {"lang": "en", "reason": None, "train": True, "label": True}
    source = write(tmp_path / "a.jsonl", rows)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        data = InstructionDataModule(source, tokenizer=tiny_tokenizer, max_length=200, streaming_window=window)
        with caplog.at_level("INFO"):
            data.setup("fit")
        (line,) = [r.message for r in caplog.records if "no setting reads" in r.message]
        assert line == "keys that no setting reads: category (30 rows), id of a turn (1 row)"
    prompts = PromptDataModule(source, tokenizer=tiny_tokenizer, max_length=200, val_fraction=0.0)
    prompts.setup("fit")
    assert prompts.unread["train"] == {"id of a turn": 1}  # columns ride along for rewards
    bundled = InstructionDataModule(tokenizer=tiny_tokenizer, max_length=2000)
    bundled.setup("fit")
    assert not bundled.unread["train"]


def test_a_cache_that_cant_be_written_is_named(tiny_tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    data = InstructionDataModule([talk("a")], tokenizer=tiny_tokenizer, max_length=200, cache_dir=tmp_path / "file")
    with pytest.raises(DataError, match=r"token cache .*file/tokens can't be written: .*data\.cache_dir.*RLHF_CACHE"):
        data.prepare_data()


# ------------------------------------------------------------------------------------------------------ other content


@EACH
@pytest.mark.parametrize("window", [None, 64])
def test_a_resume_with_other_rows_or_another_order_is_refused(kind, tiny_tokenizer, tmp_path, window):
    rows = [row("a", i) for i in range(8)]

    def loader(rows, name="a.jsonl"):
        return ready(kind, tiny_tokenizer, write(tmp_path / name, rows), streaming_window=window).train_dataloader()

    state = loader(rows).state_dict()
    loader(rows, "moved.jsonl").load_state_dict(state)  # the same rows elsewhere
    loader([{**r, "note": 5} for r in rows] if kind != "prompts" else rows, "b.jsonl").load_state_dict(state)
    for others in (rows[::-1], [*rows[:-1], row("b", 7)]):
        with pytest.raises(DataError, match=r"'content'.*the rows differ, or their order"):
            loader(others, "c.jsonl").load_state_dict(state)


def test_a_run_is_not_resumed_on_rows_in_another_order(tiny_model_dir, tmp_path):
    rows = [talk(f"{i}", "fox " * (1 + i % 2)) for i in range(16)]

    def data(rows):
        return InstructionDataModule(rows, val_fraction=0.0, max_length=200, batch_size=4)

    fit(tiny_model_dir, tmp_path, data(rows), [ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=1)])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False, max_steps=2, default_root_dir=tmp_path)  # fmt: skip
    with pytest.raises(DataError, match="the rows differ, or their order"):
        trainer.fit(SFTModule(str(tiny_model_dir)), data(rows[2:] + rows[:2]), ckpt_path=str(tmp_path / "x.ckpt"))
