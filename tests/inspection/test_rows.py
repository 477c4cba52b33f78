"""What is shown is what the batches of the loaders hold, row by row and token by token."""

import json
from itertools import groupby

import pytest
from grouping import grouped

from lightning_rlhf.data.instruction import InstructionDataModule
from lightning_rlhf.data.packed import pad
from lightning_rlhf.data.preference import PreferenceDataModule
from lightning_rlhf.data.prompts import PromptDataModule, Ptx
from lightning_rlhf.data.sources import BadRowError
from lightning_rlhf.inspection import inspect_data
from lightning_rlhf.inspection.statistics import histogram
from lightning_rlhf.rollout import Sampling
from lightning_rlhf.stages import PPOModule, RewardModule, SFTModule


def talk(*turns, **columns):
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return {"messages": messages, **columns}


TALKS = [
    talk("Hello", "I am fine", "fox?", "dog 鳌", lang="en"),
    talk("你好", "今天天气很好", "北京", "公园\n散步", lang="zh"),
    talk("one", "fox", lang="en"),
    {"text": "The quick brown fox"},
]
PREFERENCES = [
    {"prompt": "Capital?", "chosen": "Paris.", "rejected": "dog 鳌", "margin": 1.5, "lang": "en"},
    {"prompt": "Capital?", "answers": ["Lyon.", "Paris.", "It is Paris.", "fox"], "scores": [1, 7, 9, 1]},
    {"prompt": "你好", "chosen": "天气很好", "rejected": "fox dog fox dog"},
]


def shown(section):
    """(row, branch, position, id) of every token shown as read; branch -1 is the prompt."""
    return {
        (row.number, branch, piece.position + i, token)
        for row in section.rows
        for branch, found in enumerate([row.prompt, *(answer.pieces for answer in row.answers)], -1)
        for piece in found
        if piece.scored
        for i, token in enumerate(piece.ids)
    }


def tokens(section):
    """Ids by (row, branch)."""
    return {
        (row.number, branch): [token for piece in found for token in piece.ids]
        for row in section.rows
        for branch, found in enumerate([row.prompt, *(answer.pieces for answer in row.answers)], -1)
    }


def held(batches):
    """Ids by (row, branch) in batches, and the place of each branch."""
    ids, places = {}, {}
    for number, batch in enumerate(batches):
        every = batch.input_ids.tolist()
        sequence = 0
        for row, (prompt, branches) in zip(batch.rows, batch.forest.trees, strict=False):
            for branch, span in enumerate([prompt, *branches], -1):
                ids[row, branch] = every[span.start : span.start + span.length]
            for branch in range(len(branches)):
                places[number, sequence] = row, branch
                sequence += 1
    return ids, places


def targets(batches, places):
    """(row, branch, position, id) of every target."""
    return {
        (*places[number, sequence], batch.position_ids[predictor].item() + 1, target)
        for number, batch in enumerate(batches)
        for predictor, target, sequence in zip(
            batch.predictor.tolist(), batch.target.tolist(), batch.sequence.tolist(), strict=True
        )
    }


def facts(section):
    return dict(section.statistics.facts)


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_marks_are_the_targets_of_the_training_step(loss_on, tiny_model_dir):
    module = SFTModule(tiny_model_dir)
    options = {"val_fraction": 0.0, "loss_on": loss_on, "batch_size": 2}
    [section] = inspect_data(module, InstructionDataModule(TALKS, **options), rows=10).sections
    data = InstructionDataModule(TALKS, tokenizer=module.tokenizer, max_length=256, **options)
    data.setup("fit")
    batches = list(data.train_dataloader())
    ids, places = held(batches)
    assert tokens(section) == ids and len(section.rows) == len(TALKS)
    assert shown(section) == targets(batches, places) != set()
    assert sum(batch.num_scored for batch in batches) == len(shown(section))
    # a later user turn lies between two answers
    runs = [mark for mark, _ in groupby(piece.scored for piece in section.rows[0].answers[0].pieces)]
    assert runs.count(True) == (2 if loss_on == "assistant" else 1)


