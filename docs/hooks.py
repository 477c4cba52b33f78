"""MkDocs hooks: notebooks become pages; what docstrings name as Sphinx does becomes plain code."""

import json
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>(~?)([^<]+)</code>")


def on_files(files: Files, config: object, **_: object) -> Files:
    """Adds a page for each notebook, as it is in the repository: without outputs."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page(path)))  # type: ignore[arg-type]
    return files


def page(path: Path) -> str:
    """A notebook as Markdown."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    parts.insert(1, f"*To run it, open `notebooks/{path.name}` of the repository in Jupyter.*")
    return "\n\n".join(parts) + "\n"


def on_page_content(html: str, **_: object) -> str:
    """Turns ``:class:`~package.Name``` into ``Name``, and without the tilde into the whole path."""
    return ROLE.sub(lambda found: f"<code>{found[2].rpartition('.')[2] if found[1] else found[2]}</code>", html)
