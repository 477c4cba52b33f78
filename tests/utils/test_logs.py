"""Levels of loggers, for a while."""

import logging

import pytest

from lightning_rlhf.utils.logs import errors_only


def test_levels_are_those_of_before_though_it_fails():
    names, levels = ("some.library", "another"), (logging.INFO, logging.NOTSET)
    for name, level in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(level)
    with pytest.raises(KeyError), errors_only(*names):
        assert not logging.getLogger("some.library.part").isEnabledFor(logging.WARNING)
        assert logging.getLogger("another").isEnabledFor(logging.ERROR)
        raise KeyError
    assert tuple(logging.getLogger(name).level for name in names) == levels