def test_marks_are_where_the_reward_step_reads_scores(tiny_model_dir):
    module = RewardModule(tiny_model_dir)
    options = {"val_fraction": 0.0, "use_margin": True, "pair_weight": "prompt", "batch_size": 4}
    [section] = inspect_data(module, PreferenceDataModule(PREFERENCES, **options), rows=10).sections
    data = PreferenceDataModule(PREFERENCES, tokenizer=module.tokenizer, max_length=256, **options)
    data.setup("fit")
    batches = list(data.train_dataloader())
    ids, places = held(batches)
    assert tokens(section) == ids
    assert shown(section) == {
        (*places[number, sequence], batch.position_ids[last].item(), batch.input_ids[last].item())
        for number, batch in enumerate(batches)
        for sequence, last in enumerate(batch.last.tolist())
    }
    names = {(row.number, branch): answer.name for row in section.rows for branch, answer in enumerate(row.answers)}
    said = {(row.number, answer.name, note) for row in section.rows for answer in row.answers for note in answer.notes}
    expected = set()
    for number, batch in enumerate(batches):
        for better, worse, margin, weight, _ in zip(*(column.tolist() for column in batch.pairs), strict=True):
            winner, loser = places[number, better], places[number, worse]
            note = f"better than {names[loser]}" + f" by a margin of {margin:g}" * (margin != 0)
            expected.add((winner[0], names[winner], note + f", weight {weight:.3g}" * (weight != 1)))
    assert said == expected
    assert names[0, 0] == "chosen" and names[0, 1] == "rejected" and names[1, 3] == "answer 3"
    assert (0, "chosen", "better than rejected by a margin of 1.5") in said
    assert len([note for note in said if note[0] == 1]) == 5, "of six pairs one is a tie"


def ppo(model, **options):
    reward = "lightning_rlhf.rewards.verifiers.length"
    return PPOModule(model, reward, **grouped(sampling=Sampling(max_new_tokens=8), **options))


def test_prompts_are_those_that_are_sampled_from(tiny_model_dir):
    module = ppo(tiny_model_dir, samples_per_prompt=3)
    source = [{"prompt": "fox 鳌", "answer": "42"}, {"prompt": "你好", "answer": None}, talk("a", "b", "c", "d")]
    [section] = inspect_data(module, PromptDataModule(source, val_fraction=0.0), rows=10).sections
    data = PromptDataModule(source, val_fraction=0.0, tokenizer=module.tokenizer, max_length=200)
    data.setup("fit")
    [batch] = data.train_dataloader()
    assert tokens(section) == {(row, -1): ids for row, ids in zip(batch.rows, batch.prompts, strict=True)}
    assert shown(section) == set() and all(row.answers == [] for row in section.rows)
    for i, row in enumerate(batch.rows):
        view = section.rows[row]
        assert "".join(piece.text for piece in view.prompt).endswith("<|im_start|>assistant\n")
        assert view.starts == "generation starts here: 3 completions of at most 8 tokens"
        assert view.columns == {name: values[i] for name, values in batch.columns.items()}
    assert section.rows[0].columns == {"answer": "42"}
    padded = 3 * len(source) * max(map(len, batch.prompts))
    assert facts(section)["padding avoided"].startswith(f"{padded:,} tokens as padded batches with each prompt 3 times")


def test_texts_beside_prompts_are_the_second_section(tiny_model_dir):
    module = ppo(tiny_model_dir)
    options = {"ptx": Ptx(TALKS, 2, 256), "val_fraction": 0.0}
    found = inspect_data(module, PromptDataModule(TALKS[:3], **options), rows=10)
    assert [section.name for section in found.sections] == ["prompts", "ptx"]
    data = PromptDataModule(TALKS[:3], tokenizer=module.tokenizer, max_length=200, **options)
    data.setup("fit")
    batches = list(data.train_dataloader().beside["ptx"])
    ids, places = held(batches)
    assert tokens(found.sections[1]) == ids
    assert shown(found.sections[1]) == targets(batches, places) != set()
    held_out = PromptDataModule(TALKS[:3], val=TALKS[:1], ptx=Ptx(TALKS))
    assert [section.name for section in inspect_data(module, held_out, "val").sections] == [""]


