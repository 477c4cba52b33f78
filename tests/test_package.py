"""What is installed, and that importing it is cheap."""

import ast
import configparser
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_rlhf"


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    assert parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


def project(requirement):
    """The normalized project name of a requirement such as `jsonargparse[signatures]>=4.35`."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def pins(name):
    rows = [line for line in lines((ROOT / name).read_text(encoding="utf-8")) if not line.startswith("#")]
    return dict(row.split("==") for row in rows)


def python(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["lightning_rlhf", "lightning_rlhf.cli"])
def test_importing_loads_no_framework(module):
    heavy = ("torch", "transformers", "lightning", "peft", "datasets", "bitsandbytes", "colossalai", "numpy", "pyarrow")
    heavy += ("openai", "tenacity", "aiolimiter")
    out = python(f"import sys, {module}; print(*(m for m in {heavy} if m in sys.modules))")
    assert out.split() == []


def test_importing_the_stages_loads_what_they_need_alone():
    out = python("import sys, lightning_rlhf.stages; print(*sys.modules)")
    unwanted = ("evaluation", "report", "inspection")
    assert [name for name in out.split() if name.startswith(tuple(f"lightning_rlhf.{room}" for room in unwanted))] == []


@pytest.mark.parametrize("room", ["callbacks", "data", "endpoint", "serving", "utils"])
def test_faces_that_load_late_have_all_that_they_list(room):
    face = importlib.import_module(f"lightning_rlhf.{room}")
    assert sorted(face._HOMES) == sorted(face.__all__)
    assert all(getattr(face, name) is not None for name in face.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = face.no_such_name


def test_public_names_resolve_and_are_listed():
    import lightning_rlhf

    for name in lightning_rlhf.__all__:
        assert getattr(lightning_rlhf, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lightning_rlhf.no_such_name


def test_dir_lists_public_names_before_they_are_loaded():
    out = python(
        "import sys, lightning_rlhf; names = dir(lightning_rlhf); assert names == sorted(set(names));"
        "print(set(lightning_rlhf.__all__) <= set(names), 'torch' in sys.modules)"
    )
    assert out.split() == ["True", "False"]


def test_version_is_the_same_everywhere(setup):
    import lightning_rlhf

    assert lightning_rlhf.__version__ == setup["metadata"]["version"]
    assert f"## [{lightning_rlhf.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_file_of_the_package_is_shipped(setup):
    beside = dict(line.split(" = ") for line in lines(setup["options"]["package_dir"]))
    shipped = set()
    for package, patterns in setup["options.package_data"].items():
        for pattern in re.split(r"[,\s]+", patterns.strip()):
            found = set((ROOT / beside.get(package, package.replace(".", "/"))).glob(pattern))
            assert found, f"{package}: nothing matches {pattern}"
            shipped |= found
    assert PACKAGE / "py.typed" in shipped
    files = {file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert {file for file in files if file.suffix != ".py"} == {file for file in shipped if PACKAGE in file.parents}
    assert set((ROOT / "configs").rglob("*.*")) <= shipped
    # find_packages passes over a folder without __init__.py, so what it has must be data
    page = PACKAGE / "serving" / "static"
    assert {file.parent for file in files if not (file.parent / "__init__.py").is_file()} <= {
        PACKAGE / "data" / "bundled", page, page / "vendor"
    }  # fmt: skip


@pytest.mark.slow
def test_a_wheel_has_the_data_and_the_configs_and_serves(tmp_path):
    tree, site = tmp_path / "tree", tmp_path / "site"
    for name in ("lightning_rlhf", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(tree)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    packed = {file.relative_to(site).as_posix() for file in site.rglob("*") if file.is_file()}
    files = [file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    wanted = {file.relative_to(ROOT).as_posix() for file in files}
    wanted |= {f"lightning_rlhf/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "configs").rglob("*.yaml")}
    assert {name for name in packed if ".dist-info/" not in name} == wanted
    code = "import lightning_rlhf, lightning_rlhf.cli as c; c.main(['configs']); print(lightning_rlhf.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=site, env=environment)
    assert "ppo/smollm2_lora.yaml" in done.stdout and str(site) in done.stdout, done.stderr


def test_console_script_is_the_command_line(setup):
    [script] = lines(setup["options.entry_points"]["console_scripts"])
    assert script == "lightning-rlhf = lightning_rlhf.cli:main"
    usage = python("from lightning_rlhf.cli import main; main(['--help'])")
    assert usage.startswith("usage: lightning-rlhf")


def test_every_import_of_the_package_is_declared(setup):
    required = {project(r) for r in lines(setup["options"]["install_requires"])}
    extras = {project(r) for rows in setup["options.extras_require"].values() for r in lines(rows)}
    imported = {}
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                imported.setdefault(name.split(".")[0], file.relative_to(ROOT))
    distributions = importlib.metadata.packages_distributions()
    third_party = {name: file for name, file in imported.items() if name not in sys.stdlib_module_names}
    for name, file in third_party.items():
        if name != "lightning_rlhf":
            owners = {project(owner) for owner in distributions.get(name, [name])}
            assert owners & (required | extras), f"{file} imports {name}, which setup.cfg does not ask for"


def test_extras_that_users_are_pointed_to_exist(setup):
    extras = set(setup["options.extras_require"])
    assert {"quantization", "serve", "colossalai", "demo", "test", "bench", "docs"} <= extras
    texts = [ROOT / "Makefile", ROOT / "README.md", *PACKAGE.rglob("*.py")]
    for text in texts:
        for found in re.findall(r"(?:lightning_rlhf|-e '?\.)\[([\w,-]+)\]", text.read_text(encoding="utf-8")):
            assert set(found.split(",")) <= extras, f"{text.relative_to(ROOT)} names the extra {found}"


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-4.51.txt"])
def test_constraints_pin_what_is_required(setup, constraints):
    pinned = pins(constraints)
    wanted = lines(setup["options"]["install_requires"])
    for extra in ("demo", "test", *(["scale"] if constraints == "constraints.txt" else [])):
        wanted += lines(setup["options.extras_require"][extra])
    missing = {project(r) for r in wanted if not r.startswith("#")} - set(pinned)
    assert missing == set()
    assert not [version for version in pinned.values() if "+" in version]


def test_both_ends_of_transformers_are_pinned():
    assert pins("constraints.txt")["transformers"].startswith("5.")
    assert pins("constraints-4.51.txt")["transformers"].startswith("4.51.")


def test_ci_runs_the_documented_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"demo", "test", "lint", "clean", ".venv"} <= make_targets()


def make_targets():
    return set(re.findall(r"^(\S+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_tests_that_the_makefile_names_exist():
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    lists = re.findall(r"\$\(addprefix tests/,([^)]*)\)", text)
    named = [name for found in lists for name in found.split()]
    assert len(lists) >= 4
    assert not [name for name in named if not (ROOT / "tests" / name).exists()]


FORGE = [f.relative_to(ROOT).as_posix() for f in sorted((ROOT / ".github").rglob("*.yml"))]


@pytest.mark.parametrize("name", [".pre-commit-config.yaml", "CITATION.cff", *FORGE])
def test_what_the_forge_reads_parses_and_calls_targets_that_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    steps = [s for job in yaml.safe_load(text).get("jobs", {}).values() for s in job["steps"]]
    called = {word for step in steps for word in re.findall(r"make ([\w-]+)", step.get("run", ""))}
    assert called <= make_targets()
    assert bool(called) == ("workflows" in name)
    assert not re.search(r"pypi\.org|pythonhosted|pytorch\.org|index-url http", text)


def test_the_citation_has_the_version(setup):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == setup["metadata"]["version"]
    assert cited["repository-code"] in setup["metadata"]["project_urls"]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "AGENTS.md"])
def test_what_contributors_are_told_to_run_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= make_targets()
    for path in re.findall(r"(?:tests|configs|benchmarks|docs|lightning_rlhf)/[\w/.]+", text):
        assert (ROOT / path).exists(), path
