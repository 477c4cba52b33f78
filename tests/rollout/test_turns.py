"""Episodes: which tokens they have, that they equal a plain loop, and what an environment may not do."""

import os
import pickle
import sys
import threading
import time
from itertools import chain

import pytest
import torch
from talkative import Talkative
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf.data import PromptBatch
from lightning_rlhf.data.tokens import encode_prompt
from lightning_rlhf.models import Policy
from lightning_rlhf.rl.environments import Calculator, GuessNumber
from lightning_rlhf.rollout import (
    CachedEngine,
    Environment,
    HFGenerateEngine,
    Request,
    Sampling,
    Turn,
    TurnError,
    play_episodes,
    read_openings,
    sample_key,
)


@pytest.fixture(scope="module")
def speakers(tiny_model_dir):
    """A policy whose answers differ, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.data.mul_(3 if "embed" in name else 8)
    return Policy(model), AutoTokenizer.from_pretrained(tiny_model_dir)


def batch(tokenizer, n=3, **columns):
    messages = [[{"role": "user", "content": f"Say {i} " + "fox " * i}] for i in range(n)]
    ids = [encode_prompt(tokenizer, m) for m in messages]
    return PromptBatch(ids, messages, tuple(range(10, 10 + n)), columns, n)


def play(speakers, environment, n=3, samples=2, engine=None, most=150, sampling=None, **options):
    policy, tokenizer = speakers
    sampling = sampling or Sampling(max_new_tokens=12, stop_strings=("e", "o", "a"))
    keys = [[100 * i + j for j in range(samples)] for i in range(n)]
    with torch.no_grad():
        return play_episodes(engine or CachedEngine(), policy, tokenizer, environment, batch(tokenizer, n), keys,
                             sampling, [tokenizer.eos_token_id], most, **options)  # fmt: skip


def test_an_episode_has_the_tokens_of_both_and_the_log_probs_of_the_policy(speakers):
    policy, tokenizer = speakers
    found = [c for group in play(speakers, Talkative(), samples=4) for c in group]
    several = [c for c in found if not all(c.episode.sampled)]
    assert len(several) > 5 and {c.truncated for c in found} == {True, False}
    for c in found:
        episode = c.episode
        assert len(episode.sampled) == len(c.input_ids) and sum(episode.sampled) == len(c.logprobs)
        assert episode.sampled[0] and episode.sampled[-1]
        assert [t["role"] for t in episode.turns] == (["assistant", "user"] * 9)[: len(episode.turns)]
        rows = torch.tensor([[*episode.prompt, *c.input_ids]])
        logprobs = policy.model(rows).logits[0].float().log_softmax(-1)
        first = len(episode.prompt)
        want = [logprobs[first + i - 1, t].item() for i, t in enumerate(c.input_ids) if episode.sampled[i]]
        assert c.logprobs == pytest.approx(want, abs=1e-4)
        for turn in episode.turns:
            assert ("[user] " if turn["role"] == "user" else "") + turn["content"] in c.text
    whole = tokenizer.decode([*several[0].episode.prompt, *several[0].input_ids])
    said = next(t["content"] for t in several[0].episode.turns if t["role"] == "user")
    assert f"<|im_end|>\n<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n" in whole
    assert "Say a<|im_end|>" in whole  # the environment's system turn


@pytest.mark.parametrize(
    "engine", [CachedEngine(), CachedEngine(max_rows=2), HFGenerateEngine()], ids=["cached", "few rows", "generate"]
)
def test_greedy_episodes_equal_a_plain_loop_of_generate(speakers, engine):
    policy, tokenizer = speakers
    sampling = Sampling(max_new_tokens=12, temperature=0.0, logit_bias={tokenizer.eos_token_id: 6.0})
    found = play(speakers, Talkative(), samples=1, engine=engine, sampling=sampling)
    lengths = []
    for prompts, key, (c,) in zip(batch(tokenizer).messages, (0, 100, 200), found, strict=True):
        env = Talkative()
        opening = env.reset({"messages": prompts}, sample_key(key, 0))
        ids = start = tokenizer.apply_chat_template(opening, add_generation_prompt=True, return_dict=False)
        messages, sampled, reward = list(opening), [], 0.0
        while True:
            bias = {(tokenizer.eos_token_id,): 6.0}
            out = policy.model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                                        do_sample=False, max_new_tokens=12, sequence_bias=bias)[0].tolist()  # fmt: skip
            sampled += [True] * (len(out) - len(ids))
            text = tokenizer.decode(out[len(ids) :], skip_special_tokens=True)
            ids = out
            if ids[-1] != tokenizer.eos_token_id:
                break
            turn = env.step(messages, text)
            reward += turn.reward
            if turn.done:
                break
            messages += [{"role": "assistant", "content": text}, *turn.messages]
            said = f"\n<|im_start|>user\n{turn.messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
            new = tokenizer(said, add_special_tokens=False).input_ids
            ids, sampled = [*ids, *new], [*sampled, *[False] * len(new)]
        assert [*c.episode.prompt, *c.input_ids] == ids and c.episode.prompt == start
        assert c.episode.sampled == sampled and c.episode.reward == pytest.approx(reward)
        lengths.append(sampled.count(False))
    assert any(lengths)


def test_an_episode_depends_neither_on_the_others_nor_on_the_engines_batches(speakers):
    whole = play(speakers, Talkative())
    threads = Talkative()
    threads.parallel, threads.deadline = 3, 60.0
    assert play(speakers, threads) == whole
    assert_alike(play(speakers, Talkative(), engine=CachedEngine(max_rows=1)), whole)
    assert_alike(play(speakers, Talkative(), n=1), whole[:1])


def assert_alike(found, want):
    """The same completions, but for rounding of log-probs."""
    for one, other in zip(chain(*found), chain(*want), strict=True):
        assert one._replace(logprobs=[]) == other._replace(logprobs=[])
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_what_a_policy_reads_first_can_be_read_without_it(speakers):
    policy, tokenizer = speakers
    for game in (GuessNumber(high=20), Calculator(), Calculator(shown=False)):
        prompts = batch(tokenizer, 3, answer=["4", "5", "6"], high=[5, None, 9])
        keys = [[7, 8], [9, 10], [11, 12]]
        found = play_episodes(CachedEngine(), policy, tokenizer, game, prompts, keys, Sampling(max_new_tokens=2), [4])
        want = [completions[0].episode.prompt for completions in found]
        assert read_openings(tokenizer, game, prompts, [7, 9, 11], [4]) == want


def test_one_turn_is_what_the_engine_samples_without_an_environment(speakers):
    policy, tokenizer = speakers

    class Once(Environment):
        def reset(self, row, seed):
            return row["messages"]

        def step(self, messages, text):
            return Turn(reward=1, done=True)

    sampling = Sampling(max_new_tokens=8)
    requests = [Request(ids, [100 * i, 100 * i + 1]) for i, ids in enumerate(batch(tokenizer).prompts)]
    want = CachedEngine().generate(policy, tokenizer, requests, sampling, [tokenizer.eos_token_id])
    found = play(speakers, Once(), sampling=sampling)
    assert_alike([[c._replace(episode=None) for c in g] for g in found], [[c._replace(alternatives=()) for c in g]
                                                                           for g in want])  # fmt: skip
    assert {c.episode.reward for g in found for c in g} <= {0.0, 1.0}


def test_no_limit_is_passed_and_what_it_cuts_is_truncated(speakers):
    for most in (12, 25, 40):
        found = [c for g in play(speakers, Talkative(most=9), samples=3, most=most) for c in g]
        assert all(len(c.input_ids) <= most and c.episode.sampled[-1] for c in found)
        assert any(c.truncated and len(c.input_ids) < most for c in found) or most == 12
    found = [c for g in play(speakers, Talkative(most=99), most=None) for c in g]  # until the context is full
    assert all(c.truncated and len(c.episode.prompt) + len(c.input_ids) <= 256 for c in found)
    with pytest.raises(TurnError, match=r"row 10 of .* may have \d+, over 60: the budget\. Set rollout\.max_total_tok"):
        play(speakers, Talkative(), most=50, limits={"the budget": 60})


# ------------------------------------------------------------------------------------------------- what it refuses


def environment(reset=None, step=None):
    class Made(Environment):
        def reset(self, row, seed):
            return row["messages"] if reset is None else reset(self, row, seed)

        def step(self, messages, text):
            return Turn(done=True) if step is None else step(self, messages, text)

    return Made()


def say(*messages, **more):
    return lambda *_: Turn([*messages], **more)


def fails(*_):
    raise KeyError("no such thing")


def leaves(*_):
    sys.exit(3)


@pytest.mark.parametrize(
    ("reset", "step", "message"),
    [
        (fails, None, r"Made, row 10 of the prompts: KeyError: 'no such thing' \(.*test_turns.py:\d+\)"),
        (None, fails, r"Made, row 10 of the prompts: KeyError: 'no such thing' \(.*test_turns.py:\d+\)"),
        (None, leaves, r"Made, row 10 of the prompts: SystemExit: 3 \(.*test_turns.py:\d+\)"),
        (None, lambda *_: ("a", 1.0), r"step returned \('a', 1.0\). Return Turn\(messages, reward, done\)"),
        (None, lambda *_: None, r"step returned None. Return Turn"),
        (None, say(), r"step returned no messages and the episode is not done"),
        (None, say({"role": "judge", "content": "a"}), r"with the role 'judge'. Choose one of: user, tool, system"),
        (None, say({"role": "assistant", "content": "a"}), r"with the role 'assistant'. Choose one of: user, tool"),
        (None, say({"role": "user", "content": 3}), r"step returned the message .* It needs a role, and a text"),
        (None, lambda *_: Turn("hello"), r"step returned 'hello' for messages. Return a list of \{role, content\}"),
        (None, say(reward=float("nan"), done=True), r"step returned the reward nan, which is not a finite number"),
        (None, say(reward="1", done=True), r"step returned the reward '1', which is not a finite number"),
        (None, say(reward=10**400, done=True), r"step returned the reward 10+.*, which is not a finite number"),
        (None, say(done="no"), r"step returned done='no'. Return True or False"),
        (None, say(done=torch.tensor([True, False])), r"step returned done=tensor.*. Return True or False"),
        (lambda *_: [], None, r"reset returned no messages\."),
        (lambda *_: "Hi", None, r"reset returned 'Hi' for messages"),
        (lambda self, row, seed: [{"role": "user", "content": f"{time.perf_counter_ns()}"}], None,
         r"reset returned other messages for another completion of this prompt. Draw by the seed alone"),
        (lambda self, row, seed: [{"role": "user", "content": "fox " * 300}], None, r"fills the model's context"),
    ],
)  # fmt: skip
def test_what_an_environment_does_wrong_is_named_with_its_row(speakers, reset, step, message):
    with pytest.raises(TurnError, match=message) as error:
        play(speakers, environment(reset, step), sampling=Sampling(max_new_tokens=12, stop_strings=("e", "o", "a")))
    assert "\n" not in str(error.value) and "row 10 of the prompts" in str(error.value)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("parallel", [1, 2])
def test_a_fork_of_an_environment_does_not_go_on_as_a_second_run(speakers, parallel):
    children = []

    def forks(*_):
        if not children:
            children.append(os.fork())
            if not children[0]:
                raise KeyError("also where the child fails")
        return Turn(done=True)

    made = environment(step=forks)
    made.parallel = parallel
    play(speakers, made, sampling=Sampling(max_new_tokens=12, stop_strings=("e", "o", "a")))
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1


def test_a_template_that_refuses_the_messages_is_named_with_the_row(speakers):
    _, tokenizer = speakers
    old = tokenizer.chat_template
    refusal = "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    tokenizer.chat_template = old.replace("{% for m in messages %}", "{% for m in messages %}" + refusal)
    try:
        with pytest.raises(TurnError, match=r"row 10 .* what can't be shown to the policy: .*no tools here"):
            play(speakers, environment(step=say({"role": "tool", "content": "a"})))
    finally:
        tokenizer.chat_template = old


def test_plain_texts_have_no_turns(speakers):
    policy, tokenizer = speakers
    prompts = PromptBatch([[5, 6]], ["Say"], (4,), {}, 1)
    with pytest.raises(TurnError, match=r"row 4 of the prompts: its prompt is a plain text.*data\.as_text to false"):
        play_episodes(CachedEngine(), policy, tokenizer, Talkative(), prompts, [[1]], Sampling(max_new_tokens=4), [4])


def test_an_environment_that_hangs_ends_the_run(speakers):
    released = threading.Event()
    slow = environment(step=lambda *_: released.wait(60))
    slow.deadline = 0.2
    try:
        with pytest.raises(TurnError, match=r"row 10 .* did not return within its deadline of 0\.2 seconds"):
            play(speakers, slow)
    finally:
        released.set()


def interrupts(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("step", "told"), [(leaves, "SystemExit: 3"), (interrupts, "KeyboardInterrupt: ")])
def test_an_environment_that_leaves_a_thread_ends_the_run(speakers, step, told):
    gone = environment(step=step)
    gone.parallel = 2
    with pytest.raises(TurnError, match=rf"row 10 .* {told}"):
        play(speakers, gone)


def test_episodes_step_at_the_same_time(speakers):
    together = threading.Barrier(3)

    def step(*_):
        together.wait(60)
        return Turn(done=True)

    met = environment(step=step)
    met.parallel, met.deadline = 3, 50.0
    sampling = Sampling(max_new_tokens=4, logit_bias={4: 100.0})  # every turn stops at once
    assert len(play(speakers, met, samples=1, sampling=sampling)) == 3


class Silent(Talkative):
    """Is not to be called."""

    def reset(self, row, seed):
        raise AssertionError

    step = reset


def test_one_rank_of_a_copy_calls_the_environment_and_all_go_on_alike(speakers, monkeypatch):
    said = []

    def first(compute, together=False):
        said.append(pickle.dumps(compute()))
        return pickle.loads(said[-1])

    monkeypatch.setattr("lightning_rlhf.rollout.turns.once_per_copy", first)
    want = play(speakers, Talkative())
    heard = iter(list(said))
    monkeypatch.setattr("lightning_rlhf.rollout.turns.once_per_copy", lambda *_, **__: pickle.loads(next(heard)))
    assert play(speakers, Silent()) == want and len(said) > 2
