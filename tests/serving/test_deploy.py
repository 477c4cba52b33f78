"""The files of ``deploy/``: the image's steps, its health check, and the command lines that start the server."""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from lightning_rlhf.serving.command import _KEY_VARIABLE, _check, _parser
from lightning_rlhf.serving.limits import Limits
from lightning_rlhf.serving.listen import _GRACE

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("LIGHTNING_RLHF_TEST_INSTALL")
NOBODY = 65534


@pytest.fixture(scope="module")
def image():
    """The instructions of the Dockerfile: (name, the rest)."""
    lines = [line for line in (ROOT / "deploy/Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [tuple(line.split(None, 1)) for line in joined if line]


def last(image, name):
    return [rest for found, rest in image if found == name][-1]


def variables(image):
    """ARG and ENV."""
    return dict(part.split("=", 1) for name, rest in image if name in ("ARG", "ENV") for part in shlex.split(rest))


def health_check(image, url):
    command = json.loads(last(image, "HEALTHCHECK").split("CMD ")[1])
    assert "http://127.0.0.1:8000/" in command[-1]
    return [sys.executable, *command[1:-1], command[-1].replace("http://127.0.0.1:8000", url)]


def test_image_is_slim_and_its_server_is_not_root(image):
    assert image[0] == ("FROM", "python:3.11-slim")
    names = [name for name, _ in image]
    assert last(image, "USER") == "serve" and names.index("USER") > max(i for i, n in enumerate(names) if n == "RUN")
    ignore = (ROOT / ".dockerignore").read_text().split()
    for name, rest in image:
        for source in rest.split()[:-1] if name == "COPY" else ():
            assert (ROOT / source).exists()
            assert any(Path(source).match(entry[1:]) for entry in ignore if entry.startswith("!")), source
    assert not [name for name in variables(image) if re.search("KEY|TOKEN(?!IZERS)|SECRET|PASSWORD", name)]


def test_health_check_of_the_image_runs(image, server):
    assert subprocess.run(health_check(image, server.url)).returncode == 0
    gone = subprocess.run(health_check(image, "http://127.0.0.1:1"), capture_output=True)
    assert gone.returncode == 1


def test_image_starts_with_a_key_only(image, monkeypatch):
    monkeypatch.delenv(_KEY_VARIABLE, raising=False)
    command = [*json.loads(last(image, "ENTRYPOINT")), *json.loads(last(image, "CMD"))]
    assert command[:2] == ["lightning-rlhf", "serve"]
    options = _parser().parse_args(command[2:])
    assert (options.run, options.host, options.port) == ("runs/start", "0.0.0.0", int(last(image, "EXPOSE")))
    with pytest.raises(ValueError, match="--api-key"):
        _check(options)
    monkeypatch.setenv(_KEY_VARIABLE, "k")
    _check(options)
    assert options.api_key == "k"


def test_compose_file_fits_the_image(image):
    [service] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"].values()
    context = (ROOT / "deploy" / service["build"]["context"]).resolve()
    assert context == ROOT and (context / service["build"]["dockerfile"]).is_file()
    assert service["ports"] == [f"127.0.0.1:8000:{last(image, 'EXPOSE')}"]
    assert service["volumes"] == [f"../runs:{last(image, 'WORKDIR')}/runs"]
    assert service["environment"][_KEY_VARIABLE].startswith(f"${{{_KEY_VARIABLE}:?"), "it asks for a key"
    assert float(service["stop_grace_period"][:-1]) > Limits.drain_seconds + _GRACE


def test_systemd_unit_starts_the_server(image):
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string((ROOT / "deploy/lightning-rlhf.service").read_text())
    service = unit["Service"]
    command = shlex.split(service["ExecStart"].replace("${RUN}", "/srv/runs/start").replace("$OPTIONS", ""))
    assert [Path(command[0]).name, command[1]] == ["lightning-rlhf", "serve"]
    options = _parser().parse_args(command[2:])
    _check(options)
    assert (options.run, options.host) == ("/srv/runs/start", "127.0.0.1")
    assert options.votes.startswith(service["WorkingDirectory"]) and service["DynamicUser"] == "yes"
    assert float(service["TimeoutStopSec"]) > Limits.drain_seconds + _GRACE
    assert int(service["LimitNOFILE"]) > Limits.max_connections


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    PYTHON is None or os.getuid() != 0,
    reason="installs packages: run it as root, with LIGHTNING_RLHF_TEST_INSTALL naming a python that others can run",
)
def test_steps_of_the_image_give_a_server_that_is_not_root(image, tmp_path_factory):
    """In a folder in place of the image's root, as a user without rights; RUN lines that make users are left out."""
    root = Path(shutil.os.path.realpath("/tmp")) / f"image-{os.getpid()}"
    places = {"/opt/venv": f"{root}/venv", "/src": f"{root}/src", "/work": f"{root}/work"}

    def moved(text):
        for place, other in places.items():
            text = re.sub(rf"(?<![\w/]){place}\b", other, text)
        return text

    for folder in ("bin", "src", "work/runs"):
        (root / folder).mkdir(parents=True)
    (root / "bin/python").symlink_to(PYTHON)
    for _, rest in (found for found in image if found[0] == "COPY"):
        *sources, to = rest.split()
        for source in sources:
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, root / "src" / to / ("" if (ROOT / source).is_file() else "."), **(
                {"dirs_exist_ok": True} if (ROOT / source).is_dir() else {}
            ))  # fmt: skip
    shutil.copytree(ROOT / "tests/assets/stories260K", root / "work/runs/start")
    subprocess.run(["chown", "-R", str(NOBODY), root], check=True)
    found = variables(image)
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    env = {**pip, **found, "HOME": str(root), "PATH": f"{root}/bin:/usr/bin:/bin"}
    env["TORCH"] = os.environ.get("TORCH", found["TORCH"])
    try:
        [install] = [rest for name, rest in image if name == "RUN" and "pip install" in rest]
        subprocess.run(["bash", "-ec", moved(install)], cwd=root / "src", env=env, user=NOBODY, check=True)
        env |= {"PATH": moved(found["PATH"]).replace("$PATH", "/usr/bin:/bin"), _KEY_VARIABLE: "k"}
        entry = [*json.loads(last(image, "ENTRYPOINT")), *json.loads(last(image, "CMD"))]
        entry[entry.index("--port") + 1] = "0"
        entry[0] = f"{root}/venv/bin/{entry[0]}"
        log = root / "log"
        with log.open("w") as out:
            process = subprocess.Popen(entry, cwd=root / "work", env=env, user=NOBODY, stdout=out, stderr=out)
        while "Listening on" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        url = log.read_text().split("Listening on ")[1].split()[0].replace("0.0.0.0", "127.0.0.1")
        assert f"Uid:\t{NOBODY}\t" in Path(f"/proc/{process.pid}/status").read_text()
        check = [f"{root}/venv/bin/python", *health_check(image, url)[1:]]
        assert subprocess.run(check, env=env, user=NOBODY).returncode == 0
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        assert httpx.post(f"{url}/v1/chat/completions", json=chat).status_code == 401
        with_key = httpx.post(f"{url}/v1/chat/completions", json=chat, headers={"Authorization": "Bearer k"})
        assert with_key.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        shutil.rmtree(root)