@pytest.mark.parametrize("micro_batches, ranks", [(1, 1), (2, 1), (1, 2)])
def test_padding_and_bins_are_those_of_the_plan(micro_batches, ranks, tiny_model_dir):
    source = [{"prompt": "q" * (1 + i % 7), "chosen": "fox " * (1 + i % 5), "rejected": "dog"} for i in range(20)]
    module, options = RewardModule(tiny_model_dir), {"val_fraction": 0.0, "batch_size": 8}
    found = inspect_data(module, PreferenceDataModule(source, **options), micro_batches=micro_batches, ranks=ranks)
    data = PreferenceDataModule(source, tokenizer=module.tokenizer, max_length=256, **options)
    data.setup("fit")
    loader = data._loader("train", 8, micro_batches * ranks, shuffle=True)
    batches = [batch for batch in loader if batch.rows]
    packed, padded = sum(b.num_tokens for b in batches), sum(pad(b).input_ids.numel() for b in batches)
    said = facts(found.sections[0])
    expected = f"{padded:,} tokens as padded batches, {packed:,} packed: {padded / packed:.2f} times"
    assert said["padding avoided"] == expected
    sizes = [batch.num_tokens for batch in batches]
    assert said["micro-batches"].startswith(f"{min(sizes):,} to {max(sizes):,} tokens")
    assert said["steps of an epoch"].startswith("5 of 8 sequences")
    lengths = sorted(n for b in batches for n in pad(b).attention_mask.sum(1).tolist())
    assert said["tokens of a sequence"].startswith(f"min {lengths[0]}, ")
    assert said["tokens of a sequence"].endswith(f"max {lengths[-1]}")
    bars = found.sections[0].statistics.histogram
    assert [sum(bar.low <= n <= bar.high for n in lengths) for bar in bars] == [bar.sequences for bar in bars]
    assert sum(bar.sequences for bar in bars) == len(lengths) == 40
    lengths = [batch.lengths for batch in batches]
    longer = sum(int((n[b.pairs.better] > n[b.pairs.worse]).sum()) for n, b in zip(lengths, batches, strict=True))
    assert said["pairs"] == f"20; the better answer is the longer one in {longer / 20:.1%}"


def test_a_plan_that_does_not_fit_is_said_with_what_fits(tiny_model_dir):
    module = SFTModule(tiny_model_dir)
    data = InstructionDataModule(TALKS, val_fraction=0.0, max_tokens=60)
    [section] = inspect_data(module, data, rows=1).sections
    [problem] = section.statistics.problems
    assert "exceeds max_tokens=60" in problem
    assert "max_tokens is 60" in facts(section)["micro-batches"] and len(section.rows) == 1


