"""Settings are checked with messages for people; keys are well mixed."""

import jsonargparse
import pytest

from lightning_rlhf.rollout import Completion, Sampling


@pytest.mark.parametrize(
    "bad",
    [
        dict(max_new_tokens=0),
        dict(min_new_tokens=-1),
        dict(max_new_tokens=4, min_new_tokens=5),
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(repetition_penalty=0.0),
        dict(stop_strings=["a", ""]),
        dict(stop_strings="abc"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named(bad):
    with pytest.raises(ValueError, match=rf"sampling\.{list(bad)[-1]} must be"):
        Sampling(**bad)


def test_settings_come_from_yaml():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--sampling", type=Sampling, default=Sampling())
    parsed = parser.parse_args(["--sampling", '{"top_k": 5, "stop_strings": ["a", "。"]}'])
    assert (getattr(parser, "instantiate", None) or parser.instantiate_classes)(parsed).sampling == Sampling(
        top_k=5, stop_strings=("a", "。")
    )


def test_settings_can_be_compared_and_kept_in_sets():
    assert len({Sampling(stop_strings=["a"]), Sampling(stop_strings=("a",)), Sampling()}) == 2


def test_truncated_is_the_length_limit():
    assert Completion([1], [0.0], "", "length").truncated and not Completion([1], [0.0], "", "stop").truncated
