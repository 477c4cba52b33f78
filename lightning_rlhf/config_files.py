"""``lightning-rlhf configs``: the config files that come with the package."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from lightning_rlhf.arguments import Parser, did_you_mean


def folder() -> Path:
    """Where the config files are: inside an installed package, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "configs", here.parent / "configs") if path.is_dir())


def main(args: Sequence[str] | None = None) -> None:
    """Lists the config files that come with the package, or copies one of them to edit and run.

    Without arguments it prints each file's name and what its first sentence says.

    Args:
        args: Command line after ``configs``.
    """
    parser = Parser("configs", main.__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="file to copy, such as ppo/smollm2_lora.yaml")
    parser.add_argument(
        "directory",
        nargs="?",
        type=Path,
        default=Path("configs"),
        metavar="DIR",
        help="where the copy goes, under the same name; default configs. An existing file is never replaced",
    )
    options = parser.parse_args(args)
    source = folder()
    names = sorted(path.relative_to(source).as_posix() for path in source.glob("*/*.yaml"))
    if options.name is None:
        width = max(map(len, names))
        for name in names:
            print(f"{name:{width}}  {_about(source / name)}")
        return
    name = options.name.removeprefix("configs/")
    if name not in names:
        parser.error(
            f"there is no config {options.name}{did_you_mean(name, names)} `lightning-rlhf configs` lists all."
        )
    target = options.directory / name
    if target.exists():
        parser.error(f"{target} exists: remove it, or name another directory.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, target)
    print(target)


def _about(config: Path) -> str:
    """The first sentence of a file's comment, which may go on over lines; a command, which is indented, ends it."""
    text = config.read_text(encoding="utf-8").splitlines()
    lines = takewhile(lambda line: re.match("# [^ ]", line), text)
    return re.split(r"(?<!\bDr)\.(?: |$)", " ".join(line[2:] for line in lines))[0]
