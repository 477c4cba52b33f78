"""A server's view: requests come at any time, tokens stream, callers leave, steps fail; nobody is left waiting."""

import asyncio
import itertools
import random
import re
import threading
from concurrent.futures import CancelledError

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lightning_rlhf.models import Policy
from lightning_rlhf.rollout import CachedEngine, HFGenerateEngine, Request, Sampling, scheduler
from lightning_rlhf.rollout.kv_cache import Decoder, SlotCache


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
def test_a_step_that_fails_costs_one_answer(where, policy, tiny_tokenizer, session, prompts, monkeypatch):
    """The newest row's; the others go on, with the same tokens."""
    running = session.submit(Request(prompts[0], [1, 2]), Sampling(9), [])
    session.step()
    (newest,) = session.submit(Request(prompts[1], [3]), Sampling(9), [])
    real, failures = getattr(Decoder, where), [torch.OutOfMemoryError("no room")]

    def out_of_memory(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(Decoder, where, out_of_memory)
    finish(session)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        newest.result(0)
    want = alone(policy, tiny_tokenizer, Request(prompts[0], [1, 2]), Sampling(9))
    assert [future.result(0).input_ids for future in running] == want


def test_steps_that_all_fail_tell_everybody_and_end(policy, tiny_tokenizer, session, prompts, monkeypatch):
    futures = session.submit(Request(prompts[0], range(6)), Sampling(9), [])  # two wait
    with monkeypatch.context() as patch:

        def broken(*args):
            raise torch.OutOfMemoryError("no room")

        patch.setattr(Decoder, "prefill", broken)
        patch.setattr(Decoder, "extend", broken)
        patch.setattr(Decoder, "decode", broken)
        finish(session)
        for future in futures:
            with pytest.raises(torch.OutOfMemoryError, match="no room"):
                future.result(0)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):  # training stops at once
            alone(policy, tiny_tokenizer, Request(prompts[0], [1]), Sampling(9))
    (future,) = session.submit(Request(prompts[0], [1]), Sampling(9), [])
    finish(session)
    assert [future.result(0).input_ids] == alone(policy, tiny_tokenizer, Request(prompts[0], [1]), Sampling(9))


def test_logits_that_are_not_finite_end_their_own_row(policy, tiny_tokenizer, session, prompts, monkeypatch):
    bad, good = (session.submit(Request(prompts[i], [i]), Sampling(9), [])[0] for i in (0, 1))
    session.step()
    decode = Decoder.decode

    def spoiled(self, *args):
        logits = decode(self, *args).clone()
        logits[0] = torch.nan
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "decode", spoiled)
        session.step()
    finish(session)
    with pytest.raises(FloatingPointError, match="not finite"):
        bad.result(0)
    assert [good.result(0).input_ids] == alone(policy, tiny_tokenizer, Request(prompts[1], [1]), Sampling(9))
    for parameter in policy.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        alone(policy, tiny_tokenizer, Request(prompts[0], [1]), Sampling(99))


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


# ------------------------------------------------------------------------------------------------- a server's load


@pytest.fixture
def passes(monkeypatch):
    """Numbers of tokens of each pass over the model, by kind."""
    seen = []

    def watch(name, count):
        real = getattr(Decoder, name)

        def counted(self, *args, **options):
            seen.append((name, count(*args)))
            return real(self, *args, **options)

        monkeypatch.setattr(Decoder, name, counted)

    watch("prefill", lambda prompts, *_: sum(map(len, prompts)))
    watch("extend", lambda tokens, *_: len(tokens))
    watch("decode", lambda tokens, *_: len(tokens))
    return seen


FAMILIES = [("Llama", {}), ("GPTNeoX", {}), ("Mistral", dict(sliding_window=5)), ("Gemma2", dict(sliding_window=5))]


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=str)
def test_pieces_of_a_prompt_are_the_prompt(family, changes, make_model, tiny_tokenizer, prompts):
    policy = Policy(make_model(family, **changes))
    sampling = Sampling(12)
    requests = [Request(prompt, [i, i + 10]) for i, prompt in enumerate(prompts)]
    want = CachedEngine().generate(policy, tiny_tokenizer, requests, sampling, [])
    for chunk in (1, 2, 5, 100):
        got = CachedEngine(prefill_chunk=chunk).generate(policy, tiny_tokenizer, requests, sampling, [])
        for one, other in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
            assert one.input_ids == other.input_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_long_prompt_holds_up_nobody(policy, tiny_tokenizer, passes):
    """While 60 tokens come in pieces of 8, the running row gets a token in each step."""
    long = [(7 * i) % 300 for i in range(60)]
    with CachedEngine(prefill_chunk=8).session(policy, tiny_tokenizer) as session:
        got = []
        session.submit(Request([1, 2, 3], [0]), Sampling(20), [], on_token=got.append)
        session.step()
        (future,) = session.submit(Request(long, [5]), Sampling(4), [])
        passes.clear()
        for step in range(10):
            session.step()
            assert len(got) == 3 + step
        assert max(count for name, count in passes if name != "decode") <= 8
        finish(session)
    assert [future.result(0).input_ids] == alone(policy, tiny_tokenizer, Request(long, [5]), Sampling(4))


