"""Another stage's data is refused in a line; packed batches of one's own are read like a data module's."""

import re

import lightning.pytorch as L
import pytest
import torch
from grouping import grouped
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_rlhf import (
    DPOModule,
    InstructionDataModule,
    KTOModule,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    SFTModule,
    UnpairedDataModule,
)
from lightning_rlhf.cli import main
from lightning_rlhf.data import Branch, Tree, pack
from lightning_rlhf.data.packed import Pair
from lightning_rlhf.rewards.verifiers import length

PROMPTS = [{"prompt": f"question {i}"} for i in range(16)]
ROWS = [{**row, "completion": "fox"} for row in PROMPTS]
PAIRS = [{**row, "chosen": "fox", "rejected": "dog"} for row in PROMPTS]
ANSWERS = [{**row, "label": i % 2 == 0} for i, row in enumerate(ROWS)]
TREE = Tree([1, 5, 6], [Branch([8, 9, 4]), Branch([7])])


def trainer(path, **settings):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return L.Trainer(accelerator="cpu", max_steps=1, default_root_dir=path, **quiet, **settings)


@pytest.fixture
def stages(tiny_model_dir):
    return {
        "SFTModule": lambda: SFTModule(tiny_model_dir),
        "RewardModule": lambda: RewardModule(tiny_model_dir),
        "DPOModule": lambda: DPOModule(tiny_model_dir),
        "KTOModule": lambda: KTOModule(tiny_model_dir),
        "PPOModule": lambda: PPOModule(tiny_model_dir, length, **grouped(sampling=Sampling(max_new_tokens=4))),
    }


DATA = {
    "InstructionDataModule": (InstructionDataModule, ROWS, "PackedBatch without pairs"),
    "PreferenceDataModule": (PreferenceDataModule, PAIRS, "PackedBatch with pairs"),
    "UnpairedDataModule": (UnpairedDataModule, ANSWERS, "PackedBatch with labels"),
    "PromptDataModule": (PromptDataModule, PROMPTS, "PromptBatch"),
}
RIGHT = dict(zip(("SFTModule", "RewardModule", "KTOModule", "PPOModule"), DATA, strict=True))
RIGHT["DPOModule"] = "PreferenceDataModule"
WRONG = [(stage, data) for stage in RIGHT for data in DATA if RIGHT[stage] != data]


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
@pytest.mark.parametrize("stage, data", WRONG)
def test_another_stages_data_module_is_refused_before_rows_are_read(run, stage, data, stages, tmp_path, monkeypatch):
    maker, rows, batch = DATA[data]
    monkeypatch.setattr(maker, "prepare_data", lambda self: pytest.fail("rows were read"))
    words = f"{stage} trains on {RIGHT[stage]}'s batches; it was given {data}'s ({batch})."
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(words)}$"):
        getattr(trainer(tmp_path), run)(stages[stage](), datamodule=maker(rows))


@pytest.mark.parametrize("stage, data", WRONG)
def test_another_stages_batches_are_refused(stage, data, stages, tiny_tokenizer, tmp_path):
    maker, rows, batch = DATA[data]
    made = maker(rows, tokenizer=tiny_tokenizer, max_length=64, val_fraction=0.0)
    made.setup("fit")
    words = f"{stage} trains on {RIGHT[stage]}'s batches ({DATA[RIGHT[stage]][2]}); it was given {data}'s ({batch})."
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(words)}"):
        trainer(tmp_path).fit(stages[stage](), made.train_dataloader())


@pytest.mark.parametrize(
    "stage, advice",
    [
        ("SFTModule", "collate_fn=lightning_rlhf.data.pack)."),
        ("RewardModule", "collate_fn=lightning_rlhf.data.pack)."),
        ("DPOModule", "collate_fn=lightning_rlhf.data.pack)."),
        ("PPOModule", "give your rows to PromptDataModule."),
    ],
)
def test_batches_of_transformers_are_refused_with_how_to_pack_them(stage, advice, stages, tmp_path):
    ids = torch.ones(2, 3, dtype=torch.long)
    batches = [{"input_ids": ids, "attention_mask": ids, "labels": ids}]
    words = f"{stage} trains on {RIGHT[stage]}'s batches"
    with pytest.raises(MisconfigurationException, match=words) as error:
        trainer(tmp_path).fit(stages[stage](), DataLoader(batches, batch_size=None))
    assert "it was given a dict of input_ids, attention_mask, labels: " in str(error.value)
    assert str(error.value).endswith(advice) and "\n" not in str(error.value)


