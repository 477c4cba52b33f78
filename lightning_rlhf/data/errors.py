"""The error of data, in a module that imports nothing: the command line needs it early."""


class DataError(ValueError):
    """Data that can't be used. Its message needs no traceback."""
