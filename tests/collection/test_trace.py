"""Steps that are written once and read back, and folders that are refused."""

import pytest

from lightning_rlhf.collection.trace import Trace, TraceError, write_atomically


def test_a_step_comes_back_and_another_does_not(tmp_path):
    trace = Trace(tmp_path / "trace", {"seed": 0})
    assert trace.read(1) is None
    assert trace.write(1, {"rows": ["ä 中 \ud800"]}) == {"rows": ["ä 中 \ud800"]}
    assert Trace(tmp_path / "trace", {"seed": 0}).read(1) == {"rows": ["ä 中 \ud800"]} and trace.read(2) is None
    assert sorted(path.name for path in (tmp_path / "trace").iterdir()) == ["settings.json", "step-00001.json"]


def test_other_settings_are_refused_by_name(tmp_path):
    Trace(tmp_path / "trace", {"seed": 0, "novelty": 0.7})
    with pytest.raises(
        TraceError, match=r"was begun with other settings: novelty\. Restore them, choose another --out"
    ):
        Trace(tmp_path / "trace", {"seed": 0, "novelty": 0.5})


def test_a_damaged_step_is_refused_by_name(tmp_path):
    trace = Trace(tmp_path, {})
    trace.write(1, {"rows": []})
    path = tmp_path / "step-00001.json"
    whole = path.read_text()
    for broken in (whole[:-5], "", "[]", whole.replace('"rows": []', '"rows": [1]')):
        path.write_text(broken)
        with pytest.raises(TraceError, match=r"step-00001\.json is damaged .*Delete it and all later steps"):
            trace.read(1)


def test_settings_that_cannot_be_read_are_refused(tmp_path):
    trace = Trace(tmp_path, {})
    trace.write(1, {})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(TraceError, match=r"settings\.json can't be read"):
        Trace(tmp_path, {})
    (tmp_path / "settings.json").write_text('{"version": 99, "settings": {}}')
    with pytest.raises(TraceError, match=r"has version 99, and this program reads 1"):
        Trace(tmp_path, {})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(TraceError, match=r"has steps but no settings\.json"):
        Trace(tmp_path, {})


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_atomically(path, ["old"])

    def parts():
        yield "new"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, parts())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