def test_several_answers_to_a_long_prompt_run_it_once(policy, tiny_tokenizer, passes):
    long = [(7 * i) % 300 for i in range(60)]
    want = alone(policy, tiny_tokenizer, Request(long, range(5)), Sampling(6))
    passes.clear()
    with CachedEngine(prefill_chunk=8).session(policy, tiny_tokenizer) as session:
        futures = session.submit(Request(long, range(5)), Sampling(6), [])
        finish(session)
    assert [future.result(0).input_ids for future in futures] == want
    assert sum(count for name, count in passes if name == "extend") <= 60


def test_the_next_turn_runs_only_what_is_new(policy, tiny_tokenizer, passes):
    first = [(7 * i) % 300 for i in range(40)]
    others = [[(11 * i + j) % 300 for i in range(40)] for j in range(1, 3)]
    engine = CachedEngine(keep_prefixes=2)
    with engine.session(policy, tiny_tokenizer) as session:
        (future,) = session.submit(Request(first, [1]), Sampling(10), [])
        finish(session)
        answer = future.result(0).input_ids
        second = [*first, *answer, 5, 6, 7, 8]
        passes.clear()
        (future,) = session.submit(Request(second, [2]), Sampling(10), [])
        finish(session)
        got = [future.result(0).input_ids]
        # the last token of the answer never ran; the last one of the prompt is decoded
        assert [x for x in passes if x[0] != "decode"] == [("extend", 4)]
        for other in others:  # the kept ones are replaced
            session.submit(Request(other, [1]), Sampling(3), [])
            finish(session)
        passes.clear()
        session.submit(Request(first, [1]), Sampling(3), [])
        finish(session)
        assert ("prefill", 40) in passes
    assert got == alone(policy, tiny_tokenizer, Request(second, [2]), Sampling(10))


def test_memory_is_taken_as_it_is_used_and_rows_go_on_after_being_set_aside(
    policy, tiny_tokenizer, prompts, monkeypatch
):
    """Ten rows that may become 120 tokens long share room for 300: by reservation two of them would run together."""
    monkeypatch.setattr(scheduler, "_GRAIN", 16)
    requests = [Request(prompts[i % 5], [i]) for i in range(10)]
    sampling = Sampling(100, temperature=2.0)
    stops = list(range(6))  # most end early
    want = [alone(policy, tiny_tokenizer, request, sampling, stops) for request in requests]
    together, sizes = [], []
    arrange = SlotCache.arrange

    def watched(self, sources, slots, columns, width):
        sizes.append(slots * columns)
        arrange(self, sources, slots, columns, width)

    monkeypatch.setattr(SlotCache, "arrange", watched)
    with CachedEngine(max_live_tokens=300, reserve=False).session(policy, tiny_tokenizer) as session:
        futures = [session.submit(request, sampling, stops) for request in requests]
        while session.busy:
            session.step()
            together.append(len(session._rows))
        assert session.load == (0, 0)
    assert [[future.result(0).input_ids for future in group] for group in futures] == want
    assert max(sizes) <= 300 and max(together) > 4
    assert any(len(group[0]) > 60 for group in want)  # which had to be set aside on the way


def test_short_requests_pass_one_that_does_not_fit_but_not_for_ever(policy, tiny_tokenizer, prompts):
    with CachedEngine(max_live_tokens=200).session(policy, tiny_tokenizer) as session:
        session.submit(Request(prompts[0], [0]), Sampling(60), [])
        session.step()
        (long,) = session.submit(Request(prompts[0][:2], [1]), Sampling(120, min_new_tokens=120), [])
        (short,) = session.submit(Request(prompts[2], [2]), Sampling(5), [])
        for _ in range(6):
            session.step()
        assert short.done() and not long.done()
        steps = 0
        while all(row.future is not long for row in session._rows):
            session.submit(Request(prompts[3], [steps]), Sampling(20), [])  # short ones come all the time
            session.step()
            steps += 1
        assert steps < 100  # the first one ends, and no others were let in for its last steps


def test_waiting_costs_nothing_and_ends_with_a_request(policy, tiny_tokenizer, prompts):
    with CachedEngine().session(policy, tiny_tokenizer) as session:
        assert not session.wait(0.01)
        threading.Timer(0.05, lambda: session.submit(Request(prompts[0], [1]), Sampling(1), [])).start()
        assert session.wait(30)
        finish(session)


