"""The error of data, where nothing else is imported: Lightning's import brings the planner's with it."""


class DataError(ValueError):
    """Data that can't be used, in words that need no traceback."""
