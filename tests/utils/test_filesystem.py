"""A directory is there whole, or as it was."""

import errno
import os

import pytest

from lightning_rlhf.utils import filesystem


@pytest.mark.parametrize("swaps", [True, False])
def test_a_directory_is_replaced_whole(swaps, tmp_path, monkeypatch):
    if not swaps:
        monkeypatch.setattr(filesystem, "_exchange", lambda one, other: False)
    for text in ("one", "two"):
        with filesystem.atomic_directory(tmp_path / "d") as folder:
            (folder / "file").write_text(text)
            assert not (tmp_path / "d" / "file").exists() or (tmp_path / "d" / "file").read_text() == "one"
    assert (tmp_path / "d" / "file").read_text() == "two" and (tmp_path / "d" / filesystem.COMPLETE).exists()
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_directory_left_between_two_renames_comes_back(tmp_path):
    with filesystem.atomic_directory(tmp_path / "d") as folder:
        (folder / "file").write_text("one")
    (tmp_path / "d").rename(tmp_path / ".d.old")
    with pytest.raises(OSError, match="full"), filesystem.atomic_directory(tmp_path / "d"):
        raise OSError("disk full")
    assert (tmp_path / "d" / "file").read_text() == "one"


def test_what_was_not_written_here_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not an export"), filesystem.atomic_directory(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").exists()


def test_a_file_that_can_not_be_written_is_told_and_the_check_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    for path, kind, reason in [
        (tmp_path / "file" / "x.jsonl", NotADirectoryError, f"{tmp_path}/file is a file"),
        (tmp_path, IsADirectoryError, "it is a directory"),
        ("/proc/nowhere/x.jsonl", OSError, ""),
    ]:
        with pytest.raises(kind) as error:
            filesystem.check_writable(path, "Report", "its path")
        assert str(error.value).startswith(f"Report: {path} can't be written: {reason}")
        assert str(error.value).endswith(". Set its path to another path.")
    filesystem.check_writable(tmp_path / "a" / "b" / "x.jsonl", "Report", "its path")
    filesystem.check_writable(tmp_path / "file", "Report", "its path")
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_told_with_the_path_and_the_old_file_stays(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    monkeypatch.setattr(filesystem, "sync", full)
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*rows\.jsonl'"),
        filesystem.atomic_file(path) as file,
    ):
        file.write("new")
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_files_are_moved_aside_under_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    assert filesystem.move_aside(path) is None
    for number in (1, 2):
        path.write_text(str(number))
        assert filesystem.move_aside(path) == tmp_path / f"x.{number}.jsonl"
    assert [p.read_text() for p in sorted(tmp_path.iterdir())] == ["1", "2"]
