"""What the documentation names exists, and what it draws and converts is right."""

import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_rlhf
from lightning_rlhf import LoRA, PromptDataModule, Rollout, Sampling, Updates
from lightning_rlhf.data import pad
from lightning_rlhf.functional import LOSSES
from lightning_rlhf.models import RewardModel, load_reward_model
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.moved import MOVED

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
#: Packages with a public face; `lightning_rlhf` gathers names of the others.
ROOMS = [
    "lightning_rlhf",
    *(f"lightning_rlhf.{m.name}" for m in pkgutil.iter_modules(lightning_rlhf.__path__) if m.ispkg),
]
OTHERS = {"Trainer": L.Trainer, "ModelCheckpoint": ModelCheckpoint}


def load(path):
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page):
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------------------------- names


def documented():
    """The objects that the API page has."""
    found = []
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for path, options in re.findall(r"^::: ([\w.]+)\n((?: +.*\n)*)", text, re.MULTILINE):
        if importlib.util.find_spec(path.rpartition(".")[0]) and hasattr(
            owner := importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2]
        ):
            entry = getattr(owner, path.rpartition(".")[2])
        else:
            entry = importlib.import_module(path)
        members = (yaml.safe_load(options) or {}).get("options", {}).get("members") if options else None
        found.append(entry)
        if inspect.ismodule(entry):
            found += [getattr(entry, name) for name in (members or public(entry))]
        else:
            assert all(hasattr(entry, name) for name in members or ()), f"{path} has not all of {members}"
    return found


def public(module):
    """Names that a module defines for others."""
    return [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_on_the_api_page(room):
    module = importlib.import_module(room)
    there = set(map(id, documented()))
    assert [name for name in module.__all__ if name != "__version__" and id(getattr(module, name)) not in there] == []


def tables(page):
    """Rows of the page's tables as lists of cells, each with the heads of its columns."""
    for table in re.findall(r"(?:^\|.*\|\n)+", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE):
        head, _, *rows = (re.split(r" *(?<!\\)\| *", line.strip(" |\n")) for line in table.splitlines())
        for row in rows:
            yield head, row


def homes():
    """Classes by name: all public ones, and those of Lightning that the page names."""
    found = dict(OTHERS)
    for room in ROOMS:
        module = importlib.import_module(room)
        found |= {name: getattr(module, name) for name in module.__all__}
    optim = importlib.import_module("lightning_rlhf.stages.optim")
    return found | {"CosineWarmup": optim.CosineWarmup}


NAMED = [n for head, row in tables("moving.md") if head[1] == "here" for n in re.findall(r"`([A-Z][^`]+)`", row[1])]


def test_tables_for_moving_over_name_much():
    assert len(set(NAMED)) > 100
    text = (DOCS / "moving.md").read_text(encoding="utf-8")
    assert [old for moved in MOVED.values() for old in moved if f"`{old}`" not in text] == []


@pytest.mark.parametrize("name", sorted(set(NAMED)))
def test_what_a_name_becomes_exists(name):
    first, *rest = name.split(".")
    entry = homes()[first]
    for part in rest[:-1]:
        parameters = inspect.signature(entry).parameters if inspect.isclass(entry) else {}
        group = parameters[part].annotation if part in parameters else None
        entry = homes()[group] if group in homes() else getattr(entry, part)
    if rest and not (len(rest) == 1 and inspect.isfunction(getattr(entry, rest[0], None))):
        assert rest[-1] in inspect.signature(entry).parameters


def test_logged_names_are_those_of_ppo():
    told = (DOCS / "ppo.md").read_text(encoding="utf-8")
    logged = [row[1] for head, row in tables("moving.md") if "train/" in head[1]]
    names = [name for cell in logged for name in re.findall(r"`([^`]+)`", cell)]
    assert len(names) > 8
    assert [name for name in names if f"`{name}`" not in told] == []


def test_logged_names_of_dpo_are_told():
    told = (DOCS / "dpo.md").read_text(encoding="utf-8")
    logged = [row[1] for head, row in tables("moving.md") if head[1] == "here, by DPO"]
    names = [name for cell in logged for name in re.findall(r"`([^`]+)`", cell)]
    assert len(names) > 5
    assert [name for name in names if f"`{name}`" not in told] == []


def test_the_table_of_losses_is_that_of_the_code():
    found = {}
    for head, row in tables("dpo.md"):
        if head[0] == "`loss`":
            assert head[2:5] == ["reference", "margins", "`beta`"]
            found[row[0].strip("`")] = [cell.strip() for cell in row[2:5]]
    want = {}
    for name, loss in LOSSES.items():
        beta = inspect.signature(loss.function).parameters.get("beta")
        needs = ("yes" if loss.reference else "", "yes" if loss.offset else "", str(beta.default) if beta else "")
        want[name] = [*needs]
    assert found == want


# ------------------------------------------------------------------------------------------------- notebooks


def test_notebooks_are_on_the_site(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n")
    small = {"site_name": "x", "hooks": [str(DOCS / "hooks.py")], "plugins": []}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(small))
    build(load_config(str(tmp_path / "mkdocs.yml")))
    notebooks = {path.stem: path for path in (ROOT / "notebooks").glob("*.ipynb")}
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r": notebooks/(\w+)\.md", menu)) == notebooks.keys()
    for name, path in notebooks.items():
        shown = (tmp_path / "site" / "notebooks" / name / "index.html").read_text(encoding="utf-8")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert shown.count("<pre><code") == sum(cell["cell_type"] == "code" for cell in cells)
        title = cells[0]["source"][0].removeprefix("# ").strip()
        assert re.search(rf"<h1[^>]*>{re.escape(title)}", shown)


