"""The reward stage: the loss's definition, invariance to every split, exact resume, the score's offset."""

import json
import random
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from runs import assert_equal, difference, load_script, quiet, spawn
from torch.optim import AdamW
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf import LoRA, PreferenceDataModule, RewardModule

SCRIPT = Path(__file__).with_name("run_reward.py")
run_reward = load_script(SCRIPT)
run, rows = run_reward.run, run_reward.rows
spawn = partial(spawn, SCRIPT)


def weights(module):
    return {k: v.detach().clone() for k, v in module.reward_model.named_parameters()}


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


# --------------------------------------------------------------------------------------- the same by plain transformers


def plain_model(module):
    """The classifier as transformers loads it, with the module's weights."""
    config = module.reward_model.transformer.config
    model = AutoModelForSequenceClassification.from_pretrained(
        module.pretrained, num_labels=1, pad_token_id=config.pad_token_id, attn_implementation="eager"
    )
    model.load_state_dict(module.reward_model.model.state_dict())
    return model


def answers_of(row):
    return row["ranked"] if "ranked" in row else [row["chosen"], row["rejected"]]


def margins_of(row, n):
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    scores = row.get("scores")
    return [(i, j, scores[i] - scores[j] if scores else row.get("margin", 0.0)) for i, j in pairs]


def plain_scores(model, tokenizer, data):
    """For each row its answers' scores, all rows padded on the right, and their lengths in tokens."""
    texts, sizes = [], []
    for row in data:
        for answer in answers_of(row):
            prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            answer = f"{answer}<|im_end|>"
            texts.append(prompt + answer)
            sizes.append(len(tokenizer(answer, add_special_tokens=False)["input_ids"]))
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    flat = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits[:, 0]
    counts = [len(answers_of(row)) for row in data]
    return flat.split(counts), torch.tensor(sizes).split(counts)


def plain_pairs(scores, sizes, data, pair_weight="pair", use_margin=False):
    """For each pair: its row, scores, margin, weight, lengths."""
    out = []
    for row, own, lengths in zip(data, scores, sizes, strict=True):
        found = margins_of(row, len(own))
        weight = 1.0 if pair_weight == "pair" else 1 / len(found)
        for i, j, margin in found:
            out.append((row, own[i], own[j], margin * use_margin, weight, lengths[i].item(), lengths[j].item()))
    return out


def plain_loss(pairs, centering_coef):
    total = sum(w * ((1 + (r - c + m).exp()).log() + centering_coef * (c + r) ** 2) for _, c, r, m, w, *_ in pairs)
    return total / sum(w for *_, w, _, _ in pairs)


ALL = dict(pair_weight="prompt", use_margin=True, centering_coef=0.1)
SETTINGS = {"plain": {}, "weights, margins, centering": ALL}


@pytest.fixture(scope="module")
def reference_gradients(tiny_model_dir):
    """Of the step of all rows, by plain transformers and autograd, in fp64."""
    found = {}
    for name, options in SETTINGS.items():
        module = RewardModule(tiny_model_dir)
        module.configure_model()
        model = plain_model(module).double()
        pairs = plain_pairs(
            *plain_scores(model, module.tokenizer, rows()),
            rows(),
            options.get("pair_weight", "pair"),
            options.get("use_margin", False),
        )
        assert len(pairs) == 16 + 8 * 3
        plain_loss(pairs, options.get("centering_coef", 0.0)).backward()
        found[name] = {f"model.{k}": p.grad.float() for k, p in model.named_parameters()}
    return found


STEP = dict(max_steps=1, val_fraction=0.0, batch_size=56)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(accumulate=5),
        dict(layout="padded"),
        dict(layout="padded", accumulate=5, order=1),
        dict(order=2, accumulate=40),  # more micro-batches than rows
    ],
    ids=str,
)
@pytest.mark.parametrize("name", SETTINGS)
def test_step_gradient_does_not_depend_on_the_split(name, options, tiny_model_dir, reference_gradients, tmp_path):
    """1e-6 relative: K = 1, 5 or 40, packed or padded, rows in any order."""
    run(tiny_model_dir, tmp_path, **STEP, **SETTINGS[name], **options)
    assert difference(torch.load(tmp_path / "gradients.pt"), reference_gradients[name]) < 1e-6


