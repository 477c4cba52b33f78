"""Rewards by a function: what reaches it, and what of its answers is refused."""

import asyncio
import math
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from lightning_rlhf.callbacks.interrupt import Interrupted
from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.rewards import BadScores, FunctionReward, RewardError, Samples, WeightedReward, make_reward


def samples(prompts=("a", "b"), completions=("x", "yy"), **columns):
    trees = [Tree([5, 6], [Branch([7, 4])]) for _ in prompts]
    return Samples(pack(trees), list(prompts), list(completions), [False] * len(prompts), columns)


def by_length(prompts, completions, **columns):
    """A reward of this module, for import by path."""
    return [len(c) for c in completions]


def test_it_gets_lists_and_the_columns_that_it_names():
    seen = {}

    def f(prompts, completions, answer, other=None):
        seen.update(prompts=prompts, completions=completions, answer=answer, other=other)
        return torch.tensor([1, 2])

    scores = FunctionReward(f)(samples(answer=[3, None], unused=["u", "v"])).total
    assert scores.tolist() == [1.0, 2.0] and scores.dtype == torch.float32
    assert seen == {"prompts": ["a", "b"], "completions": ["x", "yy"], "answer": [3, None], "other": None}


def test_one_with_double_star_gets_all_columns():
    seen = {}

    def f(prompts, completions, **columns):
        seen.update(columns)
        return [0.0, 1.0]

    FunctionReward(f)(samples(a=[1, 2], b=[3, 4]))
    assert seen == {"a": [1, 2], "b": [3, 4]}


def test_what_it_does_to_its_lists_harms_nobody():
    def f(prompts, completions, answer):
        prompts.clear(), completions.clear(), answer.clear()
        return [0.0, 0.0]

    given = samples(answer=[1, 2])
    FunctionReward(f)(given)
    assert given.prompts == ["a", "b"] and given.completions == ["x", "yy"] and given.columns == {"answer": [1, 2]}


@pytest.mark.parametrize("path", ["statistics.mean", "statistics:mean"])
def test_import_paths(path):
    with pytest.raises(TypeError, match="must have the arguments prompts and completions"):
        FunctionReward(path)


@pytest.mark.parametrize("path", ["nowhere.f", "math.nothing", "f"])
def test_a_path_to_nothing(path):
    with pytest.raises(ImportError, match=r"import"):
        FunctionReward(path)


def test_a_path_to_no_function():
    with pytest.raises(TypeError, match=r"math\.pi is a float"):
        FunctionReward("math.pi")


@pytest.mark.parametrize("bad", [math.nan, math.inf, "good", 1e39, -1e39, 10**400, [1.0]])
def test_a_score_that_is_no_number_shows_its_sample(bad):
    def f(prompts, completions):
        return [1.0, bad]

    with pytest.raises(ValueError, match=r"(?s)function f returned .* not a finite number.*Prompt: 'b'.*'yy'"):
        FunctionReward(f)(samples())


def test_none_says_that_it_does_not_apply():
    def f(prompts, completions, truncated, completion_ids):
        assert truncated == [False, False] and completion_ids == [[7, 4], [7, 4]]
        return [1.0, None]

    reward = FunctionReward(f)
    scores = reward(samples())
    assert scores.total[0] == 1 and scores.total[1].isnan() and scores.absent.tolist() == [False, True]
    assert not reward.needs
    both = make_reward([WeightedReward(f, 2.0), WeightedReward(by_length, 0.5)], None)(samples())
    assert both.total.tolist() == [2.5, 1.0] and both.absent.tolist() == [False, False]
    alone = make_reward([WeightedReward(f), WeightedReward(by_length, 0.0)], None)(samples())
    assert alone.total[1].isnan() and alone.absent.tolist() == [False, True]


def test_a_wrong_number_of_scores():
    def f(prompts, completions):
        return [1.0]

    with pytest.raises(ValueError, match="f returned 1 scores for 2 completions"):
        FunctionReward(f)(samples())


def test_a_column_that_the_data_lack():
    def f(prompts, completions, answer):
        return [1.0, 1.0]

    with pytest.raises(
        ValueError, match="needs the column answer, or an option of that name; the prompts' rows have lang"
    ):
        FunctionReward(f)(samples(lang=["en", "zh"]))


def test_an_object_that_is_called():
    class Judge:
        def __call__(self, prompts, completions):
            return [len(c) for c in completions]

    assert FunctionReward(Judge())(samples()).total.tolist() == [1.0, 2.0]
    assert FunctionReward(by_length)(samples(z=[1, 2])).total.tolist() == [1.0, 2.0]


