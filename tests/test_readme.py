"""What the README and docs show works: Python blocks and commands run, at smoke size, and what is named exists.

A block is made small by replacing texts in it. A text to replace that is no longer there, a command of no known kind
and a name of no known file are failures: then this file must follow.
"""

import io
import json
import re
import shlex
from pathlib import Path

import httpx
import pytest
from server_process import serving

from lightning_rlhf.cli import main
from lightning_rlhf.data.formats import FORMATS, to_conversation
from lightning_rlhf.data.preference_formats import PREFERENCE_FORMATS, to_preference
from lightning_rlhf.data.unpaired_formats import UNPAIRED_FORMATS, to_unpaired

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TEXTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]

SHORT = 'max_steps=2, accelerator="cpu", devices=1, enable_progress_bar=False'
#: Text of a Python block, and what takes its place: {model}, {rows}, {pairs}, {answers} and
#: {completions} are the small ones.
IN_PYTHON = {
    '"HuggingFaceTB/SmolLM2-135M-Instruct"': '"{model}"',
    '"my.jsonl"': '"{rows}"',
    '"my_pairs.jsonl"': '"{pairs}"',
    '"my_answers.jsonl"': '"{answers}"',
    '"my_prompts.jsonl"': '"{rows}"',
    'InstructionDataModule("bundled"': 'InstructionDataModule("{rows}"',
    'PreferenceDataModule("bundled"': 'PreferenceDataModule("{pairs}"',
    'PromptDataModule("bundled"': 'PromptDataModule("{rows}"',
    '"runs/start/ppo/hf/last"': '"{model}"',
    "max_steps=40": SHORT,
    "max_steps=20": SHORT,
    "batch_size=32": "batch_size=4",
    "max_epochs=2": SHORT,
    "max_epochs=1": SHORT,
    '"runs/sft_smollm2/hf/best"': '"{model}"',
    "group_size=64": "group_size=32",
}
#: Text of a command, and what takes its place.
IN_COMMANDS = {
    "my.jsonl": "{rows}",
    "my_prompts.jsonl": "{rows}",
    "my_pairs.jsonl": "{pairs}",
    "my_answers.jsonl": "{answers}",
    "completions.jsonl": "{completions}",
    "configs/": "{root}/configs/",
    "runs/ppo_smollm2/hf/last": "{model}",
    "--out runs/collect --dry-run": "--out runs/collect --dry-run --languages '{{en: 5}}'",
    "--out runs/rankings": "--out runs/rankings --reward lightning_rlhf.rewards.verifiers.length",
    "serve runs/start": "serve {model}",
    "chat runs/start --models sft ppo": "chat {model}",
    "runs/sft_smollm2/hf/best": "{model}",
    "quantize runs/sft_smollm2 ": "quantize {model} ",
    "--compare rtn nf4": "--compare rtn nf4 --data {rows}",
    "--devices 2 --memory 80GB --search": "--devices 1 --memory 80GB",  # tests/plan searches, which takes long
    # the other one's tokenizer is unknown to llama.cpp
    "export runs/sft_smollm2 --format gguf": "export {root}/tests/assets/stories260K --format gguf",
}
#: What makes a command small, behind its own arguments.
ON_CPU = "--trainer.accelerator cpu --trainer.devices 1 --trainer.enable_progress_bar false"
SMALL = {
    "fit": f"--model.pretrained {{model}} {ON_CPU}",
    "validate": f"--model.pretrained {{model}} {ON_CPU}",
    "test": f"--model.pretrained {{model}} {ON_CPU}",
    "predict": f"--model.pretrained {{model}} {ON_CPU}",
    "score-reference": f"--model.pretrained {{model}} {ON_CPU}",
    "inspect": "--model.pretrained {model}",
    "plan": "--model.pretrained {model}",
    "demo": "--model {model} --train {rows} --pairs {pairs} --prompts {rows} --steps 1 --dpo-steps 1 "
    "--reward-steps 1 --iterations 1 --new-tokens 8",
    "win-rate": "--judge lightning_rlhf.rewards.verifiers.length --max-new-tokens 4 --limit 3",
    "collect": "--generator scripted.Scripted",
    "data": "",
    "verify": "",
    "export": "--out made",
    "report": "",
    "serve": "--reward lightning_rlhf.rewards.verifiers.length",
    "chat": "--max-new-tokens 2",
    "quantize": "--group_size 32",
}
#: The small data of the configs in a folder.
TRAIN = {
    "configs/sft/": "{rows}",
    "configs/reward/": "{pairs}",
    "configs/dpo/": "{pairs}",
    "configs/kto/": "{answers}",
    "configs/online_dpo/": "{rows}",
    "configs/ppo/": "{rows}",
    "configs/grpo/": "{rows}",
}
#: What else makes them small: PPO's start from what the stages before left.
ALSO = dict.fromkeys(
    ("configs/online_dpo/", "configs/ppo/", "configs/grpo/"),
    "--model.reward lightning_rlhf.rewards.verifiers.length --model.rollout.sampling.max_new_tokens 8 "
    "--data.batch_size 4",
)
#: tests/conf runs them with 2 processes.
ALSO |= {f"configs/parallel/{axis}2": f"--trainer.strategy.init_args.{axis} 1" for axis in ("tp", "pp", "sp")}


