"""Completions equal transformers' own, whatever shares their batch; the policy stays as it was."""

import functools
import itertools
import logging
import weakref
from collections import Counter
from itertools import pairwise

import pytest
import torch
import transformers
from rollouts import FAMILIES, UNCACHED, ids, lora, requests, state_of

from lightning_rlhf.models import Policy
from lightning_rlhf.models.backbone import enable_checkpointing
from lightning_rlhf.rollout import CachedEngine, HFGenerateEngine, Request, Sampling, scheduler
from lightning_rlhf.rollout import engine as module
from lightning_rlhf.rollout.kv_cache import Decoder, SharedPrompts, SlotCache

OLD = transformers.__version__.startswith("4.")


@pytest.fixture(autouse=True)
def short_prompts_are_shared(monkeypatch):
    """Rows of one prompt share its keys, though it is short here; prompts with one row have all their own."""
    monkeypatch.setattr(scheduler, "_SHARED_PROMPT", 1)


WRONG = {"Gemma2"} if OLD else set()
"""Whose own cache goes wrong beyond the window: transformers 4.51's generate differs from itself without a cache."""


def greedy_alone(model, prompt, new, use_cache=True, stops=None, **more):
    """By transformers, with one prompt a batch."""
    settings = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=False, use_cache=use_cache, pad_token_id=0, eos_token_id=stops, **more
    )
    row = torch.tensor([prompt])
    return model.generate(row, attention_mask=torch.ones_like(row), generation_config=settings)[
        0, len(prompt) :
    ].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family, make_model, prompts, tiny_tokenizer, caplog):
    name, changes = FAMILIES[family]
    model = make_model(name, **changes)
    want = [greedy_alone(model, prompt, 24, use_cache=family not in WRONG) for prompt in prompts]
    policy = Policy(model)
    with caplog.at_level(logging.WARNING, module.__name__):
        for engine in (CachedEngine(max_rows=3), CachedEngine(), *[HFGenerateEngine()] * (family not in WRONG)):
            got = engine.generate(policy, tiny_tokenizer, requests(prompts, 2), Sampling(24, temperature=0), [])
            assert ids(got) == [[answer, answer] for answer in want]
    warnings = [r.message for r in caplog.records if "cannot use the rollout cache" in r.message]
    assert len(warnings) == (family in UNCACHED)  # once, although asked twice
    assert len(set(itertools.chain(*want))) > 2  # the answers say something


@pytest.mark.parametrize(
    "settings",
    [dict(repetition_penalty=1.3), dict(min_new_tokens=9), dict(repetition_penalty=1.2, min_new_tokens=9)],
    ids=str,
)
def test_greedy_with_penalties_and_a_minimum_equals_generate(settings, policy, prompts, tiny_tokenizer):
    """For rows that join when others have ended."""
    stops = list(range(0, 300, 7))
    want = [greedy_alone(policy.transformer, p, 24, stops=stops, **settings) for p in prompts]
    assert len({*map(len, want)}) > 2
    sampling = Sampling(24, temperature=0, **settings)
    for engine in (CachedEngine(max_rows=2), CachedEngine(), HFGenerateEngine(), HFGenerateEngine(max_rows=1)):
        got = engine.generate(policy, tiny_tokenizer, requests(prompts, 2), sampling, stops)
        assert ids(got) == [[answer, answer] for answer in want]