@pytest.fixture
def adapted(policy):
    """The policy under two adapters that change it a lot; the first one is active."""
    peft = get_peft_model(
        policy.transformer, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), adapter_name="first"
    )
    peft.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return Policy(peft)


def by_hand(adapted, tokenizer, adapter, prompt, key, sampling):
    """With the adapter activated by peft itself."""
    if adapter == "__base__":
        with adapted.model.disable_adapter():
            return alone(adapted, tokenizer, Request(prompt, [key]), sampling)[0]
    adapted.model.set_adapter(adapter or "first")
    try:
        return alone(adapted, tokenizer, Request(prompt, [key]), sampling)[0]
    finally:
        adapted.model.set_adapter("first")


@pytest.mark.parametrize("limits", [dict(), dict(prefill_chunk=4, keep_prefixes=4), dict(max_rows=2)], ids=str)
def test_rows_with_adapters_of_their_own_share_a_batch(limits, adapted, tiny_tokenizer, prompts):
    long = [(7 * i) % 300 for i in range(40)]
    asked = [(name, p) for p in (prompts[0], long, prompts[3]) for name in ("second", "__base__", None, "first")]
    want = [by_hand(adapted, tiny_tokenizer, name, p, i, Sampling(12)) for i, (name, p) in enumerate(asked)]
    assert want[0] != want[1]
    with CachedEngine(**limits).session(adapted, tiny_tokenizer) as session:
        futures = []
        for i, (name, p) in enumerate(asked):
            futures += session.submit(Request(p, [i], adapter=name), Sampling(12), [])
            session.step()
        finish(session)
        assert [future.result(0).input_ids for future in futures] == want
        # the same prompt again: keys of another adapter are not taken for its own
        again = [session.submit(Request(long, [i], adapter=asked[i][0]), Sampling(12), [])[0] for i in range(4, 8)]
        finish(session)
        assert [future.result(0).input_ids for future in again] == want[4:8]


def test_an_adapter_that_is_not_there_is_refused(adapted, policy, tiny_tokenizer):
    known = "no adapter 'third' for a single row. There are: __base__, first, second"
    with CachedEngine().session(adapted, tiny_tokenizer) as session, pytest.raises(ValueError, match=re.escape(known)):
        session.submit(Request([1], [1], adapter="third"), Sampling(3), [])
    with pytest.raises(ValueError, match="HFGenerateEngine generates with the active adapter"):
        HFGenerateEngine().generate(adapted, tiny_tokenizer, [Request([1], [1], adapter="first")], Sampling(3), [])


@pytest.mark.parametrize("chunk", [None, 8])
def test_what_a_broken_adapter_leaves_harms_no_other_row(chunk, adapted, tiny_tokenizer):
    """Its keys are NaN, and the next row that takes its place reads masked columns of them."""
    good, other = Request(range(3, 8), [1], adapter="first"), Request(range(20, 50), [1], adapter="first")
    want = [alone(adapted, tiny_tokenizer, request, Sampling(n))[0] for request, n in ((other, 40), (good, 20))]
    for name, parameter in adapted.named_parameters():
        if "lora_B.second" in name:
            parameter.data.fill_(torch.nan)
    with CachedEngine(prefill_chunk=chunk, keep_prefixes=2).session(adapted, tiny_tokenizer) as session:
        (first,) = session.submit(other, Sampling(40), [])
        (bad,) = session.submit(Request(range(30, 90), [1], adapter="second"), Sampling(20), [])
        while not bad.done():
            session.step()
        (last,) = session.submit(good, Sampling(20), [])
        finish(session)
    assert isinstance(bad.exception(0), FloatingPointError)
    assert [first.result(0).input_ids, last.result(0).input_ids] == want


def test_several_active_adapters_are_for_all_rows_alike(adapted, tiny_tokenizer):
    adapted.model.base_model.set_adapter(["first", "second"])
    want = alone(adapted, tiny_tokenizer, Request([1, 2], [1]), Sampling(9))
    with CachedEngine().session(adapted, tiny_tokenizer) as session:
        with pytest.raises(ValueError, match="several active ones"):
            session.submit(Request([1, 2], [1], adapter="first"), Sampling(9), [])
        (future,) = session.submit(Request([1, 2], [1]), Sampling(9), [])
        finish(session)
    assert [future.result(0).input_ids] == want