def blocks(path, language):
    """(line number, source) of the fenced blocks of a language."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def commands(path):
    """(line number, command) of the sh blocks, continued lines joined, comments left out."""
    found = []
    for start, source in blocks(path, "sh"):
        whole = re.sub(r"\\\n *", lambda match: " " * len(match[0]), source)
        for offset, line in enumerate(whole.splitlines()):
            if shlex.split(line, comments=True):
                found.append((start + offset, " ".join(shlex.split(line, comments=True))))
    return found


def at(path, number):
    return f"{path.relative_to(ROOT)}:{number}"


#: Commands that CI leaves out, beside those of a config alone, which tests/conf runs: it runs these axes on two ranks,
#: and others read rows, too.
LIKE_OTHERS = (
    *(f"configs/sft/llama2_13b_full.yaml --config configs/parallel/{axis}2.yaml" for axis in ("tp", "sp", "pp")),
    "configs/sft/smollm2_lora.yaml --data.train my.jsonl",
    "configs/sft/smollm2_lora.yaml --data.train my.jsonl --trainer.max_epochs 3",
)


def is_run_elsewhere(command):
    """Whether another test runs what a command runs."""
    configs = command.removeprefix("lightning-rlhf fit --config ")
    return configs != command and (configs in LIKE_OTHERS or re.fullmatch(r"configs/\S+", configs) is not None)


PYTHON = [pytest.param(source, id=at(path, n)) for path in TEXTS for n, source in blocks(path, "python")]
COMMANDS = [pytest.param(command, id=at(path, n)) for path in TEXTS for n, command in commands(path)]
RUN = [
    pytest.param(command, id=entry.id, marks=pytest.mark.exhaustive if is_run_elsewhere(command) else ())
    for entry in COMMANDS
    if (command := entry.values[0]).startswith("lightning-rlhf ")
]


@pytest.fixture
def small(tiny_model_dir, tmp_path, monkeypatch):
    """Fills the places of a text; the working directory is a fresh one."""
    names = ("", "_pairs", "_answers", "_completions")
    rows, pairs, single, completions = (tmp_path / f"small{name}.jsonl" for name in names)
    answers = ("fox", "dog", "the lazy dog")
    lines = [{"instruction": f"question {i}", "output": answers[i % 3]} for i in range(24)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"prompt": f"question {i}", "chosen": answers[i % 3], "rejected": answers[i % 3 - 1]} for i in range(24)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"prompt": f"question {i}", "completion": answers[i % 3], "label": i % 2 == 0} for i in range(24)]
    single.write_text("".join(json.dumps(line) + "\n" for line in lines))
    completions.write_text('{"prompt": "3 + 4?", "completion": "It is 7.", "answer": 7}\n')
    files = {"rows": rows, "pairs": pairs, "answers": single, "completions": completions}
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return lambda text: text.format(model=tiny_model_dir, root=ROOT, **files)


def skip_without_needs(text):
    """To compare quantized models they must be loaded."""
    if "--compare" in text or "compare_methods" in text:
        pytest.importorskip("gptqmodel")


def replaced(text, table, small):
    for old, new in table.items():
        text = text.replace(old, small(new))
    return text


def test_the_readme_has_blocks():
    assert blocks(README, "python") and commands(README)


@pytest.mark.parametrize(
    "table, texts",
    [(IN_PYTHON, [entry.values[0] for entry in PYTHON]), (IN_COMMANDS, [entry.values[0] for entry in COMMANDS])],
    ids=["python", "commands"],
)
def test_every_text_to_replace_is_still_there(table, texts):
    assert [old for old in table if not any(old in text for text in texts)] == []


@pytest.mark.parametrize("source", PYTHON)
def test_python_block_runs(source, small):
    skip_without_needs(source)
    source = replaced(source, IN_PYTHON, small)
    small_ones = len(re.findall("max_steps=[12]\\b", source))
    assert source.count("Trainer(") == small_ones, "it would train at full size: say in IN_PYTHON how it is made small"
    exec(compile(source, "README", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", RUN)
def test_command_runs(command, small, capsys, monkeypatch):
    skip_without_needs(command)
    name, *rest = shlex.split(replaced(command, IN_COMMANDS, small))[1:]
    assert name in SMALL, f"say in SMALL how lightning-rlhf {name} is made small"
    for package in ("auto_round", "sentencepiece") if name == "export" and "gguf" in rest else ():
        pytest.importorskip(package)
    if any(arg.split(".")[-1] in ("help", "--help", "--print_config") for arg in rest):
        with pytest.raises(SystemExit) as stop:
            main([name, *rest])
        assert stop.value.code == 0
        assert "usage" in capsys.readouterr().out
        return
    arguments = [name, *rest, *shlex.split(small(SMALL[name]))]
    if name == "chat":
        monkeypatch.setattr("sys.stdin", io.StringIO("fox\n"))
    if name == "serve":
        with serving(Path("log"), *arguments[1:]) as server:
            found = httpx.post(f"{server.url}/v1/completions", json={"prompt": "fox", "max_tokens": 2}, timeout=60)
            assert found.json()["usage"]["completion_tokens"] == 2
        return
    if (
        "--config" in rest and name != "collect"
    ):  # whatever the command reads: Lightning prepares the training data for all of them
        [train] = [small(train) for folder, train in TRAIN.items() if folder in command]
        arguments += ["--data.train", train]
        arguments += [arg for folder, args in ALSO.items() if folder in command for arg in shlex.split(args)]
    for run in (arg for arg in rest if name == "report" and arg.startswith("runs/") and not arg.endswith(".html")):
        Path(run).mkdir(parents=True)
        (Path(run) / "metrics.csv").write_text("step,train/score,train/kl\n0,0.5,0.0\n1,0.75,0.5\n")
    if "--ckpt_path" in rest:  # a run that this one goes on from
        i = arguments.index("--ckpt_path")
        main([*arguments[:i], *arguments[i + 2 :], "--trainer.max_steps", "1"])
        [arguments[i + 1]] = map(str, Path().rglob("*.ckpt"))
    main([*arguments, *(["--trainer.max_steps", "2"] if name == "fit" else [])])
    assert name not in ("fit", "demo") or list(Path().rglob("config.json")), "no Hugging Face directory was exported"
    assert name != "report" or [text for text in map(Path.read_text, Path().rglob("*.html")) if "train/kl" in text]
    assert name != "export" or [file for file in Path("made").iterdir() if file.suffix in (".gguf", ".safetensors")]
    assert name != "predict" or any(map(Path.read_text, Path().rglob("predictions.jsonl"))), "no predictions"


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_one_that_exists(command):
    first, *rest = shlex.split(command)
    if first == "make":
        targets = re.findall(r"^([\w.-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert [arg for arg in rest if "=" not in arg and arg not in targets] == []
    else:
        assert first in ("lightning-rlhf", "pip", "pytest", "python", "git", "cd", "mkdocs", "docker"), (
            f"what runs {first}?"
        )


@pytest.mark.parametrize(
    "heading, formats, fits, convert",
    [
        ("Formats", FORMATS, lambda entry, row: entry.matches(row), to_conversation),
        ("Preference formats", PREFERENCE_FORMATS, lambda entry, row: not entry.missing(row), to_preference),
        ("Single answers", UNPAIRED_FORMATS, lambda entry, row: entry.matches(row), to_unpaired),
    ],
    ids=["instructions", "preferences", "single answers"],
)
def test_example_rows_are_of_their_format(heading, formats, fits, convert):
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"^## {heading}\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    examples = re.findall(r"^\*\*`(\w+)`\*\*.*?```json\n(.*?)\n```$", section, re.MULTILINE | re.DOTALL)
    known = [name for name in formats if (formats, name) != (PREFERENCE_FORMATS, "unpaired")]  # which is refused
    assert [name for name, _ in examples] == known, "each format, in the order in which they are tried"
    for name, row in examples:
        row = json.loads(row)
        assert next(entry.name for entry in formats.values() if fits(entry, row)) == name
        convert(row)


def files_named(path):
    """Relative links, and what looks like a path of the repository or a file of its root."""
    text = path.read_text(encoding="utf-8")
    link = r"\]\(([^)\s]+)\)"
    targets = [target.split("#")[0] for target in re.findall(link, text) if "://" not in target]
    yield from (path.parent / target for target in targets if target)
    folders = "|".join(entry.name for entry in ROOT.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    known = rf"(?<![\w/.~-])(?:(?:{folders})/[\w./*-]*[\w*]|[\w.-]+\.(?:md|txt|cfg|toml|yml|py|ipynb))(?![\w/])"
    yield from (
        ROOT / name
        for name in re.findall(known, re.sub(link, "]", text))
        if not name.startswith(("my.", "my_", "test_my_"))
    )


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_named_exists(path):
    written = {"runs", "build", "dist", "site", "models"}  # by runs and tools
    named = [file.resolve().relative_to(ROOT) for file in files_named(path)]
    named = [file for file in named if file.parts and file.parts[0] not in written]
    assert [str(file) for file in named if not list(ROOT.glob(str(file)))] == []