@pytest.mark.distributed
def test_step_gradient_on_two_processes(tiny_model_dir, reference_gradients, tmp_path):
    spawn(tiny_model_dir, tmp_path, devices=2, accumulate=5, order=3, **STEP, **ALL)
    want = reference_gradients["weights, margins, centering"]
    assert difference(torch.load(tmp_path / "gradients.pt"), want) < 1e-6


@pytest.mark.distributed
def test_two_processes_train_as_one(tiny_model_dir, tmp_path):
    options = dict(**ALL, max_steps=5, max_epochs=-1, lr=1e-3)
    one = weights(run(tiny_model_dir, tmp_path / "one", **options)[1])
    two = spawn(tiny_model_dir, tmp_path / "two", devices=2, **options)
    assert difference(two, one) < 1e-4  # Adam divides by small numbers: rounding grows over the steps
    a, b = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert a.keys() == b.keys() and "val/accuracy/zh" in a
    for name in a:
        assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name


# ------------------------------------------------------------------------------------------------------- metrics


def held_out():
    """Validation rows with prompts of their own."""
    return [{**row, "prompt": f"again {row['prompt']}"} for row in rows(11)]


def test_validation_metrics_equal_a_plain_computation_for_any_batch_size(tiny_model_dir, tmp_path):
    results = []
    for size in (1, 7, 40):
        module = RewardModule(tiny_model_dir, centering_coef=0.1)
        data = PreferenceDataModule(rows(), val=held_out(), eval_batch_size=size, cache_dir=tmp_path,
                                    pair_weight="prompt", use_margin=True)  # fmt: skip
        results.append(quiet(tmp_path).validate(module, data, verbose=False)[0])
    with torch.no_grad():
        scores, sizes = plain_scores(plain_model(module).double(), module.tokenizer, held_out())
    pairs = plain_pairs(scores, sizes, held_out(), "prompt", True)

    def mean(values):
        values = [float(v) for v in values]
        return sum(values) / len(values)

    def share(values):
        return mean((v > 0) + 0.5 * (v == 0) for v in values)

    bins = {}
    for _, c, r, *_ in pairs:
        sure = torch.sigmoid((c - r).abs()).item()
        bins.setdefault(int((sure - 0.5) * 20), []).append((sure, (c > r).item()))
    matched = [(c - r).item() for _, c, r, _, _, x, y in pairs if abs(x - y) <= 0.1 * max(x, y)]
    want = {
        "val/loss": plain_loss(pairs, 0.1).item(),
        "val/accuracy": share(c - r for _, c, r, *_ in pairs),
        "val/margin": mean(c - r for _, c, r, *_ in pairs),
        "val/chosen_score": mean(c for _, c, *_ in pairs),
        "val/rejected_score": mean(r for _, _, r, *_ in pairs),
        "val/calibration_error": sum(abs(sum(p - w for p, w in b)) for b in bins.values()) / len(pairs),
        "val/length_accuracy": share(x - y for *_, x, y in pairs),
        "val/matched_accuracy": share(matched),
        "val/matched_pairs": len(matched),
        **{
            f"val/accuracy/{name}": share(c - r for row, c, r, *_ in pairs if name in (row["source"], row["lang"]))
            for name in ("hh", "books", "zh", "en")
        },
    }
    assert matched
    for result in results:
        assert result == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_training_metrics_are_means_of_the_step(tiny_model_dir, tmp_path):
    """Logged by the step's one optimizer call, over its micro-batches."""
    trainer, _ = run(tiny_model_dir, tmp_path, accumulate=5, **STEP)
    module = RewardModule(tiny_model_dir)
    module.configure_model()
    with torch.no_grad():
        pairs = plain_pairs(*plain_scores(plain_model(module), module.tokenizer, rows()), rows())
    found = trainer.callback_metrics
    assert found["train/loss"] == pytest.approx(plain_loss(pairs, 0.0).item(), rel=1e-5)
    assert found["train/accuracy"] == pytest.approx(sum((c > r).item() for _, c, r, *_ in pairs) / len(pairs))
    chosen, rejected = (sum(pair[i].item() for pair in pairs) / len(pairs) for i in (1, 2))
    assert found["train/chosen_score"] == pytest.approx(chosen, rel=1e-4)
    assert found["train/rejected_score"] == pytest.approx(rejected, rel=1e-4)
    assert found["train/margin"] == pytest.approx(chosen - rejected, rel=1e-3)


