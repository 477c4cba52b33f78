"""What llama.cpp's converter leaves out of a vocabulary is completed; everything else stays byte by byte."""

import json

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from lightning_rlhf.export.vocabulary import complete_vocabulary  # noqa: E402

TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab", "aba"]


@pytest.fixture
def complete(tmp_path):
    """``complete(rows, scores, stops)``: fields and tensors of a small file before and after."""

    def run(rows=7, scores=(-1000.0,) * 7, stops=(2,)):
        writer = gguf.GGUFWriter(tmp_path / "source", arch="llama")
        writer.add_token_list(TOKENS)
        writer.add_token_scores(list(scores))
        writer.add_token_types([2, 3, 3, 1, 1, 1, 1])
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ '你好 😀' }}")
        writer.add_float32("llama.rope.freq_base", 1e6)
        writer.add_add_bos_token(True)
        rng = np.random.default_rng(0)
        writer.add_tensor("token_embd.weight", rng.normal(size=(rows, 8)).astype(np.float32))
        packed = gguf.quants.quantize(rng.normal(size=(3, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.0.x.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        merges = ["a b", ["ab", "a"], ["b", "b"]]  # the forms of old and new files
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"merges": merges}}))
        left = complete_vocabulary(tmp_path / "source", tmp_path / "target", tmp_path, stops)
        found = [read(tmp_path / name) for name in ("source", "target")]
        return *found, left

    return run


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {name: (field.types, field.contents()) for name, field in reader.fields.items()}
    tensors = [(t.name, t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors]
    return fields, tensors


def test_nothing_else_changes(complete):
    (before, weights), (after, copied), left = complete()
    assert copied == weights and left == ()
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == {"tokenizer.ggml.scores"}


def test_scores_are_ranks_of_merges(complete):
    _, (after, _), _ = complete()
    assert after["tokenizer.ggml.scores"][1] == [-3, -3, -3, -3, -3, 0, -1]


def test_scores_that_the_converter_knew_stay(complete):
    scores = [0.0, 0.0, 0.0, -5.0, -6.0, -2.0, -3.0]
    _, (after, _), _ = complete(scores=scores)
    assert after["tokenizer.ggml.scores"][1] == scores


def test_rows_without_a_token_get_one(complete):
    _, (after, _), _ = complete(rows=9)
    assert after["tokenizer.ggml.tokens"][1] == [*TOKENS, "[PAD7]", "[PAD8]"]
    assert after["tokenizer.ggml.token_type"][1][-2:] == [gguf.TokenType.UNUSED] * 2
    assert len(after["tokenizer.ggml.scores"][1]) == 9
    assert min(after["tokenizer.ggml.scores"][1][:7]) == -3


def test_three_stop_tokens_have_a_place(complete):
    _, (after, _), left = complete(stops=(2, 1, 5, 6, 3))
    names = ("eos", "eot", "eom")
    assert [after[f"tokenizer.ggml.{name}_token_id"][1] for name in names] == [2, 1, 5]
    assert left == (6, 3)
