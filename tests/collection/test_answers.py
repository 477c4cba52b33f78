"""Answers that can be used, and what is wrong with others."""

import pytest

from lightning_rlhf.collection.answers import Writing, answer_request, read_answer
from lightning_rlhf.endpoint import Reply


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (Reply("k", " Paris.\n", "stop"), ("Paris.", None)),
        (Reply("k", "Paris is", "length"), ("Paris is", "cut")),
        (Reply("k", " \n", "stop"), ("", "empty")),
        (Reply("k", None, problem="HTTP 400", kind="http_400"), ("", "http_400")),
        (Reply("k", None), ("", "no reply")),
    ],
)
def test_answers(reply, found):
    assert read_answer(reply) == found


def test_a_request_has_the_settings():
    request = answer_request(Writing(0.5, 0.9, 100), "en", "Why?", seed=7)
    body = request.body("m")
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (0.5, 0.9, 100, 7)
    assert body["messages"][-1] == {"role": "user", "content": "Why?"} and "stop" not in body


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1}, "temperature must be between 0 and 2; got -1"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1; got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        Writing(**wrong)
