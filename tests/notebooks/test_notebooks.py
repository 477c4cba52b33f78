"""Every notebook runs from its first cell to its last, at smoke size, and is committed without outputs."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from forked import python
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from lightning_rlhf.functional import LOSSES

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PREFIX = "LIGHTNING_RLHF_NOTEBOOK_"

pytestmark = pytest.mark.slow
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def settings(tiny_model_dir, tmp_path_factory):
    """What makes a notebook small, by its name; its first code cell reads them."""
    text = "the lazy dog"
    rows = {
        "sft": [{"instruction": f"question {i}", "output": text[: 3 + i % 9]} for i in range(24)],
        "reward": [
            {"prompt": f"question {i}", "chosen": text[: 3 + i % 9], "rejected": text[: 4 + i % 7], "lang": "en"}
            for i in range(24)
        ],
        "dpo": [
            {"prompt": f"question {i}", "chosen": text[: 3 + i % 9], "rejected": text[: 4 + i % 7]} for i in range(24)
        ],
        "ppo": [{"prompt": f"question {i}"} for i in range(24)],
        "quantize": [{"instruction": f"question {i}", "output": text[: 3 + i % 9]} for i in range(40)],
    }
    folder = tmp_path_factory.mktemp("data")
    small = {"drop_in": {"MODEL": str(tiny_model_dir), "STEPS": "2", "BATCH_SIZE": "3"}}
    for name, lines in rows.items():
        train = folder / f"{name}.jsonl"
        train.write_text("".join(json.dumps(line) + "\n" for line in lines))
        small[name] = {"MODEL": str(tiny_model_dir), "TRAIN": str(train), "STEPS": "2", "BATCH_SIZE": "4"}
    small["grpo"] = {"MODEL": str(tiny_model_dir), "STEPS": "2", "BATCH_SIZE": "4"}
    small["data"] = {"ROWS": "30"}
    small["colossalai"] = {**small["sft"], "STEPS": "3"}
    small["quantize"] = {**{name: small["quantize"][name] for name in ("MODEL", "TRAIN")}, "ROWS": "30", "GROUP": "32"}
    small["serve_and_chat"] = {"MODEL": str(tiny_model_dir), "NEW_TOKENS": "8"}
    return small


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    """Runs a notebook once, in a folder of its own: path to (notebook with outputs, folder)."""
    done = {}

    def execute(path):
        if path.stem == "quantize":
            pytest.importorskip("gptqmodel")
        if path not in done:
            folder, elsewhere = tmp_path_factory.mktemp(path.stem), tmp_path_factory.mktemp("elsewhere")
            variables = {
                "PYTHONPATH": ROOT,
                "LIGHTNING_RLHF_CACHE": elsewhere / "cache",
                **{name: elsewhere / name for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")},
                **{PREFIX + name: value for name, value in settings[path.stem].items()},
            }
            notebook = nbformat.read(path, as_version=4)
            where = {"metadata": {"path": str(folder)}}
            with pytest.MonkeyPatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, str(value))
                kernel = AsyncKernelManager(kernel_name="python3")
                kernel.kernel_spec.argv[0] = python()
                NotebookClient(notebook, km=kernel, timeout=240, resources=where).execute()
            done[path] = notebook, folder
        return done[path]

    return execute


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def displayed(notebook, kind):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [o.data[kind] for o in outputs if o.output_type == "display_data" and kind in o.data]


def cells_of(line):
    """Of a row of a Markdown table."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_there_are_notebooks(settings):
    assert [path.stem for path in NOTEBOOKS] == sorted(settings)


@each_notebook
def test_notebook_is_committed_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code_cells(notebook):
        assert not cell.outputs and cell.execution_count is None


@each_notebook
def test_notebook_says_how_long_it_takes(path):
    """Before its first code cell."""
    first, *_ = nbformat.read(path, as_version=4).cells
    assert first.cell_type == "markdown"
    assert re.search(r"takes (about )?\d+( to \d+)? minutes", " ".join(first.source.split()))