# ------------------------------------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def pictures():
    pytest.importorskip("matplotlib")
    return load(DOCS / "pictures.py")


def test_pictures_are_those_that_are_drawn(pictures, tmp_path):
    pictures.main(["--images", str(tmp_path)])
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn.keys() == pictures.PICTURES.keys()
    for name, text in drawn.items():
        kept = (DOCS / "images" / name).read_text()
        assert re.findall("<!-- .* -->", text) == re.findall("<!-- .* -->", kept), f"{name}: other texts than are kept"
        by = re.compile("Matplotlib v[0-9.]+")
        if by.search(text)[0] == by.search(kept)[0]:
            assert text == kept, f"python docs/pictures.py draws another {name}"


def test_the_page_says_what_the_picture_shows(pictures):
    batch = pictures.example()
    text = (DOCS / "packed.md").read_text(encoding="utf-8")
    [alt] = re.findall(r"!\[([^\]]*)\]\(images/packed.svg\)", text)
    assert f"{batch.num_tokens} tokens" in alt and f"{pad(batch).input_ids.numel()} places" in " ".join(alt.split())


def test_pictures_are_small_and_opaque():
    assert all(image.stat().st_size < 150_000 for image in (DOCS / "images").iterdir())
    for image in (DOCS / "images").glob("*.svg"):
        text = image.read_text()
        assert re.search(r'<g id="patch_1">\s*<path d="M 0 [^"]*"\s*style="fill: #ffffff"', text), f"{image}: no ground"
        assert "<dc:date>" not in text, f"{image} has the time of its making"


