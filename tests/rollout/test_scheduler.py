"""A server's view: requests come at any time, tokens stream, callers leave, steps fail; nobody is left waiting."""

import asyncio
import threading
from concurrent.futures import CancelledError

import pytest
import torch

from lightning_rlhf.rollout import CachedEngine, Request, Sampling
from lightning_rlhf.rollout.kv_cache import Decoder


@pytest.fixture
def session(policy, tiny_tokenizer):
    with CachedEngine(max_rows=4).session(policy, tiny_tokenizer) as session:
        yield session


def finish(session):
    while session.busy:
        session.step()


def alone(policy, tokenizer, request, sampling, stops=()):
    (group,) = CachedEngine().generate(policy, tokenizer, [request], sampling, stops)
    return [completion.input_ids for completion in group]


def test_requests_with_settings_of_their_own_come_at_any_time(policy, tiny_tokenizer, prompts):
    asked = [
        (Request(prompts[0], [1, 2, 3]), Sampling(20), [7]),
        (Request(prompts[1], [4]), Sampling(3, temperature=0), []),
        (Request(prompts[0], [5, 1]), Sampling(60, top_k=5), []),
        (Request(prompts[3], [6]), Sampling(9, top_p=0.5, repetition_penalty=1.5), [9]),
    ]
    want = [alone(policy, tiny_tokenizer, *one) for one in asked]
    for limits in [dict(max_rows=4), dict(max_rows=2), dict(max_live_tokens=150)]:
        with CachedEngine(**limits).session(policy, tiny_tokenizer) as session:
            futures = []
            for one in asked:
                futures.append(session.submit(*one))
                session.step()
                session.step()
            finish(session)
            assert [[f.result(0).input_ids for f in group] for group in futures] == want


def test_tokens_and_text_stream(policy, tiny_tokenizer, prompts, session):
    got = []
    sampling = Sampling(40, stop_strings=["zz", "qq"])
    (future,) = session.submit(Request(prompts[0], [3]), sampling, [], on_token=got.append)
    session.step()
    assert len(got) in (1, 2)  # the first comes before the last is made
    finish(session)
    completion = future.result(0)
    assert [token.id for token in got] == completion.input_ids
    assert [token.logprob for token in got] == completion.logprobs
    assert "".join(token.text for token in got) == completion.text
    assert completion.text == tiny_tokenizer.decode(completion.input_ids, skip_special_tokens=True)
    assert len([token for token in got if token.text]) > 10


def test_a_cancelled_row_leaves_the_batch(policy, tiny_tokenizer, prompts, session, monkeypatch):
    sampling = Sampling(30)
    futures = session.submit(Request(prompts[0], [1, 2, 3, 4, 5, 6]), sampling, [])  # two wait
    session.step()
    assert futures[1].cancel() and futures[5].cancel()
    sizes = []
    decode = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, *args: sizes.append(len(args[0])) or decode(self, *args))
    finish(session)
    monkeypatch.undo()
    want = alone(policy, tiny_tokenizer, Request(prompts[0], [1, 3, 4, 5]), sampling)
    assert [futures[i].result(0).input_ids for i in (0, 2, 3, 4)] == want
    with pytest.raises(CancelledError):
        futures[1].result(0)
    assert sizes == [4] * 28 + [1]  # the waiting row took the place at once


def test_all_cancelled_leaves_nothing_to_do(session, prompts):
    futures = session.submit(Request(prompts[0], range(6)), Sampling(30), [])
    session.step()
    for future in futures:
        future.cancel()
    session.step()
    assert not session.busy


def test_a_caller_that_fails_ends_its_own_row_alone(session, prompts):
    def broken(token):
        raise KeyError("no such client")

    (bad,) = session.submit(Request(prompts[0], [1]), Sampling(9), [], on_token=broken)
    (good,) = session.submit(Request(prompts[1], [1]), Sampling(9), [])
    finish(session)
    with pytest.raises(KeyError, match="no such client"):
        bad.result(0)
    assert len(good.result(0).input_ids) == 9


