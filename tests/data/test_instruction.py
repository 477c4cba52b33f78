"""The data module: splits, caching, bad rows, batches."""

import json

import lightning.pytorch as L
import pytest
import torch

from lightning_rlhf.data.instruction import InstructionDataModule
from lightning_rlhf.data.packed import unpack
from lightning_rlhf.data.sources import BadRowError
from lightning_rlhf.stages import SFTModule


def row(question, answer="Paris."):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [row(f"question {i}", "fox " * (1 + i % 4)) for i in range(40)]


def ready(tokenizer, source=ROWS, **options):
    data = InstructionDataModule(source, tokenizer=tokenizer, **{"max_length": 200, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def texts(loader, tokenizer):
    return [
        tokenizer.decode([*t.prompt, *t.branches[0].input_ids]) for batch in loader for t in unpack(batch) if t.weight
    ]


def test_every_row_lands_in_one_part_and_is_seen_once(tiny_tokenizer):
    data = ready(tiny_tokenizer, val_fraction=0.3)
    train, val = (texts(x, tiny_tokenizer) for x in (data.train_dataloader(), data.val_dataloader()))
    assert len(train) + len(val) == 40 == len(set(train) | set(val))
    assert 4 <= len(val) <= 20


def test_split_is_by_first_user_turn_and_stable(tiny_tokenizer):
    data = ready(tiny_tokenizer, val_fraction=0.3)
    val = set(texts(data.val_dataloader(), tiny_tokenizer))
    twins = [row(r["messages"][0]["content"], "another answer") for r in ROWS]
    both = ready(tiny_tokenizer, [row("new one"), *twins[::-1], *ROWS], val_fraction=0.3)
    held = texts(both.val_dataloader(), tiny_tokenizer)
    prompts = {t.split("assistant")[0] for t in held}
    assert {t.split("assistant")[0] for t in val} <= prompts
    assert not prompts & {t.split("assistant")[0] for t in texts(both.train_dataloader(), tiny_tokenizer)}
    other = ready(tiny_tokenizer, val_fraction=0.3, seed=1)
    assert set(texts(other.val_dataloader(), tiny_tokenizer)) != val


def test_the_loss_reads_answers_and_their_stop_token(tiny_tokenizer):
    data = ready(tiny_tokenizer, [row("Say", "dog")], val_fraction=0.0)
    (batch,) = data.train_dataloader()
    assert tiny_tokenizer.decode(batch.target) == "dog<|im_end|>"
    assert torch.equal(batch.input_ids[batch.predictor + 1], batch.target)


def test_tokenised_once_and_again_when_anything_changes(tiny_tokenizer, tmp_path, monkeypatch):
    import lightning_rlhf.data.instruction as home

    calls = []
    real = home.encode
    monkeypatch.setattr(home, "encode", lambda *a: calls.append(1) or real(*a))

    def count(rows=ROWS, **options):
        calls.clear()
        ready(tiny_tokenizer, rows, cache_dir=tmp_path, val_fraction=0.0, **options)
        return len(calls)

    assert count() == 40
    assert count() == 0
    assert count([*ROWS[:-1], row("changed")]) == 40
    assert count(loss_on="all") == 40
    tiny_tokenizer.chat_template = "{{ '' }}" + tiny_tokenizer.chat_template
    assert count() == 40


def test_several_processes_give_the_same_rows(tiny_tokenizer, tmp_path):
    one = ready(tiny_tokenizer, cache_dir=tmp_path / "1")
    two = ready(tiny_tokenizer, cache_dir=tmp_path / "2", num_proc=2)
    assert texts(one.train_dataloader(), tiny_tokenizer) == texts(two.train_dataloader(), tiny_tokenizer)


def write(path, lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
    return str(path)


BAD = {
    "malformed": ('{"messages": [', "JSON"),
    "empty turn": (row("a", " "), "empty"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "a"}]}, "wizard"),
    "no assistant": ({"messages": [{"role": "user", "content": "a"}]}, "assistant"),
    "wrong type": ({"messages": 3}, "messages"),
    "too long": (row("a", "fox " * 300), "max_length=200"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_name_file_line_and_reason(name, tiny_tokenizer, tmp_path):
    line, reason = BAD[name]
    path = write(tmp_path / "rows.jsonl", [row("a"), "", line])
    with pytest.raises(BadRowError, match=rf"rows\.jsonl:3.*{reason}"):
        ready(tiny_tokenizer, path, val_fraction=0.0)


def test_skipped_rows_are_counted_by_reason_and_reported(tiny_tokenizer, tmp_path):
    lines = [row("a"), *(line for line, _ in BAD.values())]
    path = write(tmp_path / "rows.jsonl", lines)
    with pytest.warns(UserWarning, match="skipped") as seen:
        data = ready(tiny_tokenizer, path, val_fraction=0.0, on_bad_row="skip")
    assert len(texts(data.train_dataloader(), tiny_tokenizer)) == 1
    messages = [str(w.message) for w in seen if "skipped" in str(w.message)]
    assert len(messages) == 2 and "5 of 7" in messages[0] and "1 of 2" in messages[1]


def test_nothing_usable_is_an_error(tiny_tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [BAD["no assistant"][0]])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="No usable row"):
        ready(tiny_tokenizer, path, on_bad_row="skip")


def test_cut_rows_are_counted_and_rows_without_a_scored_token_dropped(tiny_tokenizer):
    rows = [row("a", "fox " * 300), row("question " * 300), row("a", "b")]
    with pytest.warns(UserWarning) as seen:
        data = ready(tiny_tokenizer, rows, val_fraction=0.0, truncate=True, on_bad_row="skip")
    text = " ".join(str(w.message) for w in seen)
    assert "1 of 3 rows were cut" in text and "1 of 3" in text
    batches = list(data.train_dataloader())
    assert sum(b.num_sequences for b in batches) == 2
    assert max(t.num_tokens for b in batches for t in unpack(b)) == 200


def test_system_prompt_and_named_format(tiny_tokenizer):
    rows = [{"instruction": "Hello", "output": "Hi"}]
    data = ready(tiny_tokenizer, rows, val_fraction=0.0, format="alpaca", system="Be brief.")
    assert texts(data.train_dataloader(), tiny_tokenizer)[0].startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_the_bundled_rows_load_with_a_real_template(tiny_tokenizer):
    data = ready(tiny_tokenizer, "bundled", max_length=4096)
    assert len(data._rows["train"]) + len(data._rows["val"]) >= 200
    assert len(data.sample_prompts(3)) == 3


@pytest.mark.parametrize("options", [dict(val_fraction=1.0), dict(batch_size=0), dict(eval_batch_size=0)])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        InstructionDataModule(ROWS, **options)


def test_without_a_tokenizer_it_says_what_to_give():
    with pytest.raises(ValueError, match="tokenizer"):
        InstructionDataModule(ROWS).setup("fit")


def test_the_modules_tokenizer_and_context_serve_by_default(tiny_model_dir):
    data = InstructionDataModule([row("a", "fox " * 400)])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(BadRowError, match="max_length=256"):
        trainer.fit(SFTModule(tiny_model_dir), data)
