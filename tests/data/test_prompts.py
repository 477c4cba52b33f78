"""Prompts: rows of all formats, their further columns, plans over ranks, texts beside them, resume in any place."""

import dataclasses
import datetime
import json
import re
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf.data.errors import DataError
from lightning_rlhf.data.formats import FormatError
from lightning_rlhf.data.packed import PackedBatch, unpack
from lightning_rlhf.data.prompt_formats import PROMPT_FORMATS, to_prompt
from lightning_rlhf.data.prompts import DataPairs, PromptBatch, PromptDataModule, PromptsWith, Ptx
from lightning_rlhf.data.sources import BadRowError
from lightning_rlhf.data.tokens import encode_prompt


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


ROWS = [{"prompt": f"question {i} " + "fox " * (i % 5), "number": i} for i in range(23)]
TEXTS = [{"text": f"text {i} " + "dog " * (1 + i % 4)} for i in range(7)]


def ready(tokenizer, source=ROWS, stage="fit", **options):
    data = PromptDataModule(source, tokenizer=tokenizer, **{"max_length": 200, "val_fraction": 0.0, **options})
    data.prepare_data()
    data.setup(stage)
    return data


def on_ranks(tokenizer, ranks, **options):
    """The training loaders of all ranks."""
    loaders = []
    for rank in range(ranks):
        data = ready(tokenizer, **options)
        sampler = dict(num_replicas=ranks, rank=rank)
        data.trainer = SimpleNamespace(
            accumulate_grad_batches=1, distributed_sampler_kwargs=sampler, state=SimpleNamespace(fn="fit")
        )
        loaders.append(data.train_dataloader())
    return loaders


# ------------------------------------------------------------------------------------------------------------- formats