@pytest.mark.parametrize("family", ["Llama", "Mistral, window", "Gemma2", "Bloom"])
def test_sampled_and_scored_as_a_padded_forward_pass_scores(family, make_model, prompts, tiny_tokenizer):
    name, changes = FAMILIES[family]
    model = make_model(name, **changes)
    policy, temperature = Policy(model), 0.7
    settings = Sampling(24, temperature=temperature, top_k=40, top_p=0.95, repetition_penalty=1.3)
    stops = list(range(0, 60))
    got = CachedEngine(max_rows=4).generate(policy, tiny_tokenizer, requests(prompts), settings, stops)
    rows = [([*p, *c.input_ids], len(p), c) for p, group in zip(prompts, got, strict=True) for c in group]
    longest = max(len(row) for row, _, _ in rows)
    padded = torch.tensor([row + [0] * (longest - len(row)) for row, _, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _, _ in rows])
    with torch.no_grad(), policy.native_attention() as model:
        logprobs = (model(input_ids=padded, attention_mask=mask).logits.float() / temperature).log_softmax(-1)
    for i, (row, start, completion) in enumerate(rows):
        want = [logprobs[i, p - 1, row[p]].item() for p in range(start, len(row))]
        assert completion.logprobs == pytest.approx(want, abs=1e-4)
        assert (completion.input_ids[-1] in stops) == (completion.finish_reason == "stop")
        assert not set(completion.input_ids[:-1]) & set(stops)
    assert len({len(row) for row, _, _ in rows}) > 3


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(top_k=20, top_p=0.9, repetition_penalty=1.2, temperature=1.3),
        dict(min_new_tokens=5),
        dict(stop_strings=["e", "在"]),
    ],
    ids=str,
)
def test_a_sample_depends_on_its_key_alone(settings, policy, prompts, tiny_tokenizer):
    sampling, stops, asked = Sampling(20, **settings), list(range(20)), requests(prompts)

    def run(engine, asked=asked):
        return engine.generate(policy, tiny_tokenizer, asked, sampling, stops)

    want = run(CachedEngine())
    for limits in [(None, 6), (None, 4), (None, 1), (2 * 34, None), (400, None), (150, 3)]:
        assert ids(run(CachedEngine(*limits))) == ids(want), limits
    assert ids(run(CachedEngine(prefill_tokens=1))) == ids(want)
    assert [c.text for g in run(HFGenerateEngine(max_rows=2)) for c in g] == [c.text for g in want for c in g]
    assert ids(run(CachedEngine(max_rows=5), asked[::-1]))[::-1] == ids(want)
    for request, group in zip(asked, want, strict=True):
        alone = [run(CachedEngine(), [Request(request.prompt, [key])])[0][0] for key in request.keys]
        assert [c.input_ids for c in alone] == [c.input_ids for c in group]
        for a, b in zip(alone, group, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
            assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
    samples = [tuple(c.input_ids) for group in want for c in group]
    assert len(set(samples)) > len(samples) / 2
    assert len({len(sample) for sample in samples}) > 3
    if "min_new_tokens" in settings:
        assert min(map(len, samples)) == 6


def test_whole_completions_have_the_exact_distribution(make_model, tiny_tokenizer):
    """Two tokens of a vocabulary of four, stop token included: all 13 outcomes."""
    policy, prompt, n = Policy(make_model("Llama", vocab_size=4)), [1, 2], 4000
    sampling, stop = Sampling(2, temperature=1.5), 3
    (got,) = CachedEngine(max_rows=500).generate(policy, tiny_tokenizer, [Request(prompt, range(n))], sampling, [stop])
    counts = Counter(tuple(c.input_ids) for c in got)

    def next_token(ids):
        with torch.no_grad(), policy.native_attention() as model:
            return (model(input_ids=torch.tensor([ids])).logits[0, -1] / 1.5).softmax(-1).tolist()

    want = {(stop,): (first := next_token(prompt))[stop]}
    for a in range(3):
        want |= {(a, b): first[a] * p for b, p in enumerate(next_token([*prompt, a]))}
    assert sum(want.values()) == pytest.approx(1, abs=1e-5) and set(counts) <= set(want)
    statistic = sum((counts[k] - n * p) ** 2 / (n * p) for k, p in want.items())
    assert torch.special.gammaincc(torch.tensor(6.0), torch.tensor(statistic / 2)) > 1e-3


# ------------------------------------------------------------------------------------------------- the work it does


def watch_shared_prompts(monkeypatch):
    """A function that counts the positions that are held for several rows."""
    made, init = weakref.WeakSet(), SharedPrompts.__init__

    def note_init(self, *args):
        made.add(self)
        init(self, *args)

    monkeypatch.setattr(SharedPrompts, "__init__", note_init)
    return lambda: sum(keys[0].shape[0] * keys[0].shape[2] for keys in (prompts.keys for prompts in made) if keys)


@pytest.fixture
def work(monkeypatch):
    """Prompts that were run, rows of each step, and the cache's sizes."""
    seen = dict(prompts=[], batches=[], steps=[], sizes=[])
    prefill, decode, arrange = Decoder.prefill, Decoder.decode, SlotCache.arrange
    held_once = watch_shared_prompts(monkeypatch)

    def note_prefill(self, prompts, *others):
        seen["prompts"] += map(tuple, prompts)
        seen["batches"].append(len(prompts) * max(map(len, prompts)))
        return prefill(self, prompts, *others)

    def note_decode(self, tokens, positions, *others):
        seen["steps"].append(len(tokens))
        shared = others[1] if len(others) > 1 and others[1] else [None] * len(positions)
        bases = [0 if place is None else place[0].lengths[place[1]] for place in shared]
        assert max(p - base for p, base in zip(positions, bases, strict=True)) < self.cache.columns
        seen["shared"] = seen.get("shared", 0) + sum(place is not None for place in shared)
        seen["sizes"].append(self.cache.slots * self.cache.columns + held_once())
        return decode(self, tokens, positions, *others)

    def note_arrange(self, sources, slots, columns, width):
        arrange(self, sources, slots, columns, width)
        held = max((keys.shape[0] * keys.shape[2] for keys in self._keys), default=0)
        seen["sizes"].append(max(held, slots * columns) + held_once())

    monkeypatch.setattr(Decoder, "prefill", note_prefill)
    monkeypatch.setattr(Decoder, "decode", note_decode)
    monkeypatch.setattr(SlotCache, "arrange", note_arrange)
    return seen


@pytest.fixture
def ready(policy):
    """A policy that was tried already, so that its trial is not counted."""
    assert module.reason_against(policy) is None
    return policy


@pytest.mark.parametrize("max_rows", [None, 5, 3, 1])
def test_each_distinct_prompt_is_run_once(max_rows, ready, prompts, tiny_tokenizer, work):
    """Equal prompts of different requests too, and where a prompt's samples don't fit the batch together."""
    asked = [*requests(prompts, 4), Request(list(prompts[0]), [77]), Request(tuple(prompts[1]), [78, 79])]
    CachedEngine(max_rows=max_rows).generate(ready, tiny_tokenizer, asked, Sampling(12), list(range(30)))
    assert Counter(work["prompts"]) == Counter(map(tuple, prompts))


def test_finished_rows_leave_and_waiting_ones_come(ready, prompts, tiny_tokenizer, work):
    asked, stops = requests(prompts, 4), list(range(30))
    got = CachedEngine(max_rows=6).generate(ready, tiny_tokenizer, asked, Sampling(16), stops)
    lengths = [len(c.input_ids) for group in got for c in group]
    # the first token of a row is the prompt's; but for rows that end with it, no step is wasted
    assert sum(work["steps"]) <= sum(n - 1 for n in lengths) + lengths.count(1)
    assert max(work["steps"]) == 6 and work["steps"][: len(work["steps"]) // 2].count(6) > 3


@pytest.mark.parametrize("budget", [30, 64, 100, 200, 333])
def test_the_budget_is_never_exceeded(budget, ready, prompts, tiny_tokenizer, work):
    CachedEngine(max_live_tokens=budget).generate(ready, tiny_tokenizer, requests(prompts, 4), Sampling(16), [1, 2, 3])
    assert 0 < max(work["sizes"]) <= budget
    assert max(work["steps"]) >= budget // (14 + 16)
    assert work["shared"] > 0 or budget < 64


@pytest.mark.parametrize("limits", [dict(), dict(max_rows=4), dict(max_live_tokens=150)], ids=str)
def test_the_cache_grows_as_rows_get_longer(limits, ready, prompts, tiny_tokenizer, work, monkeypatch):
    """A batch that ends early never takes the memory that its limits would let it take, and samples stay the same."""
    asked, stops = requests(prompts), list(range(20))

    def run(sampling, stops):
        work["sizes"].clear()
        return CachedEngine(**limits).generate(ready, tiny_tokenizer, asked, sampling, stops)

    want = run(Sampling(40), stops)
    whole = max(work["sizes"])
    monkeypatch.setattr(scheduler, "_GRAIN", 4)
    assert ids(run(Sampling(40), stops)) == ids(want)
    assert len(set(work["sizes"])) > 3 and max(work["sizes"]) <= limits.get("max_live_tokens", whole)
    run(Sampling(40), range(300))  # every token ends a row
    assert max(work["sizes"]) <= whole / 2


def test_prompts_are_run_in_batches_of_bounded_size(ready, prompts, tiny_tokenizer, work):
    CachedEngine(prefill_tokens=10).generate(ready, tiny_tokenizer, requests(prompts), Sampling(2), [])
    assert max(work["batches"]) == 14 and sorted(work["batches"])[-2] <= 10  # a longer prompt goes alone
    assert len(work["batches"]) == 4


@pytest.mark.parametrize(
    "lengths, batches",
    [
        ((90, 4, 92, 88), [4, 3 * 92]),  # 84 tokens of padding cost more than a pass, and 2 do not
        ((30, 40, 50, 60), [4 * 60]),
        ((5, 5, 5, 5, 20, 60), [5 * 20, 60]),
    ],
)
def test_prompts_of_unlike_length_are_run_apart(lengths, batches, ready, tiny_tokenizer, work):
    asked = [Request([3 + (i + 7 * k) % 50 for i in range(length)], [k]) for k, length in enumerate(lengths)]
    CachedEngine().generate(ready, tiny_tokenizer, asked, Sampling(2), [])
    assert work["batches"] == batches


def test_memory_is_given_back(ready, prompts, tiny_tokenizer):
    engine = CachedEngine()
    with engine.session(ready, tiny_tokenizer) as session:
        session.submit(Request(prompts[0], [1, 2]), Sampling(4), [])
        session.step()
        cache = session._decoder.cache
        assert cache.slots * cache.columns > 0
        while session.busy:
            session.step()
        assert cache.slots * cache.columns == 0 and not cache._keys  # although the session is still open


def test_prompts_are_given_back_when_their_rows_end(ready, tiny_tokenizer, work, monkeypatch):
    """Half of the prompts of a pass at the latest; and all of them where memory has a limit."""
    count = watch_shared_prompts(monkeypatch)
    asked = [Request([3 + (i + 5 * k) % 90 for i in range(40)], [k, k + 50]) for k in range(6)]
    for limit in (None, 5000):
        held = []
        with CachedEngine(max_live_tokens=limit).session(ready, tiny_tokenizer) as session:
            for k, request in enumerate(asked):
                session.submit(request, Sampling(4 * k + 2, min_new_tokens=4 * k + 2), [1])
            while session.busy:
                session.step()
                running = len({row.prompt for row in session._rows if not row.done})
                held.append((count() / 40, running))
        assert max(held)[0] == 6 and count() == 0
        for (_, before), (n, _) in pairwise(held):  # a step removes rows that ended in the one before
            assert n <= (2 * before if limit is None else before), held


# ------------------------------------------------------------------------------------------------- stops


def test_stop_strings_cut_text_and_keep_tokens(make_model, tiny_tokenizer):
    policy = Policy(make_model("Llama", vocab_size=len(tiny_tokenizer)))
    prompt = tiny_tokenizer("Hello, how are you?").input_ids
    (whole,), = CachedEngine().generate(policy, tiny_tokenizer, [Request(prompt, [0])], Sampling(40), [])  # fmt: skip
    middle = next(
        i for i in range(8, 30) if whole.text[i : i + 3].isascii() and len(whole.text[i : i + 3].strip()) == 3
    )
    stop = whole.text[middle : middle + 3]
    sampling = Sampling(40, stop_strings=["never there", stop])
    for engine in (CachedEngine(), HFGenerateEngine()):
        ((cut,),) = engine.generate(policy, tiny_tokenizer, [Request(prompt, [0])], sampling, [])
        assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
        assert cut.input_ids == whole.input_ids[: len(cut.input_ids)] and len(cut.logprobs) == len(cut.input_ids)
        assert stop in tiny_tokenizer.decode(cut.input_ids)
        assert stop not in tiny_tokenizer.decode(cut.input_ids[:-1])
    late = Sampling(40, min_new_tokens=len(cut.input_ids) + 1, stop_strings=[stop])
    ((later,),) = CachedEngine().generate(policy, tiny_tokenizer, [Request(prompt, [0])], late, [])
    assert len(later.input_ids) > len(cut.input_ids)


def test_the_stop_token_is_kept_and_scored_but_not_shown(policy, tiny_tokenizer, prompts):
    plain = CachedEngine().generate(policy, tiny_tokenizer, [Request(prompts[0], [5])], Sampling(12), [])[0][0]
    stop = next(t for t in plain.input_ids[3:] if t not in plain.input_ids[:3] and t > 4)
    got = CachedEngine().generate(policy, tiny_tokenizer, [Request(prompts[0], [5])], Sampling(12), [stop])[0][0]
    n = plain.input_ids.index(stop) + 1
    assert got.input_ids == plain.input_ids[:n] and not got.truncated
    assert got.logprobs == pytest.approx(plain.logprobs[:n], abs=1e-6)
    assert got.text == tiny_tokenizer.decode(plain.input_ids[: n - 1], skip_special_tokens=True)
    assert plain.truncated and len(plain.input_ids) == 12


# ------------------------------------------------------------------------------------------------- policies


def test_adapters_apply_while_they_are_on(make_model, prompts, tiny_tokenizer):
    want_off = [greedy_alone(make_model("Llama"), p, 12) for p in prompts]
    want_on = [greedy_alone(lora(make_model("Llama")).merge_and_unload(), p, 12) for p in prompts]
    assert want_on != want_off
    policy = Policy(lora(make_model("Llama")))
    for engine in (CachedEngine(), HFGenerateEngine()):

        def greedy(engine=engine):
            got = engine.generate(policy, tiny_tokenizer, requests(prompts, 1), Sampling(12, temperature=0), [])
            return [group[0] for group in ids(got)]

        assert greedy() == want_on
        with policy.model.disable_adapter():
            assert greedy() == want_off
        assert greedy() == want_on


@pytest.mark.parametrize("engine", [CachedEngine(max_rows=2), HFGenerateEngine()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Bloom"])
def test_the_policy_stays_as_it_was(engine, fails, family, make_model, prompts, tiny_tokenizer, monkeypatch):
    model = make_model(family)
    if family == "Llama":
        model = lora(model)
        enable_checkpointing(model.get_base_model())
    policy = Policy(model)
    policy.train()
    next(policy.transformer.base_model.children()).eval()  # parts may have a mode of their own
    policy.transformer.generation_config.update(do_sample=True, top_k=3)
    before = state_of(policy)
    if fails:
        calls = itertools.count()
        forward = type(policy.transformer).forward

        @functools.wraps(forward)
        def broken(self, *args, **kwargs):
            if next(calls) > 8:
                raise OSError("the power is out")
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(policy.transformer), "forward", broken)
        with pytest.raises(OSError, match="power"):
            engine.generate(policy, tiny_tokenizer, requests(prompts), Sampling(30), [1])
    else:
        engine.generate(policy, tiny_tokenizer, requests(prompts), Sampling(8), [1])
    monkeypatch.undo()
    after = state_of(policy)
    for part, was in before.items():
        assert after[part] == was, part


def test_training_goes_on_after_rollouts_under_autocast(policy, prompts, tiny_tokenizer):
    policy.train()
    ids = torch.tensor([prompts[3]])
    with torch.autocast("cpu", torch.bfloat16):
        CachedEngine().generate(policy, tiny_tokenizer, requests(prompts), Sampling(4), [])
        with policy.native_attention() as model:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


def test_half_precision_keeps_fp32_logprobs(make_model, prompts, tiny_tokenizer):
    policy = Policy(make_model("Llama").bfloat16())
    (group,) = CachedEngine().generate(policy, tiny_tokenizer, requests(prompts[:1]), Sampling(6), [])
    assert module.reason_against(policy) is None
    assert any(lp != torch.tensor(lp).bfloat16().item() for c in group for lp in c.logprobs)


# ------------------------------------------------------------------------------------------------- which models


def test_windows_that_the_trial_can_not_see_are_asked_for(make_model, monkeypatch):
    assert module.reason_against(Policy(make_model("Mistral", sliding_window=100))) is None
    attention = module.Decoder._run

    def deaf(self, *args):
        out = attention(self, *args)
        self.cache.windows = {None}  # as if the layers did not hand their window on
        return out

    monkeypatch.setattr(module.Decoder, "_run", deaf)
    assert "window of 100" in module.reason_against(Policy(make_model("Mistral", sliding_window=100)))


def test_rope_that_depends_on_the_batch_goes_to_generate(make_model, prompts, tiny_tokenizer):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = make_model("Llama", **({"rope_scaling": scaling} if OLD else {"rope_parameters": scaling}))
    policy = Policy(model)
    assert "dynamic" in module.reason_against(policy)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot run in a session"), \
            CachedEngine().session(policy, tiny_tokenizer):  # fmt: skip
        pass


def test_a_model_that_goes_wrong_with_a_cache_is_found(make_model, prompts, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(
        SlotCache, "mask", lambda self, window, like: None if self._prefill else torch.zeros(1, 1, 1, 1)
    )
    policy = Policy(make_model("Llama"))
    assert "difference of logits" in module.reason_against(policy)


# ------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize("engine", [CachedEngine(), HFGenerateEngine()], ids=lambda e: type(e).__name__)
def test_bad_requests_are_named(engine, policy, tiny_tokenizer):
    def run(prompt, new=8):
        engine.generate(policy, tiny_tokenizer, [Request([1], [0]), Request(prompt, [0])], Sampling(new), [])

    with pytest.raises(ValueError, match="request 1: the prompt has no tokens"):
        run([])
    with pytest.raises(ValueError, match="request 1: the prompt has the token 300"):
        run([5, 300])
    with pytest.raises(ValueError, match=r"request 1: a prompt of 121 tokens and max_new_tokens 8.*context of 128"):
        run([1] * 121)
    run([1] * 120)


def test_a_request_beyond_the_budget_is_named(policy, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"request 0: a prompt of 5 tokens.*max_live_tokens 12"):
        CachedEngine(max_live_tokens=12).generate(policy, tiny_tokenizer, [Request([1] * 5, [0])], Sampling(8), [])


@pytest.mark.parametrize("limits", [dict(max_rows=0), dict(max_live_tokens=0), dict(prefill_tokens=-1)], ids=str)
def test_limits_are_checked(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        CachedEngine(**limits)


def test_nothing_asked_is_nothing_made(policy, tiny_tokenizer, prompts):
    for engine in (CachedEngine(), HFGenerateEngine()):
        assert engine.generate(policy, tiny_tokenizer, [], Sampling(4), []) == []
        got = engine.generate(
            policy, tiny_tokenizer, [Request(prompts[0], []), Request(prompts[0], [1])], Sampling(4), []
        )
        assert [len(group) for group in got] == [0, 1]


def test_the_config_reads_the_engine():
    import jsonargparse

    from lightning_rlhf.rollout import RolloutEngine

    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--engine", type=RolloutEngine)
    config = {"class_path": "lightning_rlhf.rollout.CachedEngine", "init_args": {"max_rows": 3}}
    engine = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(
        parser.parse_object({"engine": config})
    ).engine
    assert isinstance(engine, CachedEngine) and engine.max_rows == 3