def test_bad_scores_bring_the_good_ones_along():
    def f(prompts, completions):
        return [math.nan, 2.5]

    with pytest.raises(BadScores, match="returned nan for completion 0, which") as error:
        FunctionReward(f)(samples())
    assert error.value.scores.total.isnan().tolist() == [True, False] and error.value.scores.total[1] == 2.5


def test_a_bad_score_names_the_prompts_row_and_how_many_more_there_are():
    def f(prompts, completions):
        return [1.0, math.inf, math.nan]

    given = Samples(pack([Tree([5], [Branch([7])] * 2), Tree([6], [Branch([7])])], rows=[31, 8]), ["a", "a", "b"],
                    ["x", "y" * 500, "z"], [False] * 3, {})  # fmt: skip
    with pytest.raises(BadScores, match=r"completion 1 \(row 31 of the prompts\) \(and 1 more\).*'yyy.*yy…\.$"):
        FunctionReward(f)(given)


@pytest.mark.parametrize("result", [{0: 1.0, 1: 2.0}, {1.0, 2.0}], ids=["dict", "set"])
def test_scores_that_are_in_no_order_are_refused(result):
    with pytest.raises(RewardError, match=r"returned \{.*\}; return a list of 2 numbers, one a completion"):
        FunctionReward(lambda prompts, completions: result)(samples())


def test_the_message_of_an_error_is_one_line_and_of_a_group_the_first_one():
    class Group(Exception):  # as ExceptionGroup, which Python 3.10 lacks
        exceptions = (KeyError("key\nof\nthe answer"), ValueError("another"))

    def broken(prompts, completions):
        raise Group("unhandled errors in a TaskGroup (2 sub-exceptions)")

    try:
        raise Group.exceptions[0]  # a member of a group was raised somewhere
    except KeyError:
        pass
    with pytest.raises(RewardError, match=r"completions: KeyError: .*the answer' \(.*test_function\.py:\d+\)$"):
        FunctionReward(broken)(samples())


def test_a_function_that_fails_is_named_with_the_place():
    def broken(prompts, completions):
        raise KeyError("boom")

    with pytest.raises(RewardError, match=r"broken failed on 2 completions: KeyError: .boom. \(.*:\d+\)"):
        FunctionReward(broken)(samples())


def test_dicts_bring_further_numbers():
    def f(prompts, completions):
        return [{"score": 1.0, "words": 3, "clean": True}, {"score": None, "words": None}]

    scores = FunctionReward(f)(samples())
    assert scores.total[0] == 1 and scores.absent.tolist() == [False, True]
    assert scores.extras["words"][0] == 3 and scores.extras["words"][1].isnan() and scores.extras["clean"][0] == 1
    both = make_reward([WeightedReward(f, name="mine"), WeightedReward(by_length)], None)(samples())
    assert list(both.extras) == ["mine/words", "mine/clean"] and both.total.tolist() == [2.0, 2.0]


def test_only_a_wrong_dict_is_written_out():
    """Hundreds of further numbers of each completion would take longer to write than a step."""

    class Silent(dict):
        def __repr__(self):
            raise AssertionError("written out")

    found = FunctionReward(lambda prompts, completions: [Silent(score=1, a=0.5, b=2), Silent(score=2, a=True)])
    extras = found(samples()).extras
    assert extras["a"].tolist() == [0.5, 1.0] and extras["b"][0] == 2 and extras["b"][1].isnan()


@pytest.mark.parametrize(
    ("score", "message"),
    [({"scor": 1}, "give it an entry score"), ({"score": 1, "why": "so"}, "'why' is 'so', and must be a number"),
     ({"score": 1, 2: 3}, "2 is 3, and must be a number that has a name")],
)  # fmt: skip
def test_a_dict_that_is_no_score_is_named(score, message):
    with pytest.raises(RewardError, match=message):
        FunctionReward(lambda prompts, completions: [1.0, score])(samples())


def test_a_bad_score_keeps_the_further_numbers():
    with pytest.raises(BadScores, match="returned nan for completion 1") as error:
        FunctionReward(lambda prompts, completions: [1.0, {"score": math.nan, "n": 2}])(samples())
    assert error.value.scores.extras["n"][1] == 2


def test_async_functions_are_awaited_on_one_loop():
    loops = []

    async def f(prompts, completions, iteration):
        loops.append(asyncio.get_running_loop())
        assert iteration == 7
        found = await asyncio.gather(*(asyncio.sleep(0, len(c)) for c in completions))
        return list(map(float, found))

    given = samples()
    given.iteration = 7
    reward = FunctionReward(f)
    assert reward(given).total.tolist() == [1.0, 2.0]

    async def notebook():  # a thread whose loop is running
        return reward(given).total.tolist()

    assert asyncio.run(notebook()) == [1.0, 2.0]
    assert loops[0] is loops[1]

    async def fails(prompts, completions):
        await asyncio.sleep(0)
        raise KeyError("a")

    with pytest.raises(RewardError, match=r"fails failed on 2 completions: KeyError: 'a' \(.*test_function\.py:\d+\)"):
        FunctionReward(fails)(samples())


