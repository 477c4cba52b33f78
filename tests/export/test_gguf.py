"""GGUF files: read back by transformers, and by what llama.cpp does with a vocabulary."""

import json
import math
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from exported import STORIES, TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_rlhf.cli import main

pytest.importorskip("auto_round")
pytest.importorskip("sentencepiece")
gguf = pytest.importorskip("gguf")

from lightning_rlhf.export import export  # noqa: E402
from lightning_rlhf.export.gguf import check_convertible, stored_as, unpackable  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture(scope="module")
def stories(model):
    """32 stories of 255 tokens, written by the model."""
    torch.manual_seed(0)
    start = torch.ones(32, 1, dtype=torch.long)
    settings = dict(do_sample=True, top_k=0, max_new_tokens=255, min_new_tokens=255, pad_token_id=0)
    return model.generate(input_ids=start, attention_mask=torch.ones_like(start), **settings)


def perplexity(model, ids):
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
    return math.exp(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def read(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.slow
def test_eight_bits_have_the_perplexity_of_the_model(stories_gguf, model, stories):
    found = AutoModelForCausalLM.from_pretrained(stories_gguf.parent, gguf_file=stories_gguf.name, dtype=torch.float32)
    assert perplexity(found, stories) == pytest.approx(perplexity(model, stories), rel=0.002)


@pytest.mark.slow
def test_the_tokenizer_reads_the_same(stories_gguf, tokenizer):
    found = AutoTokenizer.from_pretrained(stories_gguf.parent, gguf_file=stories_gguf.name)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert found(text).input_ids == ids
        assert found.decode(ids, skip_special_tokens=True).strip() == text.strip()
    assert found.chat_template == tokenizer.chat_template
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(found, name) == getattr(tokenizer, name)


def merged(fields, text):
    """Tokens as llama.cpp makes them of a SentencePiece vocabulary: the neighbors with the best score first."""
    ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    scores = fields["tokenizer.ggml.scores"]
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    bytes_of = [[part] if part in ids else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [fields["tokenizer.ggml.bos_token_id"], *(ids[token] for tokens in bytes_of for token in tokens)]


@pytest.mark.slow
def test_llama_cpp_s_own_merging_gives_the_same_tokens(stories_gguf, tokenizer):
    fields = read(stories_gguf)
    for text in TEXTS:
        assert merged(fields, text) == tokenizer(text).input_ids
    fields["tokenizer.ggml.scores"] = [-1000.0] * 512  # as the converter writes them
    assert any(merged(fields, text) != tokenizer(text).input_ids for text in TEXTS)


@pytest.mark.slow
def test_every_stop_token_is_one(stories_gguf):
    fields = read(stories_gguf)
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot")] == [2, 1]
    assert json.loads((STORIES / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    assert fields["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.slow
def test_blocks_are_those_of_the_format(stories_gguf, model):
    assert unpackable(model, "q8_0") == {"down_proj": "172 inputs: 16 bits"}
    assert stored_as(stories_gguf) == {"Q8_0": 31, "F16": 5}
    weights = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(stories_gguf).tensors}
    wanted = model.model.embed_tokens.weight.detach().numpy()
    blocks = np.abs(wanted).reshape(512, 2, 32).max(-1, keepdims=True)
    error = np.abs(weights["token_embd.weight"] - wanted).reshape(512, 2, 32)
    assert (error <= 1.01 * blocks / 127).all()  # a step of the grid of each block of 32
    assert weights["output_norm.weight"].tobytes() == model.model.norm.weight.detach().numpy().tobytes()


@pytest.mark.slow
def test_what_cannot_be_packed_is_named_and_stored_as_llama_cpp_does(tmp_path, model, stories, capsys):
    file = export(str(STORIES), "gguf", "q4_k_m", tmp_path / "out")
    out = capsys.readouterr().out
    assert "q4_k_m packs blocks of 256 inputs" in out
    assert "q_proj (64 inputs: 5 or 8 bits in blocks of 32)" in out and "down_proj (172 inputs: 16 bits)" in out
    assert stored_as(file) == {"Q5_0": 28, "Q8_0": 3, "F16": 5}
    found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert perplexity(found, stories) < 1.03 * perplexity(model, stories)


@pytest.mark.slow
def test_k_quants_pack_layers_that_fit(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=520, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)  # fmt: skip
    wide = LlamaForCausalLM(config)
    wide.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    file = export(str(tmp_path / "wide"), "gguf", "q4_k_m", tmp_path / "out")
    assert set(stored_as(file)) == {"Q4_K", "Q6_K"}
    assert len(read(file)["tokenizer.ggml.tokens"]) == 520  # the tokenizer has 512


@pytest.mark.slow
def test_adapters_are_merged_into_the_file(lora_run, tmp_path, capsys):
    main(["export", str(lora_run.checkpoint), "--format", "gguf", "--out", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != ".complete"] == [
        "epoch1-step4-q8_0.gguf"
    ]
    settings = dict(gguf_file="epoch1-step4-q8_0.gguf", dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **settings)
    policy = lora_run.module.model_to_export.model
    ids = torch.tensor([[1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315]])
    with torch.no_grad():
        wanted, now = (m.eval()(input_ids=ids, use_cache=False).logits.log_softmax(-1) for m in (policy, found))
    assert (wanted.exp() * (wanted - now)).sum(-1).mean() < 1e-3
    assert f"llama-server -m {tmp_path}/out/epoch1-step4-q8_0.gguf" in capsys.readouterr().out


def test_a_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    import auto_round

    def fail(*args, **options):
        raise RuntimeError("killed")

    monkeypatch.setattr(auto_round, "AutoRound", fail)
    with pytest.raises(RuntimeError, match="killed"):
        export(str(STORIES), "gguf", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, said", [
    (dict(architectures=["MadeUpForCausalLM"]), "has no form for MadeUpForCausalLM"),
    (dict(architectures=["LlamaForSequenceClassification"]), "no form for its score head"),
])  # fmt: skip
def test_an_architecture_that_llama_cpp_lacks(tmp_path, change, said):
    shutil.copytree(STORIES, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        check_convertible(tmp_path / "model")


def test_a_tokenizer_that_llama_cpp_does_not_know(tiny_model_dir):
    """Also fails if the private function that tells is no longer there."""
    with pytest.raises(ValueError, match="does not know the model's tokenizer"):
        check_convertible(tiny_model_dir)
    check_convertible(STORIES)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning_rlhf\[gguf\]"):
        export(str(STORIES), "gguf", out=tmp_path / "out")
