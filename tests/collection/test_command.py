"""The command: its config, its files, what it says, and its errors."""

import json
import re
import sys
from pathlib import Path

import pytest
from scripted import Scripted

from lightning_rlhf import cli
from lightning_rlhf.collection import command
from lightning_rlhf.data import InstructionDataModule, PreferenceDataModule, unpack

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--examples", "4", "--pilot", "3", "--requests", "4", "--generator", "scripted.Scripted"]


def run(*args) -> None:
    command.main([str(arg) for arg in args])


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trees(data):
    data.prepare_data()
    data.setup("fit")
    return sum(tree.weight > 0 for batch in data.train_dataloader() for tree in unpack(batch))


def data_files(out):
    return {path.name: path.read_bytes() for path in out.glob("*.jsonl")}


def sends(monkeypatch):
    """Requests that reach a model from now on."""
    sent = []
    text = Scripted._text
    monkeypatch.setattr(
        Scripted, "_text", lambda self, request, rng: (sent.append(request), text(self, request, rng))[1]
    )
    return sent


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    out = tmp_path_factory.mktemp("grown") / "out"
    run("--out", out, "--languages", "{en: 30, zh: 20}", "--val", "0.1", "--test", "0.1", *SMALL)
    return out


def test_it_writes_parts_that_train(grown, tiny_tokenizer):
    assert {path.name for path in grown.iterdir()} == {
        *("train.jsonl", "val.jsonl", "test.jsonl", "seeds.jsonl"),
        *("card.md", "card.html", "config.yaml", "ledger.sqlite", "trace"),
    }
    assert [len(rows(grown / f"{part}.jsonl")) for part in ("train", "val", "test")] == [40, 5, 5]
    data = InstructionDataModule(
        str(grown / "train.jsonl"), val=str(grown / "val.jsonl"), tokenizer=tiny_tokenizer, max_length=500
    )
    assert trees(data) == 40
    ids = {row["id"] for part in ("train", "val", "test", "seeds") for row in rows(grown / f"{part}.jsonl")}
    for row in rows(grown / "train.jsonl"):
        assert set(row["provenance"]["parents"]) <= ids


def test_the_tree_of_a_row_goes_back_to_its_seeds(grown, capsys):
    row = rows(grown / "train.jsonl")[-1]
    cli.main(["data", "stats", str(grown), "--row", row["id"]])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{row['id']}: ") and "not in these files" not in "".join(lines)
    seeds = {seed["id"] for seed in rows(grown / "seeds.jsonl")}
    assert sum(any(f" {id}: " in line for id in seeds) for line in lines) >= 4


def test_a_second_run_sends_nothing_and_changes_no_file(grown, monkeypatch, capsys):
    before, sent = data_files(grown), sends(monkeypatch)
    run("--out", grown, "--config", grown / "config.yaml")
    assert sent == [] and data_files(grown) == before
    assert "train.jsonl: 40 rows" in capsys.readouterr().out


def test_the_pilot_shows_its_requests_yield_and_estimate_and_a_dry_run_ends_there(tmp_path, capsys):
    prices = "{prices: {in: 10, out: 20}, money: 5}"
    options = ("--out", tmp_path / "out", "--languages", "{en: 100}", "--budget", prices, *SMALL)
    run(*options, "--dry-run")
    shown = capsys.readouterr().out
    count = len(rows(tmp_path / "out" / "train.jsonl"))
    assert (
        "Write tasks that people could give" in shown and len(re.findall(r"^ +[123]  \w+ +\d of 8", shown, re.M)) == 3
    )
    assert re.search(r"tasks asked for, in 3 requests +24", shown)
    assert re.search(r"The pilot took [\d,]+ tokens and 0\.0000 of money for \d+ rows", shown)
    made = count + len(rows(tmp_path / "out" / "val.jsonl"))
    assert f"the other {100 - made} rows will take about" in shown
    assert "The same command without --dry-run goes on from here." in shown
    run(*options)
    assert capsys.readouterr().out.count("round ") >= 1
    finished = data_files(tmp_path / "out")
    assert len(rows(tmp_path / "out" / "train.jsonl")) == 95
    run(*options, "--dry-run")
    assert data_files(tmp_path / "out") == finished  # what was done stays


