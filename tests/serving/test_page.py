"""The files of the chat page: their headers, their texts, and what they are made of."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from in_loop import in_loop

from lightning_rlhf.serving.guard import Access
from lightning_rlhf.serving.page import STATIC, page_paths

ROOT = Path(__file__).resolve().parents[2]
OWN = [path for path in STATIC.iterdir() if path.suffix in (".html", ".css", ".js", ".svg")]
SCRIPTS = [path for path in OWN if path.suffix == ".js"]


@in_loop
async def test_files_come_with_a_policy_and_need_no_key(running):
    async with running(access=Access(api_key="secret")) as app:
        assert len(page_paths()) > 12
        for path in page_paths():
            found = await app.client.get(path)
            policy = found.headers["content-security-policy"]
            assert found.status_code == 200 and "default-src 'none'" in policy
            assert "require-trusted-types-for 'script'; trusted-types dompurify" in policy
            assert "unsafe" not in policy and "http" not in policy and "data:" not in policy
            assert found.headers["x-content-type-options"] == "nosniff"
            again = await app.client.get(path, headers={"if-none-match": found.headers["etag"]})
            assert again.status_code == 304 and not again.content
        types = {path: (await app.client.get(path)).headers["content-type"] for path in ("/", "/static/app.js")}
        assert types == {"/": "text/html; charset=utf-8", "/static/app.js": "text/javascript; charset=utf-8"}
        assert (await app.client.get("/v1/models")).status_code == 401, "the rest does"


@pytest.mark.parametrize("path", ["/static/", "/static/no.js", "/static/../page.py", "/static/%2e%2e/page.py", "/x"])
@in_loop
async def test_no_other_file_is_served(running, path):
    async with running() as app:
        assert (await app.client.get(path)).status_code == 404


def test_nothing_is_inline_and_nothing_is_from_elsewhere():
    for path in OWN:
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://\w|@import|url\(", text), path
    html = (STATIC / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", html)
    for path in SCRIPTS:
        sinks = re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", path.read_text()
        )
        assert sinks == [], path


def texts():
    """The keys of each language, read from the module itself."""
    source = (STATIC / "i18n.js").read_text("utf-8")
    blocks = re.split(r"^  (\w\w): \{$", source, flags=re.MULTILINE)[1:]
    return {
        name: re.findall(r"(?<![\w\"])(\w+): (?=[\"\[])", block)
        for name, block in zip(blocks[::2], blocks[1::2], strict=True)
    }


def test_both_languages_have_all_texts_and_no_others():
    found = texts()
    assert sorted(found) == ["en", "zh"] and found["en"] == found["zh"]
    assert len(found["en"]) == len(set(found["en"])) > 100
    sources = "".join(path.read_text("utf-8") for path in OWN if path.name != "i18n.js")
    used = set(re.findall(r"\bt\(\"(\w+)\"", sources)) | set(
        re.findall(r"data-(?:t|label|placeholder)=\"(\w+)\"", sources)
    )
    assert used <= set(found["en"])
    unused = [key for key in found["en"] if not re.search(rf"[\"`.]{key}\b|\b{key.removesuffix('Hint')}\b", sources)]
    assert unused == []


def test_the_bundle_is_that_of_the_lock_file():
    lock = json.loads((ROOT / "web" / "package-lock.json").read_text())["packages"]
    notices = (STATIC / "vendor" / "vendor.txt").read_text("utf-8")
    versions = dict(re.findall(r"^([\w.-]+) (\d[\w.]*) \(", notices, re.MULTILINE))
    assert versions == {
        name: lock[f"node_modules/{name}"]["version"] for name in ("dompurify", "highlight.js", "marked")
    }
    assert "Permission is hereby granted" in notices and "Redistribution and use" in notices and "Apache" in notices
    assert (STATIC / "vendor" / "vendor.js").stat().st_size < 200_000


def test_the_package_has_all_files():
    tracked = subprocess.run(["git", "ls-files", STATIC], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not tracked:
        pytest.skip("this is no git checkout")
    patterns = re.search(r"^lightning_rlhf.serving = (.*)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE).group(1)
    matched = {path for pattern in patterns.split(", ") for path in STATIC.parent.glob(pattern) if path.is_file()}
    assert matched == {ROOT / name for name in tracked.split()}