TALK = [user("a"), assistant("b"), user("c")]
FORMS = {
    "prompt text": ({"prompt": "Say"}, [user("Say")]),
    "prompt messages": ({"prompt": [system("s"), *TALK]}, [system("s"), *TALK]),
    "prompt with an answer": ({"prompt": [user("a"), assistant("b")]}, [user("a")]),
    "prompt transcript": ({"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"}, TALK),
    "pair": ({"prompt": "Say", "chosen": "x", "rejected": "y"}, [user("Say")]),
    "ranking": ({"prompt": "Say", "answers": ["x"]}, [user("Say")]),
    "messages": ({"messages": [*TALK, assistant("d")]}, TALK),
    "messages without an answer": ({"messages": TALK}, TALK),
    "messages with an empty answer": ({"messages": [user("a"), assistant("")]}, [user("a")]),
    "colossalchat": ({"messages": [{"from": "human", "content": "a"}, {"from": "gpt", "content": "b"}]}, [user("a")]),
    "colossalchat preference": (
        {"context": [{"from": "human", "content": "a"}], "chosen": {}, "rejected": {}},
        [user("a")],
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}]}, [user("a")]),
    "sharegpt preference": (
        {"conversations": [{"from": "human", "value": "a"}], "chosen": {}, "rejected": {}},
        [user("a")],
    ),
    "alpaca": ({"instruction": "a", "input": "b", "output": "c"}, [user("a\n\nb")]),
    "alpaca with a history": ({"instruction": "c", "history": [["a", "b"]]}, TALK),
    "question": ({"question": "你好？", "context": "a text", "answer": "42"}, [user("你好？")]),
    "transcripts": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        [user("a")],
    ),
    "text": ({"text": "Say"}, [user("Say")]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_format_gives_its_prompt(name):
    row, want = FORMS[name]
    assert list(to_prompt(row).prompt) == want
    if want[0]["role"] != "system":
        assert list(to_prompt(row, system="s").prompt) == [system("s"), *want]
        assert list(to_prompt({**row, "system": "own"}, system="s").prompt) == [system("own"), *want]
    format = PROMPT_FORMATS.detect(row).name
    assert to_prompt(row, format) == to_prompt(row)


def test_docs_name_every_format():
    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    section = text[text.index("\n## Prompts\n") : text.index("\n## What makes a row bad\n")]
    assert re.findall(r"\*\*`(\w+)`\*\*", section) == list(PROMPT_FORMATS)


def test_what_the_prompt_is_not_made_of_rides_along():
    row = {"instruction": "a", "input": "b", "output": "c", "system": "s", "x": None, "lang": "en"}
    assert to_prompt(row).columns == {"output": "c", "x": None, "lang": "en"}
    assert to_prompt({"prompt": "a", "messages": 3, "chosen": "b"}).columns == {"messages": 3, "chosen": "b"}


def test_tokens_are_those_of_inference(tiny_tokenizer):
    rows = [row for row, _ in FORMS.values()]
    (batch,) = ready(tiny_tokenizer, rows).train_dataloader()
    assert sorted(batch.rows) == list(range(len(rows))) and batch.total == len(rows)
    for i, row in enumerate(batch.rows):
        want = list(FORMS.values())[row][1]
        assert batch.messages[i] == want
        assert batch.prompts[i] == encode_prompt(tiny_tokenizer, want)
        text = tiny_tokenizer.apply_chat_template(want, tokenize=False, add_generation_prompt=True)
        assert tiny_tokenizer.decode(batch.prompts[i]) == text


def test_a_text_stays_a_text(tiny_tokenizer, tmp_path):
    tiny_tokenizer.chat_template = None
    texts = ["Once upon a time", "  今天天气很好 ", "\n\nHuman: no transcript"]
    rows = [{"prompt": texts[0]}, {"instruction": texts[1]}, {"text": texts[2]}]
    data = ready(tiny_tokenizer, rows, as_text=True)
    (batch,) = data.train_dataloader()
    assert [batch.messages[batch.rows.index(i)] for i in range(3)] == texts
    for ids, text in zip(batch.prompts, batch.messages, strict=True):
        assert ids == tiny_tokenizer(text)["input_ids"]
    assert data.sample_prompts(3) == texts
    path = tmp_path / "prompts.txt"
    path.write_text("One day\n\nTwo days\n", encoding="utf-8")
    assert ready(tiny_tokenizer, str(path), as_text=True).sample_prompts(5) == ["One day", "Two days"]


# ------------------------------------------------------------------------------------------------------------- columns

VALUES = [
    {"a": 1, "b": {"x": [1.5, None, True, "你好 \ud800"]}},
    {"a": "text", "c": 2**80},
    {"b": [], "where": "mine"},
    {"a": None},
]


def test_columns_keep_json_values_exactly(tiny_tokenizer):
    rows = [{"prompt": f"q {i}", **values} for i, values in enumerate(VALUES)]
    for batch in (
        *ready(tiny_tokenizer, rows, batch_size=3).train_dataloader(),
        *ready(tiny_tokenizer, rows, eval_batch_size=2, stage="validate", val=rows).val_dataloader(),
    ):
        assert list(batch.columns) == ["a", "b", "c", "where"]
        for name, values in batch.columns.items():
            assert values == [VALUES[row].get(name) for row in batch.rows]
            assert [type(v) for v in values] == [type(VALUES[row].get(name)) for row in batch.rows]


# ------------------------------------------------------------------------------------------------------------ bad rows


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("a")]}, "as_text"),
        ({"prompt": "a", "system": "s"}, "as_text"),
        ({"prompt": " \n"}, "empty"),
        ({"prompt": "a", "when": datetime.date(2020, 1, 1)}, "'when'.*JSON"),
    ],
)
def test_what_is_no_text_is_refused(row, reason, tiny_tokenizer):
    with pytest.raises(BadRowError, match=rf"list\[0\].*{reason}"):
        ready(tiny_tokenizer, [row], as_text=True)


def test_a_named_format_and_its_lacking_column(tiny_tokenizer):
    row = {"prompt": "a", "question": "b"}
    assert to_prompt(row, "question").prompt == (user("b"),)
    with pytest.raises(BadRowError, match="needs the column 'instruction'"):
        ready(tiny_tokenizer, [row], format="alpaca")
    with pytest.raises(ValueError, match="'alpacca' is not known"):
        ready(tiny_tokenizer, [row], format="alpacca")


def test_a_plain_text_has_no_system_prompt():
    with pytest.raises(ValueError, match="as_text makes prompts plain texts"):
        PromptDataModule(ROWS, as_text=True, system="s")
    with pytest.raises(ValueError, match=r"ptx is a list\. Give Ptx\(source, batch_size=\.\.\., max_length=\.\.\.\)"):
        PromptDataModule(ROWS, ptx=TEXTS)


