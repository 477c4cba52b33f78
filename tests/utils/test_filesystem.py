"""A directory is there whole, or as it was."""

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