def test_a_long_prompt_does_not_widen_the_steps_of_short_rows(policy, tiny_tokenizer, monkeypatch):
    """Neither while it runs in pieces, nor when its row has joined, if that saves more than a pass costs."""
    monkeypatch.setattr(scheduler, "_GRAIN", 8)
    monkeypatch.setattr(Decoder, "pass_bytes", 0)
    widths, decoding = [[]], SlotCache.decoding  # of each step

    def watched(self, positions, device, first, shared):
        widths[-1].append((len(positions), max(positions) + 1))
        return decoding(self, positions, device, first, shared)

    monkeypatch.setattr(SlotCache, "decoding", watched)
    long = [5 + i % 90 for i in range(60)]
    with CachedEngine(prefill_chunk=8, max_rows=8).session(policy, tiny_tokenizer) as session:
        for key in range(3):
            session.submit(Request([7, 8], [key]), Sampling(40, min_new_tokens=40), [1])
        session.step()
        widths.clear()
        [joined] = session.submit(Request(long, [0]), Sampling(4, min_new_tokens=4), [1])
        while not joined.done():
            widths.append([])
            session.step()
    assert all(width < 30 for step in widths for count, width in step if count == 3)
    assert [step[-1] for step in widths[-4:]] == [(1, 60), (1, 61), (1, 62), (1, 63)]
    assert len(widths) > 8 and {sum(count for count, _ in step) for step in widths[1:8]} == {3}


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_each_answer_is_the_one_it_gets_alone(seed, policy, tiny_tokenizer, monkeypatch):
    """Random limits, settings, arrivals, prompts that share beginnings, cancellations and failures."""
    draw = random.Random(seed)
    monkeypatch.setattr(scheduler, "_GRAIN", 8)
    monkeypatch.setattr(scheduler, "_SHARED", 2)
    monkeypatch.setattr(scheduler, "_SHARED_PROMPT", draw.choice([1, 4, 1000]))
    if seed % 2:
        monkeypatch.setattr(Decoder, "pass_bytes", 0)  # long rows and short ones run apart
    stems = [[draw.randrange(300) for _ in range(draw.choice([1, 4, 20]))] for _ in range(3)]

    def ask():
        prompt = [*draw.choice(stems), *(draw.randrange(300) for _ in range(draw.choice([0, 1, 5])))]
        keys = [draw.randrange(99) for _ in range(draw.choice([1, 1, 3]))]
        settings = Sampling(
            draw.choice([1, 5, 40]),
            temperature=draw.choice([0, 1, 2]),
            top_k=draw.choice([0, 9]),
            presence_penalty=draw.choice([0, 1]),
            repetition_penalty=draw.choice([1, 1.5]),
            logit_bias=draw.choice([{}, {1: 2.0, 7: -3.0}]),
            min_p=draw.choice([0, 0.1]),
        )
        return Request(prompt, keys, alternatives=draw.choice([0, 2])), settings, [1, 2, 3]

    engine = CachedEngine(
        max_live_tokens=draw.choice([None, 200]),
        max_rows=draw.choice([None, 3]),
        prefill_chunk=draw.choice([None, 1, 3, 8]),
        keep_prefixes=draw.choice([0, 2, 9]),
        reserve=draw.choice([True, False]),
    )
    sizes, arrange = [0], SlotCache.arrange
    monkeypatch.setattr(
        SlotCache,
        "arrange",
        lambda self, sources, slots, columns, width: (
            sizes.append(slots * columns) or arrange(self, sources, slots, columns, width)
        ),
    )
    decode, failing = Decoder.decode, [False]

    def failing_decode(self, *args):
        if failing[0]:
            failing[0] = False
            raise RuntimeError("once")
        return decode(self, *args)

    asked = [ask() for _ in range(25)]
    want = [CachedEngine().generate(policy, tiny_tokenizer, [one[0]], *one[1:])[0] for one in asked]
    sizes[:] = [0]
    monkeypatch.setattr(Decoder, "decode", failing_decode)
    with engine.session(policy, tiny_tokenizer) as session:
        futures = []
        for one in asked:
            futures.append(session.submit(*one))
            for _ in range(draw.randrange(6)):
                session.step()
            if draw.random() < 0.2:
                draw.choice(futures[-1]).cancel()
            failing[0] = draw.random() < 0.1
        failing[0] = False
        finish(session)
    lost = 0
    for group, answers in zip(futures, want, strict=True):
        for future, answer in zip(group, answers, strict=True):
            if future.cancelled() or future.exception(0):
                lost += 1
                continue
            got = future.result(0)
            assert got._replace(logprobs=[], alternatives=[]) == answer._replace(logprobs=[], alternatives=[])
            assert got.logprobs == pytest.approx(answer.logprobs, abs=1e-4)
            assert [[i for i, _ in step] for step in got.alternatives] == [
                [i for i, _ in step] for step in answer.alternatives
            ]
    assert lost < 20
    assert engine.max_live_tokens is None or max(sizes) <= engine.max_live_tokens
