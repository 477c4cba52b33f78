"""What a user takes home is what was trained: each stage, by each kind of weights, on one process and on several.

The weights are kept by name when ``best`` is exported and after the fit; of them a plain model is made by hand, and the
exports are loaded by plain transformers and peft. Nothing of the package stands between the two.
"""

import copy
import json

import lightning.pytorch as L
import pytest
import torch
from by_hand import by_hand, logits, plain_model, split
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf import InstructionDataModule, PreferenceDataModule, RewardModule, SFTModule, WritePredictions
from lightning_rlhf.models.saving import save_pretrained

STAGES = {
    "sft": dict(stage="sft"),
    "reward": dict(stage="reward"),
    "function": dict(stage="ppo"),
    "model": dict(stage="ppo", reward="reward full/hf/last"),
    "adapter": dict(stage="ppo", reward="reward lora/adapters/last"),
}
#: Settings that change what a policy is made of.
VARIANTS = {
    "dora": dict(lora=dict(dora=True)),
    "rslora": dict(lora=dict(rslora=True)),
    "saved": dict(lora=dict(targets=["q_proj", "v_proj"], modules_to_save=["lm_head"])),
    "ema": dict(ema=0.5),
    "checkpointing": dict(checkpointing=True),
    "separate": dict(critic_kind="separate"),
    "kept": dict(reuse_passes=True, micro_batch_tokens=None),
}
NEEDS_BITSANDBYTES = {"nf4", "int8"}


def settings(name):
    """Of a run by its name: stage, kind of weights or variant."""
    stage, kind = name.split()
    if kind in VARIANTS:
        return {**STAGES[stage], "kind": "lora", **VARIANTS[kind]}
    return {**STAGES[stage], "kind": kind}


ONE = [f"{stage} {kind}" for stage in STAGES for kind in ("full", "lora", "nf4", "int8")]
ONE += [f"{stage} {kind}" for stage in ("sft", "adapter") for kind in ("dora", "rslora", "saved", "ema")]
ONE += ["reward dora", "reward ema", "adapter checkpointing", "function separate", "adapter kept"]
#: Kinds of weights that others of the same makeup have: a backbone with a head, without one, and with three adapters.
LIKE_OTHERS = ("function nf4", "function int8", "model nf4", "reward int8", "adapter int8", "adapter rslora")


class Left:
    """What a run left."""

    def __init__(self, folder, base, options):
        self.folder, self.base, self.options = folder, base, options
        self.states = torch.load(folder / "states.pt", weights_only=True)
        self.classifier = options["stage"] == "reward"
        self.auto = AutoModelForSequenceClassification if self.classifier else AutoModelForCausalLM

    def trained(self, when):
        """The model that was trained, by hand."""
        rslora = self.options.get("lora", {}).get("rslora", False)
        return by_hand(self.base, self.states[when], self.classifier, rslora=rslora)

    def merged(self, when):
        return self.auto.from_pretrained(self.folder / "hf" / when)

    def adapters(self, when):
        """Over the very base that was trained upon: of quantized weights, what they stand for."""
        base, _ = split(self.states[when])
        if self.classifier:
            base.setdefault("score.weight", torch.zeros(1, base["model.norm.weight"].shape[0]))
        return PeftModel.from_pretrained(plain_model(self.base, base, self.classifier), self.folder / "adapters" / when)


@pytest.fixture(scope="module")
def left(artifacts, wide_model_dir, tmp_path_factory):
    """``left(name)``: the run of that name, made when it is first asked for."""
    out, runs = tmp_path_factory.mktemp("one"), {}

    def find(name):
        if name not in runs:
            options = settings(name)
            if options["kind"] in NEEDS_BITSANDBYTES:
                pytest.importorskip("bitsandbytes")
            if "reward" in options:
                find(options["reward"].split("/")[0])
                options["reward"] = str(out / options["reward"])
            artifacts.run(wide_model_dir, out / name, **options)
            runs[name] = Left(out / name, wide_model_dir, options)
        return runs[name]

    return find


def check(run):
    """Both exports, in both forms; ``best`` and ``last`` differ, and neither is where it began."""
    found = {}
    for when in ("best", "last"):
        want = logits(run.trained(when))
        found[when] = logits(run.merged(when))
        torch.testing.assert_close(found[when], want, atol=1e-5, rtol=0)
        if (run.folder / "adapters").exists():
            torch.testing.assert_close(logits(run.adapters(when)), want, atol=1e-5, rtol=0)
    assert (found["best"] - found["last"]).abs().max() > 0.01
    if not run.classifier:
        start = logits(AutoModelForCausalLM.from_pretrained(run.base))
        assert (found["last"] - start).abs().max() > 0.05
        if "precision" not in run.options:  # half precision rounds on the way to an arg max, not what is exported
            check_answers(run)


def check_answers(run):
    """The samples shown at the end are those of the export, which stops where the run said that answers stop."""
    model, tokenizer = run.merged("last"), AutoTokenizer.from_pretrained(run.folder / "hf" / "last")
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    assert set(run.states["stops"]) <= set(stops)
    rows = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()][-2:]
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        answer = answer[0, ids.shape[1] :].tolist()
        assert row["ended"] == (answer[-1] in stops)
        assert tokenizer.decode(answer, skip_special_tokens=True) == row["completion"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if name in LIKE_OTHERS else ()) for name in ONE]
)
def test_exports_are_what_was_trained(name, left):
    check(left(name))