@pytest.mark.parametrize("name", ["batch_size", "max_length"])
def test_texts_have_positive_sizes(name):
    with pytest.raises(ValueError, match=rf"^ptx\.{name} must be at least 1, got 0"):
        Ptx(**{name: 0})


@pytest.mark.parametrize(
    ("module", "max_length", "limit"),
    [
        (dict(prompt_limit=30, context_length=50), None, 30),
        (dict(prompt_limit=30, context_length=50), 40, 30),
        (dict(prompt_limit=30, context_length=50), 20, 20),
        (dict(prompt_limit=None, context_length=50), None, 50),
        (dict(context_length=50), None, 50),
        (dict(context_length=50), 20, 20),
    ],
)
def test_a_prompt_leaves_room_for_its_completion(module, max_length, limit, tiny_tokenizer):
    def fit(row):
        data = PromptDataModule([row], tokenizer=tiny_tokenizer, max_length=max_length, val_fraction=0.0, as_text=True)
        data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(**module), state=SimpleNamespace(fn="fit"))
        data.setup("fit")

    token = tiny_tokenizer.decode(tiny_tokenizer("x")["input_ids"])
    assert len(tiny_tokenizer(f"{token}," * (limit // 2))["input_ids"]) == limit
    fit({"prompt": f"{token}," * (limit // 2)})
    with pytest.raises(BadRowError, match=rf"list\[0\].*{limit + 2} tokens are over .*{limit}"):
        fit({"prompt": f"{token}," * (limit // 2 + 1)})


# --------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_is_seen_once_an_epoch_and_the_union_is_the_global_batch(ranks, tiny_tokenizer):
    group = on_ranks(tiny_tokenizer, ranks, batch_size=6)
    (alone,) = on_ranks(tiny_tokenizer, 1, batch_size=6)
    orders = []
    for epoch in (0, 1):
        for loader in (alone, *group):
            loader.set_epoch(epoch)
        assert len({len(loader) for loader in (alone, *group)}) == 1 and len(alone) == 4
        seen = []
        for whole, *parts in zip(alone, *group, strict=True):
            rows = [row for part in parts for row in part.rows]
            assert sorted(rows) == sorted(whole.rows)
            assert {part.total for part in parts} == {len(rows)} == {whole.total}
            assert max(len(part.rows) for part in parts) - min(len(part.rows) for part in parts) <= 1
            for part in parts:
                assert part.columns["number"] == list(part.rows)
            seen += rows
        assert sorted(seen) == list(range(23))
        orders.append(seen)
    assert orders[0] != orders[1]


def test_ranks_get_equally_many_prompts_however_long(tiny_tokenizer):
    rows = [{"prompt": "fox " * (60 if i == 3 else 1 + i % 2)} for i in range(8)]
    parts = [next(iter(loader)) for loader in on_ranks(tiny_tokenizer, 2, source=rows, batch_size=8)]
    assert [len(part.rows) for part in parts] == [4, 4]


def test_fewer_prompts_than_ranks_leave_a_rank_an_empty_batch(tiny_tokenizer):
    parts = [next(iter(loader)) for loader in on_ranks(tiny_tokenizer, 3, source=ROWS[:2], batch_size=8)]
    assert sorted(row for part in parts for row in part.rows) == [0, 1]
    (empty,) = [part for part in parts if not part.rows]
    assert (empty.prompts, empty.messages, empty.columns, empty.total) == ([], [], {"number": []}, 2)


def test_the_last_smaller_batch_is_kept_unless_told_otherwise(tiny_tokenizer):
    totals = [batch.total for batch in ready(tiny_tokenizer, batch_size=6).train_dataloader()]
    assert totals == [6, 6, 6, 5]
    assert [b.total for b in ready(tiny_tokenizer, batch_size=6, drop_last=True).train_dataloader()] == [6, 6, 6]
    with pytest.raises(ValueError, match="drop_last"):
        ready(tiny_tokenizer, batch_size=24, drop_last=True).train_dataloader()
    kept = ready(tiny_tokenizer, val=ROWS, eval_batch_size=24, batch_size=6, drop_last=True).val_dataloader()
    assert [batch.total for batch in kept] == [23]


def test_the_split_is_by_first_user_turn_and_that_of_fine_tuning(tiny_tokenizer):
    from lightning_rlhf.data.instruction import InstructionDataModule

    data = ready(tiny_tokenizer, val_fraction=0.3)
    sides = [{m[0]["content"] for batch in x for m in batch.messages} for x in
             (data.train_dataloader(), data.val_dataloader())]  # fmt: skip
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 23 and sides[1]
    rows = [{"prompt": row["prompt"], "completion": "b"} for row in ROWS]
    tuning = InstructionDataModule(rows, tokenizer=tiny_tokenizer, max_length=200, val_fraction=0.3)
    assert {m[0]["content"] for m in tuning.sample_prompts(30)} == sides[1]
    assert {m[0]["content"] for m in data.sample_prompts(30)} == sides[1]
    again = ready(tiny_tokenizer, val_fraction=0.3, stage="predict")
    assert [row for batch in again.predict_dataloader() for row in batch.rows] == list(range(len(sides[1])))


def test_the_bundled_prompts_are_first_user_turns(tiny_tokenizer):
    data = ready(tiny_tokenizer, "bundled", max_length=4096, val_fraction=0.1)
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    messages = [m for batch in batches for m in batch.messages]
    assert len(messages) >= 200
    assert {tuple(turn["role"] for turn in m) for m in messages} == {("user",), ("system", "user")}
    assert {lang for batch in batches for lang in batch.columns["lang"]} == {"zh", "en"}
    texts = ready(tiny_tokenizer, "bundled", max_length=4096, as_text=True).train_dataloader()
    assert {m[-1]["content"] for m in messages} == {text for batch in texts for text in batch.messages}


# ----------------------------------------------------------------------------------------------------------------- ptx


def spell(batch):
    """What a batch of prompts and texts holds."""
    trees = [tuple([*t.prompt, *t.branches[0].input_ids]) for t in unpack(batch["ptx"])]
    return batch["prompts"].rows, batch["prompts"].total, batch["ptx"].rows, trees, batch["ptx"].totals


def test_texts_go_round_beside_the_prompts(tiny_tokenizer):
    loader = ready(tiny_tokenizer, batch_size=3, ptx=Ptx(TEXTS, 2)).train_dataloader()
    assert isinstance(loader, PromptsWith) and len(loader) == 8
    rounds, prompts = [], []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert all(isinstance(b["prompts"], PromptBatch) and isinstance(b["ptx"], PackedBatch) for b in batches)
        rounds += [b["ptx"].rows for b in batches]
        prompts.append([row for b in batches for row in b["prompts"].rows])
    assert [sorted(p) for p in prompts] == [list(range(23))] * 2 and prompts[0] != prompts[1]
    assert [len(rows) for rows in rounds] == [2, 2, 2, 1] * 4  # 7 texts a round, wherever the prompts' epochs end
    dealt = [[row for rows in rounds[i : i + 4] for row in rows] for i in range(0, 16, 4)]
    assert [sorted(d) for d in dealt] == [list(range(7))] * 4 and dealt[0] != dealt[1]


def test_texts_are_dealt_over_ranks(tiny_tokenizer):
    options = dict(batch_size=5, ptx=Ptx(TEXTS, 4))
    group, (alone,) = on_ranks(tiny_tokenizer, 2, **options), on_ranks(tiny_tokenizer, 1, **options)
    for whole, *parts in zip(alone, *group, strict=True):
        for name in ("prompts", "ptx"):
            assert sorted(whole[name].rows) == sorted(row for part in parts for row in part[name].rows)
        assert {part["ptx"].totals for part in parts} == {dataclasses.replace(whole["ptx"].totals, bins=2)}


def test_held_out_texts_are_those_of_fine_tuning(tiny_tokenizer):
    loader = ready(tiny_tokenizer, ptx=Ptx(TEXTS * 5, 50), val_fraction=0.5).train_dataloader()
    held = ready(tiny_tokenizer, [{"prompt": row["text"]} for row in TEXTS], val_fraction=0.5, as_text=True)
    texts = {text for batch in held.train_dataloader() for text in batch.messages}
    (batch,) = loader
    assert texts == {tiny_tokenizer.decode([*t.prompt, *t.branches[0].input_ids[:-1]]) for t in unpack(batch["ptx"])}
    assert 0 < len(texts) < 7


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("place", range(9))
def test_resume_from_any_place_gives_the_rest(place, ranks, tiny_tokenizer):
    """8 batches an epoch of prompts, 4 and 2 a round of texts: places inside, and at the ends of both."""
    options = dict(batch_size=3, ptx=Ptx(TEXTS, 2))
    for rank in range(ranks):
        whole, other = (on_ranks(tiny_tokenizer, ranks, **options)[rank] for _ in range(2))
        whole.set_epoch(0)
        list(whole)  # an epoch before
        whole.set_epoch(1)
        it = iter(whole)
        for _ in range(place):
            next(it)
        state = json.loads(json.dumps(whole.state_dict()))
        rest = [spell(b) for b in it]
        next(iter(other))  # a loader in use forgets where it was
        other.load_state_dict(state)
        again = other.state_dict()  # a checkpoint before the first batch
        other.load_state_dict(again)
        assert len(other) == len(whole) == 8
        if place < 8:
            other.set_epoch(1)
            assert [spell(b) for b in other] == rest
        for loader in (whole, other):
            loader.set_epoch(2)
        assert [spell(b) for b in other] == [spell(b) for b in whole]


def test_another_plan_or_none_is_refused_on_resume(tiny_tokenizer):
    def state(**options):
        return ready(tiny_tokenizer, batch_size=3, **options).train_dataloader()

    both = dict(ptx=Ptx(TEXTS, 2))
    for was, now, reason in [
        (both, dict(ptx=Ptx(TEXTS, 3)), "'batch_size': 2"),
        (both, {}, "another plan"),
        ({}, both, "without ptx"),
    ]:
        with pytest.raises(ValueError, match=reason):
            state(**now).load_state_dict(state(**was).state_dict())


class Toy(L.LightningModule):
    """One iteration a training step, by hand; notes what it was given."""

    def __init__(self, tokenizer):
        super().__init__()
        self.automatic_optimization = False
        self.tokenizer, self.prompt_limit = tokenizer, 100
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.seen.append(spell(batch))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight * batch["prompts"].total)
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.validated += batch.rows


def fit(tokenizer, folder, steps, ckpt=None, save=None):
    data = PromptDataModule(ROWS, val=ROWS[:3], batch_size=3, ptx=Ptx(TEXTS, 2), cache_dir=folder / "cache")
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=save, save_top_k=-1) if save else None
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(save), default_root_dir=folder,
        callbacks=[saving] if saving else [], num_sanity_val_steps=0,
    )  # fmt: skip
    module = Toy(tokenizer)
    trainer.fit(module, data, ckpt_path=ckpt)
    return module


def test_a_resumed_run_gets_the_batches_that_an_undisturbed_one_gets(tiny_tokenizer, tmp_path):
    whole = fit(tiny_tokenizer, tmp_path / "a", 20, save=1)
    assert len(whole.seen) == 20 and set(whole.validated) == {0, 1, 2}
    for step in (1, 4, 7, 8, 12, 16, 19):  # 8 steps an epoch, 4 a round of texts
        resumed = fit(tiny_tokenizer, tmp_path / "b", 20, ckpt=tmp_path / "a" / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:], step


def test_passages_of_dolly_are_part_of_the_prompt():
    row = {"instruction": "Who wrote it?", "context": "By Ann.", "response": "Ann", "category": "qa"}
    made = to_prompt(row)
    assert list(made.prompt) == [user("Who wrote it?\n\nBy Ann.")]
    assert made.columns == {"response": "Ann", "category": "qa"}


def test_what_prompts_cant_bring_is_refused_by_name():
    for name in ("images", "tools", "functions", "chat_template_kwargs"):
        with pytest.raises(FormatError, match=f"the row has '{name}'"):
            to_prompt({"prompt": "a", name: [{"a": 1}]})
    made = to_prompt({"prompt": [user("a") | {"id": 3, "weight": 0}], "system_prompt": "s", "label": False})
    assert made.prompt == (system("s"), user("a")) and made.columns == {"label": False}
    assert made.unread == ("id of a turn",)


def test_settings_that_leave_no_room_are_no_fault_of_a_row(tiny_tokenizer):
    data = PromptDataModule([{"prompt": "a"}], tokenizer=tiny_tokenizer, on_bad_row="skip")
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(prompt_limit=-88), state=SimpleNamespace(fn="fit"))
    with pytest.raises(DataError, match=r"max_new_tokens leaves no room for a prompt in .*: it is 89 too large"):
        data.prepare_data()


# --------------------------------------------------------------------------------------------------------------- pairs

PAIRS = [{"prompt": f"Say {i}", "chosen": "fox", "rejected": f"dog {i}"} for i in range(5)]


def test_pairs_go_round_beside_prompts_and_texts(tiny_tokenizer):
    data = dict(batch_size=3, pairs=DataPairs(PAIRS, 4), ptx=Ptx(TEXTS, 2))
    loader = ready(tiny_tokenizer, **data).train_dataloader()
    assert isinstance(loader, PromptsWith) and len(loader) == 8
    batches = list(loader)
    assert all(batch.keys() == {"prompts", "ptx", "pairs"} for batch in batches)
    rounds = [batch["pairs"].rows for batch in batches[:6]]
    assert [len(rows) for rows in rounds] == [2, 2, 1] * 2  # 5 pairs a round, two answers each
    assert all(len(batch["pairs"].pairs.better) == len(batch["pairs"].rows) for batch in batches)
    state = loader.state_dict()
    assert state.keys() == {"prompts", "ptx", "pairs"}
    with pytest.raises(ValueError, match="The checkpoint was made without pairs"):
        loader.load_state_dict({k: v for k, v in state.items() if k != "pairs"})


def test_what_is_no_group_of_pairs_is_named():
    with pytest.raises(ValueError, match=r"pairs is a list\. Give DataPairs\(source, batch_size=\.\.\., max_length="):
        PromptDataModule(pairs=PAIRS)
    with pytest.raises(ValueError, match=r"pairs\.batch_size must be at least 1"):
        DataPairs(PAIRS, 0)


# --------------------------------------------------------------------------------------------------------------- order


def numbers(batches):
    return [sorted(batch.columns["number"]) for batch in batches]


def test_prompts_in_the_order_of_a_column(tiny_tokenizer):
    rows = [{"prompt": f"question {i}", "number": 7 * i % 23, "level": i % 2} for i in range(23)]
    loader = ready(tiny_tokenizer, rows, batch_size=5, order_by="number").train_dataloader()
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        assert numbers(loader) == [list(range(a, min(23, a + 5))) for a in range(0, 23, 5)]
    last = ready(tiny_tokenizer, rows, batch_size=5, order_by="number", descending=True).train_dataloader()
    assert numbers(last)[0] == list(range(18, 23))
    first, second = on_ranks(tiny_tokenizer, 2, source=rows, batch_size=5, order_by="number")
    assert [sorted(a + b) for a, b in zip(*map(numbers, (first, second)), strict=True)] == numbers(loader)
    # equal ones in an order of the seed and the epoch
    level = ready(tiny_tokenizer, rows, batch_size=5, order_by="level").train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        level.set_epoch(epoch)
        assert [n for b in level for n in b.columns["level"]] == [0] * 12 + [1] * 11
        orders.append(numbers(level))
    assert orders[0] == orders[2] != orders[1]


def test_a_resumed_run_goes_on_in_the_same_order_alone(tiny_tokenizer):
    options = dict(batch_size=5, order_by="number")
    loader = ready(tiny_tokenizer, **options).train_dataloader()
    batches = iter(loader)
    next(batches)
    state, rest = loader.state_dict(), numbers(batches)
    again = ready(tiny_tokenizer, **options).train_dataloader()
    again.load_state_dict(state)
    assert numbers(again) == rest and len(rest) == 4
    other = ready(tiny_tokenizer, **options, descending=True).train_dataloader()
    with pytest.raises(DataError, match="another plan: 'order'"):
        other.load_state_dict(state)


def test_an_order_that_there_is_not(tiny_tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "level": 1}\n{"prompt": "b", "level": "hard"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl.*2: the column 'level' of order_by is 'hard': each row needs a"):
        ready(tiny_tokenizer, str(file), order_by="level").train_dataloader()
    with pytest.raises(DataError, match=r"'lvel' of order_by is missing \(columns: level\)"):
        ready(tiny_tokenizer, str(file), order_by="lvel").train_dataloader()
    with pytest.raises(ValueError, match="set order_by, or leave out descending"):
        PromptDataModule(ROWS, descending=True)
    with pytest.raises(ValueError, match="order_by sorts all prompts, and streaming_window reads some"):
        PromptDataModule(ROWS, order_by="number", streaming_window=64)
