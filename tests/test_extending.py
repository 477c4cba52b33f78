"""What docs/extending.md says to write, one file and one test each, works from that page alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_rlhf import InstructionDataModule
from lightning_rlhf.cli import main
from lightning_rlhf.data.formats import FORMATS, import_format, to_conversation
from lightning_rlhf.data.preference_formats import to_preference
from lightning_rlhf.data.prompt_formats import to_prompt

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The page's files in a folder in which nothing else is."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    found = re.findall(r'^```python title="([\w.]+)"\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    for name, source in found:
        (tmp_path / name).write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    import_format.cache_clear()
    yield [name for name, _ in found]
    for name, _ in found:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_each_file_has_a_test_that_passes(files, tmp_path):
    own = [name for name in files if not name.startswith("test_")]
    assert own == ["my_formats.py", "my_pair_losses.py", "my_losses.py", "my_rewards.py"] and {
        f"test_{name}" for name in own
    } < {*files}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout + done.stderr


SMALL = "--trainer.accelerator cpu --trainer.logger false --trainer.enable_progress_bar false --trainer.max_steps 1"


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        (
            "--model SFTModule --data InstructionDataModule --data.format my_formats.questions",
            [{"q": f"fox {i}", "a": "dog"} for i in range(8)],
        ),
        (
            "--model my_losses.HingeRewardModule --data PreferenceDataModule",
            [{"prompt": f"fox {i}", "chosen": "dog", "rejected": "cat"} for i in range(8)],
        ),
        (
            "--model DPOModule --model.loss my_pair_losses.exponential --data PreferenceDataModule",
            [{"prompt": f"fox {i}", "chosen": "dog", "rejected": "cat"} for i in range(8)],
        ),
        (
            "--model PPOModule --model.reward my_rewards.mentions --data PromptDataModule "
            "--model.rollout.sampling.max_new_tokens 4 --data.batch_size 4",
            [{"prompt": f"fox {i}", "keyword": "dog"} for i in range(8)],
        ),
    ],
    ids=["format", "loss", "loss over pairs", "reward"],
)
def test_each_runs_from_the_command_line(command, rows, files, tiny_model_dir, monkeypatch):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # as a script that is installed: its folder is not on the path
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    data = "--data.train rows.jsonl --data.val_fraction 0.0 --data.cache_dir cache"
    main(["fit", *command.split(), "--model.pretrained", str(tiny_model_dir), *data.split(), *SMALL.split()])


@pytest.mark.parametrize(
    "setting", ["--model SFTModule --data InstructionDataModule --data.format my_formats.question",
                "--model PPOModule --data PromptDataModule --model.reward my_rewards.mention"],
)  # fmt: skip
def test_what_is_not_in_a_file_is_told_in_a_line(setting, files, tiny_model_dir):
    Path("rows.jsonl").write_text(json.dumps({"q": "fox", "a": "dog", "prompt": "fox"}))
    with pytest.raises(
        SystemExit, match=r"Can't import the \w+ '[\w.]+': my_\w+ has no \w+; did you mean \w+\? It has: "
    ):
        main(["fit", *setting.split(), "--model.pretrained", str(tiny_model_dir), "--data.train", "rows.jsonl",
              "--data.cache_dir", "cache", *SMALL.split()])  # fmt: skip


def test_a_loss_of_ones_own_is_the_one_that_is_logged(files, tiny_model_dir, monkeypatch):
    monkeypatch.syspath_prepend(".")
    from my_losses import HingeRewardModule

    module = HingeRewardModule(tiny_model_dir)
    values = torch.tensor([[1.0, 2.0], [0.5, 2.0], [0.0, 0.5]])
    assert module.compute_losses(*values).tolist() == [0.5, 1.5]


def test_formats_of_prompts_and_preferences(files, tmp_path):
    (tmp_path / "more.py").write_text(
        "from lightning_rlhf.data.formats import Format, Message\n"
        "from lightning_rlhf.data.preference_formats import Candidate\n"
        "def ask(row): return (Message(role='user', content=row['q']),)\n"
        "def rank(row): return [Candidate(n, (*ask(row), Message(role='assistant', content=row[n])), i)\n"
        "                       for i, n in enumerate(('good', 'bad'))]\n"
        "asked, ranked = Format('asked', ('q',), ask), Format('ranked', ('q', 'good', 'bad'), rank)\n"
    )
    assert to_prompt({"q": "a", "answer": 4}, "more:asked").columns == {"answer": 4}
    found = to_preference({"q": "a", "good": "b", "bad": "c"}, "more.ranked")
    assert found == to_preference({"prompt": "a", "chosen": "b", "rejected": "c"})


def test_what_is_no_format_is_told_in_a_line(files):
    with pytest.raises(
        ImportError, match=r"format 'my_formats\.question': my_formats has no question; did you mean questions\? "
    ):
        to_conversation({"q": "a"}, "my_formats.question")
    with pytest.raises(ImportError, match="there is no module 'nowhere', neither installed nor in"):
        to_conversation({"q": "a"}, "nowhere.questions")
    with pytest.raises(ValueError, match=r"my_formats\.convert is a function\. Make it a .*Format"):
        to_conversation({"q": "a"}, "my_formats.convert")
    with pytest.raises(ValueError, match=r"'mine' is not known\. Choose 'auto', the import path of your own"):
        to_conversation({"q": "a"}, "mine")
    with pytest.raises(TypeError, match="does not support item assignment"):
        FORMATS["mine"] = FORMATS["text"]


def test_a_changed_format_is_read_again_where_files_are_streamed(files, tiny_tokenizer, tmp_path):
    """Its rows are found in the cache by their file, which is as it was."""
    Path("rows.jsonl").write_text("".join(json.dumps({"q": f"fox {i}", "a": "dog"}) + "\n" for i in range(4)))

    def answers():
        sys.modules.pop("my_formats", None)
        import_format.cache_clear()
        data = InstructionDataModule("rows.jsonl", format="my_formats.questions", val_fraction=0.0, streaming_window=8,
                                     tokenizer=tiny_tokenizer, cache_dir=tmp_path / "cache")  # fmt: skip
        data.setup("fit")
        return [tiny_tokenizer.decode(batch.target) for batch in data.train_dataloader()]

    first = answers()
    assert answers() == first and len(list((tmp_path / "cache").iterdir())) == 1
    source = Path("my_formats.py").read_text().replace("content=answer", "content=answer.upper()")
    Path("my_formats.py").write_text(source + "\n# changed\n")
    assert answers() != first
