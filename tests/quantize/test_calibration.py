"""Calibration and held-out rows: every kind of file, apart by the first user turn; errors say what is wrong where."""

import importlib.resources
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_rlhf.data.errors import DataError
from lightning_rlhf.quantize.calibration import check_text, check_tokens, read_rows

USER, ANSWER = "question {}", "answer {}"


def turns(i, *more):
    return [{"role": "user", "content": USER.format(i)}, {"role": "assistant", "content": ANSWER.format(i)}, *more]


#: A row of each kind, and the turns that are read of it.
KINDS = {
    "messages": (lambda i: {"messages": turns(i)}, turns),
    "alpaca": (lambda i: {"instruction": USER.format(i), "output": ANSWER.format(i)}, turns),
    "completion": (lambda i: {"prompt": USER.format(i), "completion": ANSWER.format(i)}, turns),
    "preference": (
        lambda i: {"prompt": USER.format(i), "rejected": "bad", "chosen": ANSWER.format(i)},
        turns,
    ),
    "ranking": (
        lambda i: {"prompt": USER.format(i), "answers": ["bad", ANSWER.format(i), "worse"], "ranks": [2, 1, 3]},
        turns,
    ),
    "prompt": (lambda i: {"prompt": USER.format(i), "lang": "en"}, lambda i: turns(i)[:1]),
    "unanswered": (lambda i: {"messages": turns(i)[:1]}, lambda i: turns(i)[:1]),
    "question": (lambda i: {"question": USER.format(i)}, lambda i: turns(i)[:1]),
    "weights": (
        lambda i: {"messages": [{**turn, "weight": 0} for turn in turns(i)[:1]] + turns(i)[1:]},
        turns,
    ),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ids_of(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_data_module_are_rendered_by_the_models_template(kind, tiny_tokenizer, tmp_path):
    make, messages = KINDS[kind]
    rows = read_rows(write(tmp_path / "my.jsonl", map(make, range(40))), tiny_tokenizer, 256)
    found = sorted(row.tolist() for row in (*rows.calibration, *rows.held_out))
    assert found == sorted(ids_of(tiny_tokenizer, messages(i)) for i in range(40))
    assert {row.dtype for row in rows.calibration} == {torch.int64} and rows.calibration and rows.held_out


def test_plain_text_is_read_as_it_is(tiny_tokenizer, tmp_path):
    path = tmp_path / "my.txt"
    path.write_text("".join(f"The quick brown fox, number {i}\n" for i in range(40)))
    rows = read_rows(str(path), tiny_tokenizer, 256)
    texts = {tiny_tokenizer.decode(row) for row in (*rows.calibration, *rows.held_out)}
    assert texts == {f"The quick brown fox, number {i}<|im_end|>" for i in range(40)}


def test_bundled_rows_are_all_that_come_with_the_package_except_the_seeds(tiny_tokenizer):
    folder = importlib.resources.files("lightning_rlhf.data") / "bundled"
    files = [file for file in folder.iterdir() if file.name.endswith(".jsonl") and not file.name.startswith("seeds.")]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    rows = read_rows("bundled", tiny_tokenizer, 100_000, max_rows=lines, max_held_out=lines)
    assert len(rows.calibration) + len(rows.held_out) == lines == 538 and len(rows.held_out) > 25


def test_held_out_rows_share_no_first_user_turn_with_the_calibration(tiny_tokenizer, tmp_path):
    """Each turn begins several rows of two files."""
    more = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "yes"}]
    made = [{"messages": turns(i, *extra)} for i in range(30) for extra in ((), more)]
    paths = [write(tmp_path / "a.jsonl", made[::2]), write(tmp_path / "b.jsonl", made[1::2])]
    rows = read_rows(paths, tiny_tokenizer, 256, held_out_share=0.3)
    openings = [
        {tiny_tokenizer.decode(row).split("<|im_end|>")[0] for row in part}
        for part in (rows.calibration, rows.held_out)
    ]
    assert len(openings[0]) + len(openings[1]) == 30 and openings[1] and not openings[0] & openings[1]
    assert len(rows.calibration) + len(rows.held_out) == 60


def test_the_seed_decides_what_is_held_out_and_drawn(tiny_tokenizer, tmp_path):
    path = write(tmp_path / "my.jsonl", [KINDS["messages"][0](i) for i in range(60)])

    def read(seed, **options):
        rows = read_rows(path, tiny_tokenizer, 256, seed=seed, **options)
        return [[row.tolist() for row in part] for part in rows]

    assert read(0) == read(0) and sorted(read(0)[1]) != sorted(read(1)[1])
    few = read(0, max_rows=5, max_held_out=2)
    assert few == [part[:n] for part, n in zip(read(0), (5, 2), strict=True)]
    assert few[0] != sorted(few[0]), "drawn, not the first of the file, which may be of one language"