@each_notebook
def test_notebook_can_be_made_small(path, settings):
    first = code_cells(nbformat.read(path, as_version=4))[0]
    assert [name for name in settings[path.stem] if PREFIX + name not in first.source] == []


@each_notebook
def test_notebook_runs_and_writes_in_its_place(path, run):
    notebook, folder = run(path)
    assert all(cell.execution_count for cell in code_cells(notebook))
    assert [found.relative_to(folder).as_posix() for found in folder.glob("*/*")] == ["runs/notebook"]


def test_sft_notebook_shows_what_it_says(run):
    notebook, folder = run(ROOT / "notebooks" / "sft.ipynb")
    text = printed(notebook)
    assert "step=1.ckpt to step 2: largest difference to the run above 0.0\n" in text
    assert "4 conversations in one row of" in text
    assert (folder / "runs" / "notebook" / "hf" / "last" / "config.json").is_file()
    [table] = displayed(notebook, "text/markdown")
    before, after = next(line for line in table.splitlines() if line.startswith("| loss")).split("|")[2:4]
    assert float(before) != float(after)
    [marked] = [shown for shown in displayed(notebook, "text/html") if "<mark>" in shown]
    assert "<mark>&lt;|im_end|&gt;</mark>" in marked, "the token that ends the answer is scored"


def test_reward_notebook_shows_what_it_says(run):
    notebook, folder = run(ROOT / "notebooks" / "reward.ipynb")
    text = printed(notebook)
    assert "4 answers to 2 prompts in one row of" in text
    assert len(re.findall("^(plain transformers|its own head): .*, equal: True$", text, re.MULTILINE)) == 2
    accuracy, above = re.search(r"held-out accuracy ([\d.]+), above ([\d.]+)$", text, re.MULTILINE).groups()
    assert accuracy == above
    config = json.loads((folder / "runs" / "notebook" / "reward" / "hf" / "last" / "config.json").read_text())
    measured = [float(offset) for offset in re.findall(r"^score_offset .*?([-\d.]+)$", text, re.MULTILINE)]
    assert measured == [round(config["score_offset"], 3)] * 2 != [0.0, 0.0]
    found, calibration = (table.splitlines()[2:] for table in displayed(notebook, "text/markdown"))
    cells = {name: values for name, *values in map(cells_of, found)}
    assert cells["loss"][0] != cells["loss"][1]
    assert cells["accuracy"][1] == above and cells["length_accuracy"][0] == cells["length_accuracy"][1]
    assert cells["accuracy/en"] == cells["accuracy"]
    held_out = sum(int(line.split("|")[3]) for line in calibration)
    assert 0 < held_out < int(re.match(r"(\d+) rows", text)[1])
    kinds = re.findall(r"([\d.]+|nan) of (\d+) pairs won", text)
    assert sum(int(pairs) for _, pairs in kinds) == held_out
    won = sum(float(share) * int(pairs) for share, pairs in kinds if int(pairs))
    assert won / held_out == pytest.approx(float(above), abs=1e-3)
    [marked] = [shown for shown in displayed(notebook, "text/html") if "<mark>" in shown]
    assert marked.count("<mark>&lt;|im_end|&gt;</mark>") == 2, "each answer is scored at the token that ends it"


def test_dpo_notebook_shows_what_it_says(run):
    notebook, folder = run(ROOT / "notebooks" / "dpo.ipynb")
    four = ["sigmoid", "ipo", "simpo", "apo_zero"]
    rows, pairs = map(
        int, re.search(r"^(\d+) pairs, (\d+) of them held out$", printed(notebook), re.MULTILINE).groups()
    )
    assert rows == 24 and 0 < pairs < 24
    [curves] = [shown for shown in displayed(notebook, "text/html") if "<svg" in shown]
    assert curves.count("<polyline") == len(LOSSES)
    assert "no finite value" not in curves
    pulls, held_out, answers = (table.splitlines()[2:] for table in displayed(notebook, "text/markdown"))
    for name, *pairs_of in map(cells_of, pulls):
        start, far, fell = ([float(number) for number in one.split(",")] for one in pairs_of)
        assert start[0] == start[1] > 0 and (far[0] == far[1])
        assert (far == fell) == (fell[0] == fell[1]) == (name != "apo_zero")
    found = {name: values for name, *values in map(cells_of, held_out)}
    assert list(found) == ["start", *four]
    assert found["start"][0] == "0.500" and found["start"][2:] == ["+0.00"] * 2
    assert [len(cells_of(line)) for line in answers] == [6] * 3
    exports = [folder / "runs" / "notebook" / "dpo" / name / "hf" / "last" / "model.safetensors" for name in four]
    assert len({export.read_bytes() for export in exports}) == 4, "each loss moves the model elsewhere"