@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_a_step_that_fails_tells_all_who_wait(where, policy, tiny_tokenizer, session, prompts, monkeypatch):
    running = session.submit(Request(prompts[0], [1, 2, 3]), Sampling(9), [])
    session.step()
    waiting = session.submit(Request(prompts[1], [1, 2, 3]), Sampling(9), [])
    with monkeypatch.context() as patch:

        def out_of_memory(*args):
            raise torch.OutOfMemoryError("no room")

        patch.setattr(Decoder, where, out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            session.step()
    for future in [*running, *waiting]:
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            future.result(0)
    assert not session.busy
    # and it goes on
    (future,) = session.submit(Request(prompts[0], [1]), Sampling(9), [])
    finish(session)
    assert [future.result(0).input_ids] == alone(policy, tiny_tokenizer, Request(prompts[0], [1]), Sampling(9))


def test_an_interrupt_leaves_nobody_waiting(session, prompts, monkeypatch):
    futures = session.submit(Request(prompts[0], [1, 2]), Sampling(9), [])

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "prefill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.step()
    assert all(future.cancelled() for future in futures)


def test_a_closed_session_leaves_nobody_waiting_and_takes_no_more(policy, tiny_tokenizer, prompts):
    with CachedEngine(max_rows=1).session(policy, tiny_tokenizer) as session:
        futures = session.submit(Request(prompts[0], [1, 2]), Sampling(9), [])
        session.step()
    assert all(future.cancelled() for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        session.submit(Request(prompts[0], [1]), Sampling(9), [])


def test_one_that_leaves_before_its_first_token_harms_nobody(policy, tiny_tokenizer, prompts, monkeypatch):
    """Between its admission and its first token another thread cancels it; others of its prompt go on from its keys."""
    want = [alone(policy, tiny_tokenizer, Request(prompts[0], [i]), Sampling(8))[0] for i in (1, 2)]
    with CachedEngine(max_rows=2).session(policy, tiny_tokenizer) as session:
        left, stays = session.submit(Request(prompts[0], [0, 1]), Sampling(8), [])
        start = session._start

        def start_late(new):
            left.cancel()
            start(new)

        monkeypatch.setattr(session, "_start", start_late)
        session.step()
        monkeypatch.undo()
        (later,) = session.submit(Request(prompts[0], [2]), Sampling(8), [])
        while session.busy:
            session.step()
    assert left.cancelled()
    assert [stays.result().input_ids, later.result().input_ids] == want


def test_coroutines_are_served_by_a_stepping_thread(policy, tiny_tokenizer, prompts):
    """What a server does: futures cross threads, and a client that leaves takes its row along."""
    want = [alone(policy, tiny_tokenizer, Request(p, [i]), Sampling(12))[0] for i, p in enumerate(prompts)]
    with CachedEngine(max_rows=3).session(policy, tiny_tokenizer) as session:
        over = threading.Event()

        def work():
            while not over.is_set():
                session.step() if session.busy else over.wait(0.001)

        async def serve():
            async def one(i):
                await asyncio.sleep(0.002 * i)
                (future,) = session.submit(Request(prompts[i], [i]), Sampling(12), [])
                return (await asyncio.wrap_future(future)).input_ids

            (left,) = session.submit(Request(prompts[0], [99]), Sampling(100), [])
            leaving = asyncio.wrap_future(left)
            asyncio.get_running_loop().call_later(0.01, leaving.cancel)
            answers = await asyncio.gather(*map(one, range(len(prompts))))
            with pytest.raises(asyncio.CancelledError):
                await leaving
            return answers, left

        thread = threading.Thread(target=work)
        thread.start()
        try:
            answers, left = asyncio.run(asyncio.wait_for(serve(), 60))
        finally:
            over.set()
            thread.join()
    assert answers == want and left.cancelled()