def test_a_file_of_held_out_rows(tiny_tokenizer, tmp_path):
    data = write(tmp_path / "my.jsonl", [KINDS["messages"][0](i) for i in range(10)])
    apart = write(tmp_path / "apart.jsonl", [KINDS["messages"][0](i) for i in range(8, 12)])
    with pytest.warns(UserWarning, match="^2 of 10 calibration rows have the first user turn of a held-out row: left"):
        rows = read_rows(data, tiny_tokenizer, 256, held_out=apart)
    assert (len(rows.calibration), len(rows.held_out)) == (8, 4)
    with pytest.raises(DataError, match=r"^Every calibration row has the first user turn"):
        read_rows(data, tiny_tokenizer, 256, held_out=data)


# ------------------------------------------------------------------------------------------------------- bad input


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_row_of_another_format_is_named(tiny_tokenizer, tmp_path):
    path = write(tmp_path / "my.jsonl", [KINDS["messages"][0](0), {"body": "x"}])
    with pytest.raises(DataError) as caught:
        read_rows(path, tiny_tokenizer, 256)
    assert one_line(caught).startswith(f"{path}:2: no known format has the columns of this row: 'body'.")


def test_a_row_longer_than_the_context_is_named(tiny_tokenizer, tmp_path):
    long = {"prompt": "again " * 60, "completion": "yes"}
    path = write(tmp_path / "my.jsonl", [KINDS["messages"][0](i) for i in range(20)] + [long])
    with pytest.raises(DataError) as caught:
        read_rows(path, tiny_tokenizer, 64)
    assert f"{path}:21: " in one_line(caught) and " tokens are over the model's context of 64" in one_line(caught)
    with pytest.warns(UserWarning, match="1 of 19 rows of calibration was skipped: 1 x too long"):
        rows = read_rows(path, tiny_tokenizer, 64, on_bad_row="skip")
    assert len(rows.calibration) + len(rows.held_out) == 20


@pytest.mark.filterwarnings("ignore:.* has no row")
def test_an_empty_file_is_named(tiny_tokenizer, tmp_path):
    path = write(tmp_path / "my.jsonl", [])
    with pytest.raises(DataError) as caught:
        read_rows(path, tiny_tokenizer, 256)
    assert one_line(caught).startswith(f"No usable row in the calibration data ({path})")


def test_a_file_that_is_not_there_or_no_json(tiny_tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: no such file"):
        read_rows(str(tmp_path / "missing.jsonl"), tiny_tokenizer, 256)
    (tmp_path / "my.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"my\.jsonl:1: malformed JSON"):
        read_rows(str(tmp_path / "my.jsonl"), tiny_tokenizer, 256)


def test_nothing_held_out_is_an_error(tiny_tokenizer, tmp_path):
    path = write(tmp_path / "my.jsonl", [KINDS["messages"][0](0)] * 5)
    with pytest.raises(DataError) as caught:
        read_rows(path, tiny_tokenizer, 256)
    assert "these rows have 1 first user turn. Give more rows, or other rows as --held-out." in one_line(caught)


def test_a_model_without_a_chat_template_reads_only_plain_text(tiny_tokenizer, tmp_path):
    tiny_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        read_rows(write(tmp_path / "my.jsonl", [KINDS["messages"][0](i) for i in range(20)]), tiny_tokenizer, 256)
    rows = read_rows([{"text": f"text {i}"} for i in range(40)], tiny_tokenizer, 256)
    assert len(rows.calibration) + len(rows.held_out) == 40


# ---------------------------------------------------------------------------------------------------------- checks


def test_too_few_tokens_say_how_many_more(tiny_model_dir):
    """The widest input is that of the MLP's last layer, 64."""
    rows = [torch.arange(100), torch.arange(155)]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model_dir))
    check_tokens([*rows, torch.arange(1)], model)
    with pytest.raises(DataError) as caught:
        check_tokens(rows, model)
    text = one_line(caught)
    assert text.startswith("255 calibration tokens are too few for model.layers.0.mlp.down_proj with 64 inputs")
    assert ": 1 more are needed. Give more rows" in text


def test_foreign_text_is_a_warning(recwarn):
    check_text(30.0, 10.0)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="^The model's perplexity is 30.5 on the calibration text and 10 on the held"):
        check_text(30.5, 10.0)