def test_growth_stops_after_a_pilot_of_low_yield(tmp_path, capsys):
    with pytest.raises(
        SystemExit, match=r"stopped after the pilot: the yield is below min_yield \(99\.0%\): en \d\d\.\d%"
    ):
        run("--out", tmp_path / "out", "--languages", "{en: 100}", "--min_yield", "0.99", *SMALL)
    assert (tmp_path / "out" / "card.html").exists() and rows(tmp_path / "out" / "train.jsonl")


def test_other_settings_are_refused_in_a_folder_that_was_begun(grown):
    before = (grown / "config.yaml").read_bytes()
    with pytest.raises(SystemExit, match="was begun with other settings: novelty"):
        run("--out", grown, "--config", grown / "config.yaml", "--novelty", "0.5")
    assert (grown / "config.yaml").read_bytes() == before


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stop(self, request, rng):
        raise KeyboardInterrupt

    monkeypatch.setattr(Scripted, "_text", stop)
    with pytest.raises(SystemExit) as stopped:
        run("--out", tmp_path / "my out", "--languages", "{en: 10}", *SMALL)
    said = capsys.readouterr().err
    assert stopped.value.code == 130
    assert (
        f"SIGINT: stopped. What arrived is kept in {tmp_path / 'my out'}. To go on: lightning-rlhf collect --out '"
        in said
    )
    assert not (tmp_path / "my out" / "train.jsonl").exists()


