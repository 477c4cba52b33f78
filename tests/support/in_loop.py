"""Async tests."""

import asyncio
import functools
import inspect


def in_loop(function):
    """Makes an async test a plain one."""

    @functools.wraps(function)
    def test(*args, **kwargs):
        asyncio.run(function(*args, **kwargs))

    test.__signature__ = inspect.signature(function)
    return test


def streamed(lines):
    """The objects of a stream of events, which must end with ``[DONE]``."""
    import json

    found = [line.removeprefix("data: ") for line in lines if line]
    assert found.pop() == "[DONE]"
    return [json.loads(line) for line in found]