def test_rows_left_out_and_cut_are_counted_by_reason(tiny_model_dir, tmp_path):
    path = tmp_path / "my.jsonl"
    rows = [talk("a", ""), talk("a", "fox"), talk("b" * 300, "fox"), talk("b", "fox " * 100), talk("c", ""), talk("d")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    options = {"val_fraction": 0.0, "on_bad_row": "skip", "truncate": True, "max_length": 40}
    with pytest.warns(UserWarning, match="skipped|cut"):
        [section] = inspect_data(SFTModule(tiny_model_dir), InstructionDataModule(path, **options)).sections
    left_out = [text for name, text in section.statistics.facts if name == "left out"]
    assert left_out[0].startswith(f"2 x empty turn; first {path}:1: turn 2 (assistant) is empty")
    assert any(text.startswith(f"1 x nothing to learn; first {path}:3: ") for text in left_out)
    assert any(text.startswith(f"1 x malformed JSON; first {path}:7: ") for text in left_out)
    assert sum(int(text.split(" x ")[0]) for text in left_out) == 5
    assert facts(section)["cut"].startswith("1 rows at max_length") and facts(section)["rows"] == "2"
    assert [row.where for row in section.rows] == [f"{path}:2", f"{path}:4"]
    assert [any("cut" in note for note in row.notes) for row in section.rows] == [False, True]


def test_that_nothing_was_left_out_is_said(tiny_model_dir):
    [section] = inspect_data(SFTModule(tiny_model_dir), InstructionDataModule(TALKS, val_fraction=0.0)).sections
    assert facts(section)["left out or cut"] == "none"


def test_languages_are_those_of_the_rows_of_the_split(tiny_model_dir):
    for data in (InstructionDataModule(TALKS, val_fraction=0.0), PromptDataModule(TALKS, val_fraction=0.0)):
        module = (ppo if isinstance(data, PromptDataModule) else SFTModule)(tiny_model_dir)
        [section] = inspect_data(module, data).sections
        assert facts(section)["languages"] == "en 50.0%, zh 25.0%, none named 25.0%"
        assert ["en" in row.notes for row in section.rows] == [True, False, True, False]
    [section] = inspect_data(
        RewardModule(tiny_model_dir), PreferenceDataModule(PREFERENCES[1:], val_fraction=0.0)
    ).sections
    assert "languages" not in facts(section)


def test_rows_are_chosen_by_number_place_or_seed(tiny_model_dir, tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(talk(f"question {i}", "fox")) + "\n" for i in range(30)))
    module, data = SFTModule(tiny_model_dir), InstructionDataModule(path, val_fraction=0.3)

    def numbers(**options):
        return [row.number for row in inspect_data(module, data, **options).sections[0].rows]

    assert numbers(rows=3) == [0, 1, 2] and numbers(rows=0) == [] and len(numbers(rows=99)) < 30
    assert numbers(seed=1, rows=4) == numbers(seed=1, rows=4) != numbers(seed=2, rows=4)
    assert numbers(row=4) == numbers(row="4") == [4]
    [view] = inspect_data(module, data, row=4).sections[0].rows
    assert numbers(row=view.where) == numbers(row=view.where.rsplit("/")[-1]) == [4]
    [held_out] = inspect_data(module, data, "val", rows=1).sections[0].rows
    with pytest.raises(ValueError, match="in another"):
        numbers(row=held_out.where)
    with pytest.raises(ValueError, match="There is no row 30"):
        numbers(row=30)
    data.setup("fit")
    assert data.where("train", 4) == view.where and data.where("val", 0) == held_out.where


def test_the_data_module_gets_its_trainer_back(tiny_model_dir):
    data = PromptDataModule(TALKS[:3], ptx=Ptx(TALKS), val_fraction=0.0)
    data.trainer = mine = object()
    inspect_data(ppo(tiny_model_dir), data)
    assert data.trainer is mine and data.beside["ptx"].trainer is mine


def test_errors_say_what_to_do(tiny_model_dir):
    import lightning.pytorch as L

    module = SFTModule(tiny_model_dir)
    with pytest.raises(ValueError, match="LightningDataModule is none"):
        inspect_data(module, L.LightningDataModule())
    with pytest.raises(ValueError, match="There are no val rows"):
        inspect_data(module, InstructionDataModule(TALKS, val_fraction=0.0), "val")
    with pytest.raises(BadRowError, match=r"list\[1\]: turn 2 \(assistant\) is empty"):
        inspect_data(module, InstructionDataModule([TALKS[0], talk("a", "")], val_fraction=0.0))


def test_bars_have_round_widths_and_hold_everything():
    assert [(bar.low, bar.high, bar.sequences) for bar in histogram([7, 7, 7])] == [(7, 7, 3)]
    bars = histogram([3, 480, 481, 999])
    assert [bar.low for bar in bars] == list(range(0, 1000, 100))
    assert {bar.low: bar.sequences for bar in bars if bar.sequences} == {0: 1, 400: 2, 900: 1}