def luminance(color):
    """As WCAG 2.1 defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_drawn_pictures_are_dark_on_dark_pages(pictures):
    for name in pictures.PICTURES:
        text = (DOCS / "images" / name).read_text()
        [rules] = re.findall(r"@media \(prefers-color-scheme: dark\) \{\n(.*?)\n\}\n</style>", text, re.DOTALL)
        dark = dict(
            re.findall(r'style\*="((?:fill|stroke): #\w{6})"\] \{(?:fill|stroke): (#\w{6}) !important\}', rules)
        )
        used = set(re.findall(r"(?:fill|stroke): #\w{6}", "".join(re.findall('style="[^"]*"', text))))
        assert used and used <= dark.keys(), f"{name}: colors that stay as they are on a dark page"
        ink = luminance(dark[f"fill: {pictures.INK}"])
        texts = (f"fill: {pictures.INK}", f"fill: {pictures.FAINT}")
        grounds = [dark[entry] for entry in used if entry.startswith("fill") and entry not in texts]
        assert luminance(dark[f"fill: {pictures.PAPER}"]) < 0.01
        assert min((ink + 0.05) / (luminance(ground) + 0.05) for ground in grounds) > 4.5, f"{name}: texts fade"


# ------------------------------------------------------------------------------------------------- examples


def test_rloo_follows_the_gradient(tiny_model_dir):
    """One step of SGD is the gradient, here made by plain transformers, a completion at a time."""
    [block] = [block for block in blocks("extending.md") if "class RLOOModule" in block]
    source = block[: block.index("def brief")]
    assert len(block.splitlines()) <= 40
    names = {}
    exec(compile(source, "extending.md", "exec"), names)

    def lower(prompts, completions):
        return [float(sum(c.islower() for c in text)) for text in completions]

    module = names["RLOOModule"](
        tiny_model_dir,
        lower,
        lora=LoRA(),
        rollout=Rollout(samples_per_prompt=3, sampling=Sampling(max_new_tokens=6, temperature=0.7)),
        updates=Updates(epochs=1, max_grad_norm=None),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    )
    module.configure_model()
    data = PromptDataModule(
        [{"prompt": f"{i}" * i} for i in (1, 2, 3)], val_fraction=0.0, batch_size=3, tokenizer=module.tokenizer
    )
    data.setup("fit")
    experience, samples = module.run_rollout(next(iter(data.train_dataloader())), 0)
    scores = torch.tensor(lower(None, samples.completions)).view(3, 3)
    parameters = module.policy.policy_parameters()
    before = [p.detach().clone() for p in parameters]
    loss = torch.zeros(())
    for tree, rewards in zip(experience.trees, scores, strict=True):
        for i, branch in enumerate(tree.branches):
            ids = torch.tensor([[*tree.prompt, *branch.input_ids]])
            with module.policy.native_attention() as model:
                logits = model(ids).logits[0, len(tree.prompt) - 1 : -1] / 0.7
            logprob = logits.log_softmax(-1).gather(1, ids[0, len(tree.prompt) :, None]).sum()
            loss -= (rewards[i] - rewards[torch.arange(3) != i].mean()) * logprob / sum(experience.lengths)
    want = torch.autograd.grad(loss, parameters)

    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    assert trainer.callback_metrics["train/score"] == scores.mean()
    assert max(g.abs().max() for g in want) > 1e-3
    for old, new, gradient in zip(before, parameters, want, strict=True):
        torch.testing.assert_close(old - new, gradient, atol=1e-6, rtol=1e-4)


def test_reward_model_of_colossalchat(tiny_model_dir, tmp_path):
    """Its state dict: a body named ``model.``, and a linear ``value_head`` with a bias; in two files with an index."""
    from transformers import AutoModel

    [block] = [block for block in blocks("reward.md") if "def convert_reward_model" in block]
    names = {}
    exec(compile(block, "reward.md", "exec"), names)
    torch.manual_seed(0)
    body, head = AutoModel.from_pretrained(tiny_model_dir).eval(), torch.nn.Linear(32, 1)
    weights = {f"model.{name}": value for name, value in body.state_dict().items()}
    weights |= {f"value_head.{name}": value.detach() for name, value in head.state_dict().items()}
    files = {name: f"pytorch_model-0000{1 + i % 2}.bin" for i, name in enumerate(weights)}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in files if files[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))

    model = names["convert_reward_model"](tmp_path, tiny_model_dir)
    tokenizer = lightning_rlhf.models.load_tokenizer(tiny_model_dir)
    save_pretrained(model, tokenizer, tmp_path / "reward")
    reward = RewardModel(load_reward_model(tmp_path / "reward", needs_head=True)).eval()
    batch = lightning_rlhf.data.pack(
        [lightning_rlhf.data.Tree([5, 6, 7], [lightning_rlhf.data.Branch([8, 9]), lightning_rlhf.data.Branch([10])])]
    )
    with torch.no_grad():
        want = [
            head(body(torch.tensor([ids])).last_hidden_state[0, -1]).item() for ids in ([5, 6, 7, 8, 9], [5, 6, 7, 10])
        ]
        assert reward(batch, normalize=True).tolist() == pytest.approx(want, abs=1e-5)