def test_batches_of_which_nothing_can_be_learnt_are_refused(stages, tmp_path):
    nothing = Tree([1, 5], [Branch([8, 9], [False, False])])
    with pytest.raises(MisconfigurationException, match="no token is scored"):
        trainer(tmp_path).fit(stages["SFTModule"](), DataLoader([nothing], collate_fn=pack))
    # without pairs
    with pytest.raises(MisconfigurationException, match=r"pairs=\[lightning_rlhf.data.packed.Pair\(better, worse\)\]"):
        trainer(tmp_path).fit(stages["RewardModule"](), DataLoader([TREE], collate_fn=pack))


def test_packed_batches_of_ones_own_are_trained_on(stages, tmp_path):
    pair = TREE._replace(pairs=[Pair(0, 1)])
    for stage, tree in (("SFTModule", TREE), ("RewardModule", pair), ("DPOModule", pair)):
        module = stages[stage]()
        trainer(tmp_path).fit(module, DataLoader([tree] * 2, batch_size=2, collate_fn=pack))
        assert module.trainer.global_step == 1


def test_data_of_an_earlier_run_is_not_blamed(stages, tmp_path):
    """Lightning's trainer.datamodule stays where the next run is given loaders."""
    both = trainer(tmp_path)
    both.validate(stages["SFTModule"](), datamodule=InstructionDataModule(ROWS, val_fraction=0.5), verbose=False)
    tree = TREE._replace(pairs=[Pair(0, 1)])
    assert both.validate(stages["RewardModule"](), DataLoader([tree], collate_fn=pack), verbose=False)


@pytest.mark.parametrize("stage", ["SFTModule", "RewardModule", "DPOModule"])
def test_predictions_of_packed_batches_of_ones_own(stage, stages, tmp_path):
    trees = [TREE, Tree([1, 4], [Branch([5])]), TREE, TREE]
    module = stages[stage]()
    batches = trainer(tmp_path).predict(module, DataLoader(trees, batch_size=3, collate_fn=pack))
    assert [len(batch) for batch in batches] == [5, 2]
    records = [record for batch in batches for record in batch]
    places = [(i, j) for i, tree in enumerate(trees) for j in range(len(tree.branches))]
    assert [(record["row"], record["answer"]) for record in records] == places
    for record, (i, j) in zip(records, places, strict=True):
        prompt, answer = trees[i].prompt, trees[i].branches[j].input_ids
        ids = torch.tensor([[*prompt, *answer]])
        assert record["tokens"] == len(answer)
        with torch.no_grad(), module.model_to_export.native_attention() as model:
            if stage != "RewardModule":
                logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                want = logprobs.gather(1, torch.tensor(answer)[:, None]).sum().item()
                assert record["logprob"] == pytest.approx(want, abs=1e-4)
                assert record.get("reward", 0.0) == 0.0  # at the start
            else:
                assert record["score"] == pytest.approx(model(ids).logits[0, -1].item(), abs=1e-4)
    # a second run counts from the beginning
    again = trainer(tmp_path).predict(module, DataLoader(trees, batch_size=3, collate_fn=pack))
    assert again == batches


def test_rows_with_several_answers_have_a_record_each(stages, tmp_path):
    data = PreferenceDataModule(PAIRS, predict=PAIRS)
    records = [r for batch in trainer(tmp_path).predict(stages["SFTModule"](), datamodule=data) for r in batch]
    assert [(r["row"], r["answer"]) for r in records] == [(i, j) for i in range(len(PAIRS)) for j in range(2)]


def test_a_rank_without_rows_has_no_record(stages, tiny_tokenizer, tmp_path):
    """Its batch is a planner's filler."""
    from lightning_rlhf.data.planner import pack_bin

    module = stages["SFTModule"]()
    data = InstructionDataModule(ROWS, tokenizer=tiny_tokenizer, max_length=64, val_fraction=0.5)
    data.setup("fit")
    totals = next(iter(data.val_dataloader())).totals
    filler = pack_bin([], type("Bin", (), {"totals": totals, "rows": ()})())
    assert trainer(tmp_path).predict(module, DataLoader([filler], batch_size=None)) == [[]]


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_command_line_is_told_in_a_line(command, tiny_model_dir, tmp_path):
    (tmp_path / "my.jsonl").write_text('{"prompt": "a"}\n' * 4)
    with pytest.raises(SystemExit) as stop:
        main(
            [
                command, "--model", "SFTModule", "--model.pretrained", str(tiny_model_dir), "--data",
                "PromptDataModule", "--data.train", str(tmp_path / "my.jsonl"), "--trainer.accelerator", "cpu",
                "--trainer.logger", "false", "--trainer.default_root_dir", str(tmp_path),
            ]
        )  # fmt: skip
    assert stop.value.code == (
        f"lightning-rlhf {command}: SFTModule trains on InstructionDataModule's batches; it was given "
        "PromptDataModule's (PromptBatch)."
    )