@pytest.mark.parametrize("name", ["sft lora", "adapter lora", "adapter saved", "model full"])
def test_saving_by_hand_after_a_fit_saves_the_policy(name, left, artifacts, tmp_path):
    """By our function, by peft's own, and by merging a copy; after validation and prediction, too."""
    run = left(name)
    options = {k: v for k, v in run.options.items() if k != "ema"}
    trainer, module = artifacts.run(run.base, tmp_path / "again", **options)
    want = logits(run.trained("last"))
    for when in ("after fit", "after validate"):
        if when == "after validate":
            trainer.validate(module, trainer.datamodule, verbose=False)
        model = module.model_to_export.model
        save_pretrained(model, module.tokenizer, tmp_path / when)
        torch.testing.assert_close(logits(run.auto.from_pretrained(tmp_path / when)), want, atol=1e-5, rtol=0)
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(tmp_path / f"peft {when}")
            base = run.auto.from_pretrained(run.base)
            again = PeftModel.from_pretrained(base, tmp_path / f"peft {when}")
            torch.testing.assert_close(logits(again), want, atol=1e-5, rtol=0)
            merged = copy.deepcopy(model).merge_and_unload()
            torch.testing.assert_close(logits(merged), want, atol=1e-5, rtol=0)


def predicted(module, data, folder):
    """The records that ``predict`` writes."""
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=folder)
    L.Trainer(accelerator="cpu", callbacks=[WritePredictions()], **quiet).predict(module, data)
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def conversation(tokenizer, prompt, answer):
    """Tokens of a conversation, and where its answer begins, by the export's own template."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    start = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    ids, first = (tokenizer(text, add_special_tokens=False).input_ids for text in (whole, start))
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)  # what the template writes behind it belongs to nobody
    return torch.tensor([ids[:end]]), len(first)


@pytest.mark.parametrize("name", ["sft lora", "sft ema", "function lora", "model int8", "adapter lora", "adapter full"])
def test_predict_from_an_export_says_what_was_trained(name, left, artifacts, tmp_path):
    run = left(name)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "hf" / "last")
    trained, data = run.trained("last"), dict(batch_size=4, val_fraction=0.0, cache_dir=tmp_path)
    want = []
    for row in artifacts.ROWS:
        ids, start = conversation(tokenizer, row["prompt"], row["completion"])
        with torch.no_grad():
            logprobs = trained(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        want.append(logprobs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
    for source in ("hf/last", "adapters/last"):
        if (run.folder / source).exists() and not (source == "adapters/last" and run.options["kind"] == "int8"):
            module = SFTModule(str(run.folder / source))
            found = predicted(
                module, InstructionDataModule(artifacts.ROWS, predict=artifacts.ROWS, **data), tmp_path / source
            )
            assert [record["logprob"] for record in found] == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("name", ["reward full", "reward lora", "reward ema", "reward nf4"])
def test_scores_of_an_export_are_those_that_were_trained(name, left, artifacts, tmp_path):
    run = left(name)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "hf" / "last")
    trained, merged = run.trained("last"), run.merged("last")
    data = PreferenceDataModule(
        artifacts.PAIRS, predict=artifacts.PAIRS, batch_size=4, val_fraction=0.0, cache_dir=tmp_path
    )
    found = predicted(RewardModule(str(run.folder / "hf" / "last")), data, tmp_path)
    for record in found:
        pair = artifacts.PAIRS[record["row"]]
        ids, _ = conversation(tokenizer, pair["prompt"], (pair["chosen"], pair["rejected"])[record["answer"]])
        with torch.no_grad():
            scores = [model(ids, use_cache=False).logits.item() for model in (trained, merged)]
        assert scores == pytest.approx([record["score"]] * 2, abs=1e-4)
    assert len(found) == 2 * len(artifacts.PAIRS)
    assert sum(r["score"] * (-1) ** r["answer"] for r in found) > 1  # it learned something to say


# ------------------------------------------------------------------------------------------------- several processes


STRATEGIES = {
    "ddp": dict(strategy="ddp"),
    "zero2": dict(strategy="colossalai_zero2"),
    "gemini": dict(strategy="gemini", precision="bf16-mixed"),
}
TWO = {strategy: [f"{stage} {kind}" for stage in STAGES for kind in ("full", "lora")] for strategy in STRATEGIES}
TWO["ddp"] += ["sft nf4", "adapter int8", "sft ema"]
#: Those of CI, under Gemini: whole weights and adapters of a policy, a classifier, and what shares a backbone.
CHOSEN = ["sft full", "sft lora", "reward lora", "function full", "adapter lora"]


@pytest.fixture(scope="module")
def left_by_two(left, start, wide_model_dir, tmp_path_factory):
    """``left_by_two(strategy, names)``: the folders of these runs, made in one start of two processes."""

    def find(strategy, names):
        if strategy != "ddp":
            pytest.importorskip("colossalai")
        out, runs = tmp_path_factory.mktemp(strategy), {}
        for name in names:
            options = settings(name)
            if "reward" in options:
                folder, _, rest = options["reward"].partition("/")
                options["reward"] = str(left(folder).folder / rest)
            runs[name] = {**options, **STRATEGIES[strategy], "devices": 2}
        start(wide_model_dir, out, runs)
        return [Left(out / name, wide_model_dir, options) for name, options in runs.items()]

    return find


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        pytest.param("gemini", CHOSEN, id="gemini"),
        pytest.param(
            "gemini", [n for n in TWO["gemini"] if n not in CHOSEN], id="gemini, others", marks=pytest.mark.exhaustive
        ),
        *(pytest.param(name, TWO[name], id=name, marks=pytest.mark.exhaustive) for name in ("ddp", "zero2")),
    ],
)
def test_exports_of_several_processes_are_what_was_trained(strategy, names, left_by_two):
    for run in left_by_two(strategy, names):
        check(run)