def test_a_function_that_exits_is_an_error_and_no_end_of_the_run():
    def leaves(prompts, completions):
        sys.exit(0)

    with pytest.raises(RewardError, match=r"leaves failed on 2 completions: SystemExit: 0 \(.*:\d+\)"):
        FunctionReward(leaves)(samples())

    def interrupted(prompts, completions):
        raise Interrupted(signal.SIGTERM, "SIGTERM: stopped.")

    with pytest.raises(Interrupted):
        FunctionReward(interrupted)(samples())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_of_a_function_does_not_go_on_as_a_second_run(tmp_path):
    children = []

    def forks(prompts, completions):
        children.append(os.fork())
        if children == [0]:
            (tmp_path / "child").touch()
            raise KeyError("also where the child fails")
        return [1.0, 2.0]

    scores = FunctionReward(forks)(samples())
    with (tmp_path / "came back").open("a") as file:
        file.write("x")
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1 and scores.total.tolist() == [1.0, 2.0]
    assert (tmp_path / "child").exists() and (tmp_path / "came back").read_text() == "x"


def ended(child):
    """The exit code of a child; None where it does not end."""
    for _ in range(600):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("where", ["coroutine", "task", "thread", "failing"])
def test_a_fork_of_an_async_function_does_not_go_on_with_the_loop(tmp_path, where):
    children = []

    def fork():
        children.append(os.fork())
        if where == "failing" and not children[-1]:
            raise KeyError("in the child")
        return children[-1]

    async def task():
        fork()
        await asyncio.sleep(0)

    async def note():
        await asyncio.sleep(0.01)
        with (tmp_path / "came back").open("a") as file:
            file.write("x")

    async def forks(prompts, completions):
        other = asyncio.ensure_future(note())
        if where == "task":
            await asyncio.gather(task(), note())
        elif where == "thread":
            await asyncio.to_thread(fork)
        else:
            fork()
        await other
        return [1.0, 2.0]

    assert FunctionReward(forks)(samples()).total.tolist() == [1.0, 2.0]
    assert len(children) == 1 and ended(children[0]) == 1
    assert (tmp_path / "came back").read_text() == ("xx" if where == "task" else "x")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_async_function_may_use_processes():
    async def counts(prompts, completions):
        loop = asyncio.get_running_loop()
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            return [float(await loop.run_in_executor(pool, len, text)) for text in completions]

    found = samples()
    assert FunctionReward(counts)(found).total.tolist() == [float(len(text)) for text in found.completions]


def test_an_async_function_that_exits_is_an_error_and_the_loop_stays():
    async def leaves(prompts, completions):
        await asyncio.sleep(0)
        raise SystemExit(3)

    async def stays(prompts, completions):
        return [1.0, 2.0]

    with pytest.raises(RewardError, match="leaves failed on 2 completions: RuntimeError: it raised SystemExit: 3"):
        FunctionReward(leaves)(samples())
    assert FunctionReward(stays)(samples()).total.tolist() == [1.0, 2.0]


def test_a_generator_gives_scores_or_fails_as_a_function_does():
    def grows(prompts, completions, answer):
        for text, wanted in zip(completions, answer, strict=True):
            yield len(text) / wanted

    assert FunctionReward(grows)(samples(answer=[1, 2])).total.tolist() == [1.0, 1.0]
    with pytest.raises(RewardError, match="grows failed on 2 completions: ZeroDivisionError"):
        FunctionReward(grows)(samples(answer=[1, 0]))


def test_a_further_number_beyond_all_bounds_is_none():
    found = FunctionReward(lambda prompts, completions: [{"score": 1, "n": 10**400}, {"score": 2, "n": 3}])(samples())
    assert found.extras["n"].isnan().tolist() == [True, False]


def test_options_are_settings():
    def f(prompts, completions, factor, answer=None):
        return [len(c) * factor for c in completions]

    reward = make_reward([{"source": f, "options": {"factor": 3}}], None)
    assert reward.needs == set() and reward(samples(factor=[1, 1])).total.tolist() == [3.0, 6.0]
    with pytest.raises(ValueError, match=r"f has no option 'facto'; did you mean factor\? All: answer, factor"):
        make_reward([{"source": f, "options": {"facto": 3}}], None)
    with pytest.raises(ValueError, match=r"the options of f are 3: give \{name: value\}"):
        make_reward([{"source": f, "options": 3}], None)
    with pytest.raises(ValueError, match="the weight of f is nan: give a finite number"):
        make_reward([{"source": f, "weight": math.nan}], None)
