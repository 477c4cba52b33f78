"""MkDocs hook: docstrings name other objects as Sphinx does; here that becomes plain code."""

import re

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>(~?)([^<]+)</code>")


def on_page_content(html: str, **_: object) -> str:
    """Turns ``:class:`~package.Name``` into ``Name``, and without the tilde into the whole path."""
    return ROLE.sub(lambda found: f"<code>{found[2].rpartition('.')[2] if found[1] else found[2]}</code>", html)