def test_it_learns_what_makes_an_answer_better(tiny_model_dir, tmp_path):
    """Whichever answer has "fox" in it wins, wherever that stands and however long the answers are."""
    draw = random.Random(0)

    def answer(better):
        words = draw.choices(["dog", "Paris", "fine", "good", "公园"], k=draw.randint(2, 6))
        words.insert(draw.randrange(len(words) + 1), "fox" if better else "lazy")
        return " ".join(words)

    data = [{"prompt": f"Say {i}", "chosen": answer(True), "rejected": answer(False)} for i in range(120)]
    module = RewardModule(tiny_model_dir, optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3))
    datamodule = PreferenceDataModule(data[:80], val=data[80:], batch_size=32, cache_dir=tmp_path)
    L.seed_everything(0, verbose=False)
    trainer = quiet(tmp_path, max_epochs=6)
    before = trainer.validate(module, datamodule, verbose=False)[0]["val/accuracy"]
    trainer.fit(module, datamodule)
    after = trainer.callback_metrics
    assert before < 0.8
    assert after["val/accuracy"] > 0.9 and after["train/accuracy"] > 0.9 and after["val/loss"] < 0.4
    assert after["val/chosen_score"] > after["val/rejected_score"]


# -------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "options", [dict(), dict(lora=True, dropout=0.2, accumulate=2, workers=2, pair_weight="prompt")], ids=str
)
def test_resume_mid_epoch_equals_uninterrupted_bit_for_bit(options, tiny_model_dir, tmp_path):
    options = {"save_every": 1, **options}
    _, whole = run(tiny_model_dir, tmp_path / "a", **options)
    steps = sorted((tmp_path / "a").glob("step*.ckpt"), key=lambda p: int(p.stem[4:]))
    assert len(steps) == 8
    for place in (1, 5)[bool(options.get("workers")) :]:
        _, resumed = run(tiny_model_dir, tmp_path / f"b{place}", ckpt=str(steps[place]), seed=7, **options)
        assert_equal(weights(resumed), weights(whole))
        assert resumed.reward_model.score_offset == whole.reward_model.score_offset != 0.0


def test_the_offset_of_a_checkpoint_comes_back(tiny_model_dir, tmp_path):
    """Resumed where no further validation will be, it is measured all the same."""
    options = dict(save_every=1, max_epochs=3, check_val_every_n_epoch=2)
    _, whole = run(tiny_model_dir, tmp_path / "a", **options)
    path = tmp_path / "a" / "step10.ckpt"
    kept = torch.load(path, weights_only=True)["score_offset"]
    _, resumed = run(tiny_model_dir, tmp_path / "b", ckpt=str(path), seed=7, **options)
    assert resumed.reward_model.score_offset == whole.reward_model.score_offset != kept != 0.0
    assert RewardModule.load_from_checkpoint(path, optimizer=AdamW).reward_model.score_offset == kept


@pytest.mark.distributed
def test_resume_on_two_processes_bit_for_bit(tiny_model_dir, tmp_path):
    options = dict(devices=2, save_every=1, workers=1, lora=True, dropout=0.2, max_steps=6)
    whole = spawn(tiny_model_dir, tmp_path / "a", **options)
    place = tmp_path / "a" / "step2.ckpt"
    assert_equal(spawn(tiny_model_dir, tmp_path / "b", ckpt=str(place), seed=7, **options), whole)
    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert a["score_offset"] == b["score_offset"] != 0.0


