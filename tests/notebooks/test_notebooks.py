"""Every notebook runs from its first cell to its last, at smoke size, and is committed without outputs."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PREFIX = "LIGHTNING_RLHF_NOTEBOOK_"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def settings(tiny_model_dir, tmp_path_factory):
    """What makes a notebook small; its first code cell reads them."""
    rows = tmp_path_factory.mktemp("data") / "my.jsonl"
    lines = [{"instruction": f"question {i}", "output": "the lazy dog"[: 3 + i % 9]} for i in range(24)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"MODEL": str(tiny_model_dir), "TRAIN": str(rows), "STEPS": "2", "BATCH_SIZE": "4"}


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    """Runs a notebook once, in a folder of its own: path to (notebook with outputs, folder)."""
    done = {}

    def execute(path):
        if path not in done:
            folder, elsewhere = tmp_path_factory.mktemp(path.stem), tmp_path_factory.mktemp("elsewhere")
            variables = {
                "PYTHONPATH": ROOT,
                "LIGHTNING_RLHF_CACHE": elsewhere / "cache",
                **{name: elsewhere / name for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")},
                **{PREFIX + name: value for name, value in settings.items()},
            }
            notebook = nbformat.read(path, as_version=4)
            where = {"metadata": {"path": str(folder)}}
            with pytest.MonkeyPatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, str(value))
                NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()
            done[path] = notebook, folder
        return done[path]

    return execute


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_there_are_notebooks():
    assert ROOT / "notebooks" / "sft.ipynb" in NOTEBOOKS


@each_notebook
def test_notebook_is_committed_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code_cells(notebook):
        assert not cell.outputs and cell.execution_count is None


@each_notebook
def test_notebook_can_be_made_small(path, settings):
    first = code_cells(nbformat.read(path, as_version=4))[0]
    assert [name for name in settings if PREFIX + name not in first.source] == []


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
    shown = [o.data for cell in code_cells(notebook) for o in cell.outputs if o.output_type == "display_data"]
    [table] = [data["text/markdown"] for data in shown if "text/markdown" in data]
    before, after = next(line for line in table.splitlines() if line.startswith("| loss")).split("|")[2:4]
    assert float(before) != float(after)
    [marked] = [data["text/html"] for data in shown if "<mark>" in data.get("text/html", "")]
    assert "<mark>&lt;|im_end|&gt;</mark>" in marked, "the token that ends the answer is scored"