def test_ppo_notebook_shows_what_it_says(run):
    notebook, folder = run(ROOT / "notebooks" / "ppo.ipynb")
    text = printed(notebook)
    assert "16 completions of 4 prompts in one row of" in text
    assert "\nlargest distance of a ratio from 1 before the first update: 0.0\n" in text
    error = re.search("largest distance of a first ratio from 1 in 2 iterations: (.*)$", text, re.MULTILINE)
    assert float(error[1]) < 1e-5
    assert "stopped after 1 iteration, resumed to 2: largest difference to the run above 0.0\n" in text
    assert text.count("as in training: True") == 3
    assert (folder / "runs" / "notebook" / "ppo" / "hf" / "last" / "config.json").is_file()
    first, held_out, answers, estimates = (table.splitlines()[2:] for table in displayed(notebook, "text/markdown"))
    for _, old, reference, value, _ in map(cells_of, first):
        assert old == reference and float(value) == 0.0
    scores = {name: values for name, *values in map(cells_of, held_out)}
    assert scores["score"][0] != scores["score"][1]
    assert len(answers) == 3 and any(before != after for _, before, after in map(cells_of, answers))
    kl = {name: (float(before), float(after)) for name, before, after in map(cells_of, estimates)}
    assert [before for before, _ in kl.values()] == [0.0] * 3
    assert kl["k2"][1] > 0 and kl["k3"][1] > 0
    [curves] = [shown for shown in displayed(notebook, "text/html") if "<svg" in shown]
    assert curves.count("<polyline") == 4


def test_grpo_notebook_shows_what_it_says(run):
    notebook, folder = run(ROOT / "notebooks" / "grpo.ipynb")
    text = printed(notebook)
    assert re.findall(r"^ ?([\d.]+)  (.*)$", text, re.MULTILINE) == [
        ("1.00", "The moon is bright tonight!"),
        ("0.67", "The moon is bright tonight."),
        ("0.67", "It is bright! It is the moon!"),
        ("0.00", "Sure! Here is a sentence."),
        ("1.00", "moon moon moon!"),
    ]
    assert "Algorithm(baseline='leave_one_out', scale='none', " in text and "mean='prompt')" in text
    first, formulas, held_out, last, answers, both = (
        [cells_of(line) for line in table.splitlines() if line.startswith("|")][2:]
        for table in displayed(notebook, "text/markdown")
    )
    for group in (first, last):
        scores, advantages = ([float(line[i]) for line in group] for i in (0, 1))
        assert len(group) == 8 and abs(sum(advantages)) < 0.1
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        assert (advantages[best] > 0 > advantages[worst]) == (scores[best] > scores[worst])
    assert [line[0] for line in formulas] == ["grpo", "dr_grpo", "rloo", "maxrl"]
    assert [line[0] for line in held_out] == ["score", "pass@8", "tokens of an answer"]
    assert [line[:3] for line in both] == held_out, "the first run is shown as it was"
    assert len(answers) == 4
    one, two = (shown for shown in displayed(notebook, "text/html") if "<svg" in shown)
    assert (one.count("<polyline"), two.count("<polyline")) == (4, 8)
    exports = [folder / "runs" / "notebook" / "grpo" / name / "hf" / "last" / "config.json" for name in ("grpo", "own")]
    assert all(export.is_file() for export in exports)