# -------------------------------------------------------------------------------------------------------- offset


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(max_steps=2),
        dict(max_steps=6),
        dict(max_epochs=1, check_val_every_n_epoch=2),
        dict(max_epochs=3, check_val_every_n_epoch=2, accumulate=2),
        dict(max_epochs=1, val_check_interval=3),
    ],
    ids=str,
)
def test_the_offset_is_the_mean_preferred_score_by_the_final_weights(options, tiny_model_dir, tmp_path):
    trainer, module = run(tiny_model_dir, tmp_path, **options)
    asked = [prompt[-1]["content"] for prompt in trainer.datamodule.sample_prompts(99)]
    held = [row for row in rows() if row["prompt"] in asked]
    assert 2 <= len(held) <= 12
    with torch.no_grad():
        pairs = plain_pairs(*plain_scores(plain_model(module).eval(), module.tokenizer, held), held)
    assert module.reward_model.score_offset == pytest.approx(sum(p[1].item() for p in pairs) / len(pairs), rel=1e-4)
    assert module.training and trainer.global_step


def test_without_validation_rows_there_is_no_offset(tiny_model_dir, tmp_path):
    for options in (dict(val_fraction=0.0), dict(limit_val_batches=0)):
        _, module = run(tiny_model_dir, tmp_path, max_epochs=1, **options)
        assert module.reward_model.score_offset == 0.0


