"""Instruction data: what the loss reads, cut rows, and the module's tokenizer and context."""

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


def test_the_loss_reads_answers_and_their_stop_token(tiny_tokenizer):
    data = ready(tiny_tokenizer, [row("Say", "dog")], val_fraction=0.0)
    (batch,) = data.train_dataloader()
    assert tiny_tokenizer.decode(batch.target) == "dog<|im_end|>"
    assert torch.equal(batch.input_ids[batch.predictor + 1], batch.target)


def test_nothing_usable_is_an_error(tiny_tokenizer):
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="No usable row"):
        ready(tiny_tokenizer, [{"messages": [{"role": "user", "content": "a"}]}], on_bad_row="skip")


def test_cut_rows_are_counted_and_rows_without_a_scored_token_dropped(tiny_tokenizer):
    rows = [row("a", "fox " * 300), row("question " * 300), row("a", "b")]
    with pytest.warns(UserWarning) as seen:
        data = ready(tiny_tokenizer, rows, val_fraction=0.0, truncate=True, on_bad_row="skip")
    text = " ".join(str(w.message) for w in seen)
    assert "1 of 3 rows were cut" in text and "1 of 3" in text
    batches = list(data.train_dataloader())
    assert sum(b.num_sequences for b in batches) == 2
    assert max(t.num_tokens for b in batches for t in unpack(b)) == 200


def test_without_a_tokenizer_it_says_what_to_give():
    with pytest.raises(ValueError, match="tokenizer"):
        InstructionDataModule(ROWS).setup("fit")


def test_the_modules_tokenizer_and_context_serve_by_default(tiny_model_dir):
    data = InstructionDataModule([row("a", "fox " * 400)])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(BadRowError, match="max_length=256"):
        trainer.fit(SFTModule(tiny_model_dir), data)