def test_data_notebook_shows_what_it_says(run):
    notebook, _ = run(ROOT / "notebooks" / "data.ipynb")
    text = printed(notebook)
    assert "nothing is lost: True\n" in text
    assert "the same rows: True\n" in text and "the same rows again: True - requests sent: 0\n" in text
    assert re.search(r"The pilot took [\d,]+ tokens and 0\.\d+ of money for \d+ rows", text)
    seeds, card = displayed(notebook, "text/markdown")
    assert len(seeds.splitlines()) == 15 and "60 instructions with answers (30 in en, 30 in zh)" in card
    assert (
        "61 rows, 51 kept\nPersonalData: dropped {}, changed 1\nNearDuplicate: dropped {'near duplicate': 10}" in text
    )
    assert "[PHONE]" in text and "every pair is in the order of the reward: True\n" in text
    assert "the longer answer won 0%" in text and "first: 0 rankings, 0 pairs" in text


def test_quantize_notebook_shows_what_it_says(run):
    notebook, folder = run(ROOT / "notebooks" / "quantize.ipynb")
    text = printed(notebook)
    symmetric, asymmetric = map(float, re.findall(r"^4 bits, .*: relative error ([\d.]+)$", text, re.MULTILINE))
    assert 0 < asymmetric < symmetric < 0.2
    counts = re.findall(r"^(calibration|held out): (\d+) rows, \d+ tokens$", text, re.MULTILINE)
    assert [name for name, _ in counts] == ["calibration", "held out"]
    assert 30 < sum(int(rows) for _, rows in counts) <= 40
    [table] = displayed(notebook, "text/markdown")
    own, *others = map(cells_of, table.splitlines()[2:])
    assert own[0] == "none" and float(own[3]) == 0.0
    assert [method for method, *_ in others] == ["rtn", "gptq"] * 2
    assert len(re.findall(r"^4 bits, groups of 32, .*: (rtn|gptq) is best$", text, re.MULTILINE)) == 2
    assert float(re.search(r"^relative difference to the logits of our loader: (.*)$", text, re.MULTILINE)[1]) < 1e-3
    kept = json.loads((folder / "runs" / "notebook" / "quantize" / "compare.json").read_text())
    assert [f"{result['kl']:.5f}" for result in kept["results"]] == [line[3] for line in (own, *others)]
    assert all(result["kl"] > 0 for result in kept["results"][1:])


def test_serve_and_chat_notebook_shows_what_it_says(run):
    notebook, folder = run(ROOT / "notebooks" / "serve_and_chat.ipynb")
    text = printed(notebook)
    assert "['after', 'base']" in text and "not streamed, the same answer: True\n" in text
    in_chat = re.findall(r"^([+-][\d.]+)  ", text, re.MULTILINE)
    alone = re.findall(r"'([+-][\d.]+)'", re.search(r"^by /v1/rewards: (.*)$", text, re.MULTILINE)[1])
    assert len(in_chat) == len(alone) == 2, "random answers need not be read back as the tokens that were sampled"
    rows, votes = map(int, re.search(r"^(\d+) preferences of (\d+) votes", text, re.MULTILINE).groups())
    chat = folder / "runs" / "notebook" / "chat" / "votes"
    kept = [json.loads(line) for line in (chat / "votes.jsonl").read_text().splitlines()]
    assert len(kept) == votes == 8 and 1 < rows <= 8
    assert rows <= sum(vote["vote"] != "tie" for vote in kept)
    assert re.search(r"^steps: 1, loss: \d\.\d+$", text, re.MULTILINE)


