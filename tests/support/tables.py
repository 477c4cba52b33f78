"""Tables that a script printed."""


def cells(text):
    """The cells of each row, without the line below a header."""
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    return [row.strip("| ").split(" | ") for row in rows]
