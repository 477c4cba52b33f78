"""Prompts that are solved several times in a row rest."""

import pytest

from lightning_rlhf.rl import Groups
from lightning_rlhf.rl.curriculum import Curriculum


def test_a_prompt_rests_after_it_was_solved_in_a_row():
    curriculum = Curriculum(Groups(rest_after=2, rest_for=3))
    for iteration, solved in enumerate([True, False, True, True]):
        assert curriculum.awake([7, 8], iteration) == ([0, 1], 0)
        curriculum.note([7, 8], [solved, False], iteration)
    for iteration in (4, 5, 6):
        assert curriculum.awake([7, 8], iteration) == ([1], 1)
    assert curriculum.awake([7, 8], 7) == ([0, 1], 0)
    curriculum.note([7], [True], 7)  # it is counted anew
    assert curriculum.awake([7, 8], 8) == ([0, 1], 0) and curriculum.solved == {7: 1}


def test_where_all_prompts_would_rest_none_does():
    curriculum = Curriculum(Groups(rest_after=1))
    curriculum.note([1, 2], [True, True], 0)
    assert curriculum.awake([1, 2], 1) == ([0, 1], 0) and curriculum.awake([1, 2, 3], 1) == ([2], 2)


def test_its_state_is_all_that_it_knows():
    curriculum, other = (Curriculum(Groups(rest_after=2, rest_for=9)) for _ in range(2))
    curriculum.note([1, 2, 1], [True, True, True], 4)
    other.load_state_dict(curriculum.state_dict())
    assert other.solved == {2: 1} and other.resting == {1: 13}
    curriculum.note([2], [True], 5)
    assert other.resting == {1: 13}


def test_a_run_that_goes_on_without_it_lets_no_prompt_rest():
    before, after = Curriculum(Groups(rest_after=1)), Curriculum(Groups())
    before.note([1], [True], 0)
    after.load_state_dict(before.state_dict())
    assert after.awake([1, 2], 1) == ([0, 1], 0) and after.state_dict() == {"solved": {}, "resting": {}}


def test_without_it_nothing_is_counted():
    curriculum = Curriculum(Groups())
    curriculum.note([1], [True], 0)
    assert not curriculum.solved and not curriculum.resting


def test_settings_check_themselves():
    with pytest.raises(ValueError, match=r"groups\.rest_after must be at least 1"):
        Groups(rest_after=0)