def test_ppo_of_the_drop_in_notebook_learns(stories_model_dir, monkeypatch, tmp_path):
    """Its own module, with a tiny real model and a rate that suits it: a faulty advantage or critic would show."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"MODEL": stories_model_dir, "STEPS": 12, "BATCH_SIZE": 6}.items():
        monkeypatch.setenv(PREFIX + name, str(value))
    cells = [cell.source for cell in code_cells(nbformat.read(ROOT / "notebooks" / "drop_in.ipynb", as_version=4))]
    [first] = [i for i, source in enumerate(cells) if "own = OwnPPO(" in source]
    source = "\n".join(cells[: first + 1])
    for old, new in {
        "L.seed_everything(0)\n": "L.seed_everything(2)\n",
        "lr=2e-5": "lr=5e-4",
        "callbacks=[TQDMProgressBar(), *callbacks]": "callbacks=callbacks, enable_progress_bar=False",
        'accelerator="auto"': 'accelerator="cpu"',
        "model_dir)\n": "model_dir)\ntokenizer.chat_template = '{{ messages[0].content }}'\n",
    }.items():
        assert old in source, f"the notebook has no {old!r}"
        # of the two loads from the directory the last is the tokenizer's
        source = new.join(source.rsplit(old, 1))
    names = {}
    exec(compile(source, "drop_in.ipynb", "exec"), names)
    lines = [cells_of(line) for line in names["keep"].lines[2:]]
    scores, kl = ([float(line[i]) for line in lines] for i in (1, 2))
    assert len(scores) == 12 and kl[0] == 0.0 < kl[-1]
    # of a critic that begins at random, whose noise drowns the advantages, the mean is 0.43
    assert sum(scores) / 12 > 0.6 and scores[-1] > scores[0] + 0.5, scores


def test_drop_in_notebook_shows_what_it_says(run):
    notebook, _ = run(ROOT / "notebooks" / "drop_in.ipynb")
    text = printed(notebook)
    assert "greedy answers equal those of model.generate: True\n" in text
    assert float(re.search("largest difference of a log-prob: (.*)$", text, re.MULTILINE)[1]) < 1e-4
    assert "key 3 alone gives the same completion: True\n" in text
    own, reward = (
        [[float(value) for value in cells_of(line)] for line in table.splitlines()[2:]]
        for table in displayed(notebook, "text/markdown")
    )
    assert [line[0] for line in own] == [2, 4], "two updates an iteration"
    assert own[0][2] == 0.0, "the reference is where the policy starts"
    assert [line[0] for line in reward] == [0, 1, 2]
    assert len({loss for _, loss, *_ in reward}) == 3


def test_colossalai_notebook_shows_what_it_says(run):
    notebook, folder = run(ROOT / "notebooks" / "colossalai.ipynb")
    text = printed(notebook)
    curves, compared, own = (table.splitlines()[2:] for table in displayed(notebook, "text/markdown"))
    assert [cells_of(line)[0] for line in curves] == ["1", "2", "3"]
    assert len({cells_of(line)[1] for line in curves}) == 3, "it learns"
    differences, shares = {}, {}
    for name, difference, _, _, share in map(cells_of, compared):
        differences[name], shares[name] = float(difference), [float(part) for part in share.split(",")]
    assert differences["ddp"] < 1e-5 and differences["zero2"] < 1e-5 and differences["gemini"] < 2e-2
    assert shares["ddp"] == [1.0, 1.0] and shares["zero2"] == [0.5, 0.5]
    assert sum(shares["gemini"]) == pytest.approx(1, abs=0.02) and max(shares["gemini"]) < 0.9
    before, after = re.findall(r"^held-out loss of \w+: ([\d.]+)$", text, re.MULTILINE)
    assert float(before) == pytest.approx(float(after), abs=2e-4)
    assert "step=1.ckpt: " in text
    assert float(re.search("^steps 2 to 3 in plain Lightning: .* (.*)$", text, re.MULTILINE)[1]) < 1e-5
    runs = re.findall(r"^(\w+): (\d+) steps, largest difference to the plain run (.*)$", text, re.MULTILINE)
    assert [(name, int(steps)) for name, steps, _ in runs] == [("zero2", 24), ("resumed", 12), ("moved", 12)]
    assert max(float(difference) for *_, difference in runs) < 1e-5
    whole, first, second = map(int, re.search(r"plain \[(\d+)\] B, zero2 \[(\d+), (\d+)\] B", text).groups())
    assert first == second and whole / 2 <= first < 0.6 * whole
    assert len(own) == 12
    assert (folder / "runs" / "notebook" / "colossalai" / "gan" / "epoch=2.ckpt").is_file()