def test_one_trainer_validates_then_fits_then_validates(tiny_model_dir, tmp_path):
    module = RewardModule(tiny_model_dir, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    data = PreferenceDataModule(rows(), val=held_out(), batch_size=12, cache_dir=tmp_path)
    trainer = quiet(tmp_path, max_epochs=3)
    before = trainer.validate(module, data, verbose=False)[0]
    assert module.reward_model.score_offset == 0.0  # only training moves what scores mean
    trainer.fit(module, data)
    offset = module.reward_model.score_offset
    after = trainer.validate(module, data, verbose=False)[0]
    assert after["val/loss"] < before["val/loss"]
    assert module.reward_model.score_offset == offset == pytest.approx(after["val/chosen_score"], rel=1e-5)
    tested = trainer.test(module, data, verbose=False)[0]
    assert {k.replace("test/", "val/"): v for k, v in tested.items()} == pytest.approx(after, rel=1e-5)


# -------------------------------------------------------------------------------------------- predict and settings


def test_predictions_come_in_order_with_scores(tiny_model_dir, tmp_path):
    talk = {"messages": [{"role": "user", "content": "Say 1"}, {"role": "assistant", "content": "Paris 1"}]}
    data = PreferenceDataModule(rows(), predict=[*rows(7), talk], eval_batch_size=5, cache_dir=tmp_path)
    module = RewardModule(tiny_model_dir)
    module.configure_model()
    module.reward_model.score_offset = 0.25
    found = [record for batch in quiet(tmp_path).predict(module, data) for record in batch]
    asked = [*rows(7), {"prompt": "Say 1", "ranked": ["Paris 1"]}]
    with torch.no_grad():
        scores, sizes = plain_scores(plain_model(module).eval(), module.tokenizer, asked)
    want = [(i, j, s, n) for i, (own, ns) in enumerate(zip(scores, sizes, strict=True))
            for j, (s, n) in enumerate(zip(own.tolist(), ns.tolist(), strict=True))]  # fmt: skip
    assert [(r["row"], r["answer"], r["tokens"]) for r in found] == [(i, j, n) for i, j, _, n in want]
    assert [r["score"] for r in found] == pytest.approx([s for _, _, s, _ in want], rel=1e-4, abs=1e-6)
    assert [r["normalized"] for r in found] == pytest.approx([r["score"] - 0.25 for r in found])
    assert all(r.keys() == {"row", "answer", "score", "normalized", "tokens"} for r in found)


def test_a_negative_penalty_is_refused(tiny_model_dir):
    with pytest.raises(ValueError, match="centering_coef must be at least 0"):
        RewardModule(tiny_model_dir, centering_coef=-0.1)


def test_settings_are_kept_and_a_checkpoint_loads_by_itself(tiny_model_dir, tmp_path):
    trainer, module = run(tiny_model_dir, tmp_path, centering_coef=0.1, max_steps=5, layout="padded")
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = RewardModule.load_from_checkpoint(tmp_path / "x.ckpt", head_seed=3, optimizer=AdamW)
    assert_equal(weights(again), weights(module))
    settings = dict(again.hparams)
    assert not settings.keys() & {"optimizer", "lr_scheduler"}
    assert settings["tokenizer"] is None  # of an object nothing would be kept
    assert settings["pretrained"] == str(tiny_model_dir)
    assert (settings["centering_coef"], settings["head_seed"], settings["load"].layout) == (0.1, 3, "padded")
    assert (again.centering_coef, again.load.layout) == (0.1, "padded")
    assert again.reward_model.score_offset == module.reward_model.score_offset != 0.0


def test_a_lora_checkpoint_holds_adapters_and_the_head_alone(tiny_model_dir, tmp_path):
    trainer, module = run(tiny_model_dir, tmp_path, lora=True, max_steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    names = [k for k in saved if k.startswith("reward_model.")]
    assert all("lora_" in k or "modules_to_save" in k for k in names) and any("score" in k for k in names)
    settings = dict(lora=LoRA(r=4), head_seed=5, optimizer=AdamW)
    again = RewardModule.load_from_checkpoint(tmp_path / "x.ckpt", strict=True, **settings)
    trained = {k: v for k, v in weights(module).items() if "original_module" not in k}  # the head before training
    assert_equal({k: weights(again)[k] for k in trained}, trained)


def test_the_head_is_new_by_its_seed_and_a_saved_one_is_kept(tiny_model_dir, tmp_path):
    heads = []
    for seed in (0, 0, 1):
        module = RewardModule(tiny_model_dir, head_seed=seed)
        module.configure_model()
        heads.append(module.reward_model.transformer.score.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    module.reward_model.score_offset = 0.5
    module.reward_model.transformer.save_pretrained(tmp_path)
    again = RewardModule(tmp_path, tokenizer=AutoTokenizer.from_pretrained(tiny_model_dir))
    again.configure_model()
    assert torch.equal(again.reward_model.transformer.score.weight, heads[2])
    assert again.reward_model.score_offset == 0.5


def test_a_second_fit_measures_its_own_offset(tiny_model_dir, tmp_path):
    """Of as many steps as the first, and without a validation at its end: it kept the first one's."""
    module = RewardModule(tiny_model_dir, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    data = PreferenceDataModule(rows(8), val=rows(8), batch_size=4, cache_dir=tmp_path / "cache")
    offsets = []
    for options in (dict(), dict(check_val_every_n_epoch=2)):
        quiet(tmp_path, max_epochs=1, **options).fit(module, data)
        offsets.append(module.reward_model.score_offset)
        found = quiet(tmp_path).validate(module, data, verbose=False)[0]["val/chosen_score"]
        assert offsets[-1] == pytest.approx(found, rel=1e-4)
    assert offsets[0] != pytest.approx(offsets[1], rel=1e-2)
    with pytest.warns(UserWarning, match="is kept, but was measured on earlier weights"):
        quiet(tmp_path, max_epochs=1, limit_val_batches=0).fit(module, data)
    assert module.reward_model.score_offset == offsets[1]


class PartInEval(L.Callback):
    """A layer that shall not be in training mode."""

    def on_train_start(self, trainer, pl_module):
        pl_module.reward_model.model.model.layers[0].eval()


def test_measuring_the_offset_leaves_every_part_in_its_mode(tiny_model_dir, tmp_path):
    data = PreferenceDataModule(rows(), val=held_out(), batch_size=4, cache_dir=tmp_path)
    module = RewardModule(tiny_model_dir)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, check_val_every_n_epoch=2, num_sanity_val_steps=0,
                        callbacks=[PartInEval()], default_root_dir=tmp_path, **quiet)  # fmt: skip
    trainer.fit(module, data)
    assert module.reward_model.score_offset  # it was measured
    layers = module.reward_model.model.model.layers
    assert not any(part.training for part in layers[0].modules())
    assert all(part.training for part in layers[1].modules())