def test_preferences(tmp_path, tiny_tokenizer, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Name {n} rivers."}) + "\n" for n in range(20)))
    run("--out", tmp_path / "out", "--preferences", prompts, "--reward", "reward_of_letters.letters", *SMALL[-2:])
    found = rows(tmp_path / "out" / "train.jsonl")
    assert found and all(row["scores"] == sorted(row["scores"], reverse=True) for row in found)
    data = PreferenceDataModule(
        str(tmp_path / "out" / "train.jsonl"), val_fraction=0.0, tokenizer=tiny_tokenizer, max_length=500
    )
    assert trees(data) == len(found)
    assert re.search(
        r"The longer answer won \d+ of the \d+ pairs of different lengths: \d+\.\d%\.", capsys.readouterr().out
    )
    assert "The longer answer won" in (tmp_path / "out" / "card.md").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--languages", "{fr: 10}"], "seeds: there is no row in the language 'fr'"),
        (["--languages", "{}"], "languages is empty"),
        (["--languages", "{en: 10}", "--filters", "[Lengths]"], "There is no filter Lengths; did you mean Length?"),
        (["--languages", "{en: 10}", "--seeds", "nothing.jsonl"], "nothing.jsonl: no such file or directory"),
        (["--languages", "{en: 10}", "--reward", "x"], "reward ranks answers, which is for --preferences"),
        (["--task_sampling", "{temperature: hot}"], "task_sampling.temperature: expected float, got hot"),
        (["--task_sampling.max_tokens", "1.5"], "task_sampling.max_tokens: expected int, got 1.5"),
        (
            ["--languages", "{en: 10}", "--filters", "[{Length: {min_answer: two}}]"],
            "Length: a setting has a value of the wrong type (min_answer='two')",
        ),
        (["--generator", "Script"], "generator: there is no class Script; did you mean Scripted?"),
        (["--generator", "EndpointGenerater"], "there is no class EndpointGenerater; did you mean EndpointGenerator?"),
        (
            ["--generator", "{class_path: EngineGenrator, init_args: {pretrained: x}}"],
            "there is no class EngineGenrator; did you mean EngineGenerator?",
        ),
        (["--judge", "ChatJuge"], "judge: there is no class ChatJuge; did you mean ChatJudge?"),
        (["--languages", "{en: 10}", "--budget", "{money: 1}"], "needs prices of a million tokens"),
        (["--languages", "{en: 10}", "--style", "opening"], "style: opening needs a model that can continue"),
        (["--languages", "{en: 10}", "--val", "1"], "val and test must be 0 or more, and below 1 together"),
        (["--preferences", "x.jsonl"], "set either reward or judge"),
        (["--languages", "{en: 10}", "--generator", "[scripted.Scripted, scripted.Scripted]"], "generator is a list"),
    ],
)
def test_errors_are_one_line(tmp_path, args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--out", tmp_path / "out", *SMALL, *args)
    said = str(stopped.value.code) if isinstance(stopped.value.code, str) else capsys.readouterr().err
    assert message in said and said.count("\n") <= 1 and said.startswith("lightning-rlhf collect: ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = (", "can't import my_own.G: SyntaxError: '(' was never closed (my_own.py, line 1)"),
        ("import not_there_at_all", "can't import my_own.G: ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("raise RuntimeError('no key')", "can't import my_own.G: RuntimeError: no key"),
        ("class H: pass", "Can't import the class 'my_own.G': my_own has no G"),
        ("class G: pass", "expected Generator, list[Generator], got my_own.G"),
    ],
)
def test_a_class_that_cannot_be_imported_says_why(tmp_path, monkeypatch, capsys, text, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_own", raising=False)
    (tmp_path / "my_own.py").write_text(text, encoding="utf-8")
    for given in (["--generator.class_path", "my_own.G"], ["--generator", "my_own.G"]):
        with pytest.raises(SystemExit):
            run("--out", tmp_path / "out", "--languages", "{en: 10}", *given)
        said = capsys.readouterr().err
        assert f"lightning-rlhf collect: generator: {reason}" in said and said.count("\n") == 1
    sys.modules.pop("my_own", None)


def test_a_config_of_another_encoding_is_one_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_bytes("seeds: 你好.jsonl".encode("gbk"))
    with pytest.raises(SystemExit):
        run("--config", tmp_path / "c.yaml", "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert "c.yaml: byte 8 of the line" in said and "iconv -f GB18030 -t UTF-8" in said and said.count("\n") == 1


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SystemExit, match="holds other files, and no ledger"):
        run("--out", tmp_path, "--languages", "{en: 10}", *SMALL)
    with pytest.raises(SystemExit, match="is a file"):
        run("--out", tmp_path / "thesis.tex", "--languages", "{en: 10}", *SMALL)


def test_a_folder_that_a_kill_left_without_its_ledger_goes_on(tmp_path):
    (tmp_path / ".ledger.sqlite.a1b2").mkdir()  # in which the ledger was being made
    run("--out", tmp_path, "--languages", "{en: 2}", "--dry_run", *SMALL)
    assert (tmp_path / "ledger.sqlite").exists()


def test_input_that_lies_in_the_output_is_refused(grown, tmp_path):
    before = data_files(grown)
    for option in ("--seeds", "--preferences"):
        with pytest.raises(SystemExit, match=r"train\.jsonl lies in --out .*, whose files are written anew"):
            run("--out", grown, option, grown / "train.jsonl", "--languages", "{en: 10}", *SMALL)
    assert data_files(grown) == before


def test_no_key_is_written_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    generator = (
        "{class_path: lightning_rlhf.collection.generators.EndpointGenerator, init_args: {base_url: "
        "http://127.0.0.1:9/v1, model: m, api_key_env: MY_KEY, retries: 0, backoff: 0}}"
    )
    with pytest.raises(SystemExit) as stopped:
        run("--out", tmp_path / "out", "--languages", "{en: 10}", *SMALL[:-2], "--generator", generator)
    assert "3 of 3 requests to m got no reply (3 x unreachable" in str(stopped.value.code)
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"sk-very-secret" not in path.read_bytes()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "collect").iterdir()), ids=lambda path: path.stem)
def test_configs_that_come_with_the_package_run(path, tmp_path, capsys):
    options = ("--pilot", "2", "--generator", "scripted.Scripted", "--dry-run")
    run("--config", path, "--out", tmp_path / "out", *options)
    assert "The pilot took" in capsys.readouterr().out and rows(tmp_path / "out" / "train.jsonl")
