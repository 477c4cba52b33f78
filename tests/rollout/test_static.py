"""Static steps sample what the engine samples step by step, and the host has no part in them.

There is no GPU in these tests. In place of a CUDA graph they record a step's operations and repeat those on the same
tensors, without the Python around them: what the host would have decided anew in each step shows as another sample.
"""

import logging
from collections import Counter
from contextlib import nullcontext
from itertools import chain

import pytest
import torch
from rollouts import FAMILIES, UNCACHED, Calls, Operations, ids, lora, requests, state_of
from torch.utils._pytree import tree_leaves

from lightning_rlhf.models import Policy
from lightning_rlhf.rollout import (
    CachedEngine,
    Request,
    Sampling,
    engine,
    kv_cache,
    own_lengths,
    scheduler,
    static,
    static_step,
)
from lightning_rlhf.rollout.sampling import sample_tokens
from lightning_rlhf.rollout.sequence import ActiveSequence
from lightning_rlhf.rollout.static_step import NoWaits, TokenChooser, first_state
from lightning_rlhf.rollout.weights import decoding_weights

STOPS = list(range(20))
CPU = torch.device("cpu")


class Recording(NoWaits):
    """Stands for a CUDA graph: within it, operations run and are noted; :meth:`replay` runs them again in place."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Graphs on the CPU; what each was captured with. Rows of one prompt share its keys, though it is short here."""
    captured = []

    def capture(step, device):
        recording, ran = Recording(), []

        def replay():
            if ran:
                recording.replay()
            ran.append(True)  # to record a step runs it; to capture it does not

        with recording:
            step()
        captured.append((recording, ran))
        return replay

    monkeypatch.setattr(static_step, "capture", capture)
    monkeypatch.setattr(scheduler, "_SHARED_PROMPT", 5)
    return captured


def both(policy, tokenizer, asked, sampling, stops=STOPS, **limits):
    """Completions step by step, and by static steps."""
    return [
        CachedEngine(**limits, static=way).generate(policy, tokenizer, asked, sampling, stops) for way in (False, True)
    ]


def check_same(want, got, abs=1e-5):
    assert ids(got) == ids(want)
    for a, b in zip(chain.from_iterable(want), chain.from_iterable(got), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=abs)
        assert (a.text, a.finish_reason) == (b.text, b.finish_reason)


SETTINGS = [
    dict(temperature=0),
    dict(),
    dict(temperature=0.7, top_k=20),
    dict(top_p=0.8, min_new_tokens=4),
    dict(min_p=0.02, top_p=0.95, temperature=1.3),
    dict(repetition_penalty=1.3, min_new_tokens=6),
    dict(presence_penalty=0.3, frequency_penalty=0.2, logit_bias={5: 1.0, 30: -2.0}, temperature=0.8),
    dict(stop_strings=["e", "在"], min_new_tokens=3),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_samples_are_those_of_the_engine(settings, policy, prompts, tiny_tokenizer, graphs):
    """Several samples of each prompt, whose rows end at different times."""
    want, got = both(policy, tiny_tokenizer, requests(prompts), Sampling(40, **settings))
    check_same(want, got)
    lengths = {len(completion.input_ids) for group in got for completion in group}
    assert len(lengths) > 3 and max(lengths) > 20
    assert sum(len(ran) for _, ran in graphs) > 20, "few steps were repeated"


SPARED = ("Qwen2", "Qwen3", "Mistral", "Mistral, wide window", "Phi", "Olmo2")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name in SPARED else ())
        for name in FAMILIES
        if name not in UNCACHED and name != "Llama"
    ],
)
def test_families_sample_alike(family, make_model, prompts, tiny_tokenizer):
    """Windows, soft-capping, grouped heads, partial rotations."""
    name, changes = FAMILIES[family]
    check_same(*both(Policy(make_model(name, **changes)), tiny_tokenizer, requests(prompts, 2), Sampling(30), [1, 2]))


@pytest.mark.parametrize("limits", [dict(max_rows=4), dict(max_live_tokens=100), dict(prefill_tokens=10)], ids=str)
def test_waiting_rows_take_the_place_of_ended_ones(limits, policy, prompts, tiny_tokenizer, monkeypatch):
    sizes, step = [], static.StaticStep.__init__

    def note(self, decoder, chooser, rows, shared, width, *more):
        sizes.append((len(rows.token), width, sum({p[1] + 1: p[0].lengths[p[1]] for p in shared if p}.values())))
        step(self, decoder, chooser, rows, shared, width, *more)

    monkeypatch.setattr(static.StaticStep, "__init__", note)
    asked = [*requests(prompts, 4), Request(prompts[1], [77], max_new_tokens=3)]
    check_same(*both(policy, tiny_tokenizer, asked, Sampling(40), **limits))
    assert len(sizes) < 30
    if "max_rows" in limits:
        assert len(sizes) > 4 and max(rows for rows, _, _ in sizes) == 4
    if "max_live_tokens" in limits:
        assert len(sizes) > 4 and max(rows * width + shared for rows, width, shared in sizes) <= 100
    if "prefill_tokens" in limits:
        assert sizes[0][0] == 21


def test_the_cache_grows_in_few_steps(policy, prompts, tiny_tokenizer, graphs):
    check_same(*both(policy, tiny_tokenizer, requests(prompts, 2), Sampling(100), []))
    assert 3 <= len(graphs) <= 5
    assert [static.bucket(n) for n in (1, 32, 33, 50, 65, 97, 129)] == [32, 32, 48, 64, 96, 128, 192]


def test_stop_strings_and_a_full_device_row_do_not_spill(policy, prompts, tiny_tokenizer):
    """A long row that the host alone has ended stays within its columns while short ones go on."""
    asked = [Request([7] * 90, [1], max_new_tokens=30), Request([5], [2, 3, 4], max_new_tokens=36)]
    check_same(*both(policy, tiny_tokenizer, asked, Sampling(36, stop_strings=["e", "o", "a"]), []))


# ------------------------------------------------------------------------------------------------- own lengths


def kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k):
    """Stands for torch's kernel, which needs a CUDA device: what its documentation says, sequence by sequence."""
    assert enable_gqa and max_q == 1 and cu_q.dtype == cu_k.dtype == seqused_k.dtype == torch.int32
    found, (left, right) = [], window_size
    for q, start, end, used in zip(query, cu_k[:-1], cu_k[1:], seqused_k, strict=True):
        assert 0 < used <= end - start <= max_k and right in (-1, 0)
        first = start if left < 0 else start + max(0, used - 1 - left)
        k, v = (t[first : start + used].transpose(0, 1) for t in (key, value))
        found.append(torch.nn.functional.scaled_dot_product_attention(q[:, None], k, v, scale=scale, enable_gqa=True))
    return torch.stack(found)[:, :, 0]


@pytest.mark.parametrize("family", ["Llama", "Mistral, window", "Gemma2", "GPTNeoX"])
def test_each_row_is_read_up_to_its_own_length(family, make_model, prompts, tiny_tokenizer, monkeypatch):
    name, changes = FAMILIES[family]
    calls = Counter()

    def counted(*args, **kwargs):
        calls["kernel"] += 1
        return kernel(*args, **kwargs)

    monkeypatch.setattr(static_step, "capture", lambda step, device: step)
    monkeypatch.setattr(own_lengths, "varlen_attn", counted)
    monkeypatch.setattr(kv_cache, "reads_own_lengths", lambda *kind: True)
    monkeypatch.setattr(engine, "reason_against_static", lambda policy: None)  # the stand-in waits
    check_same(*both(Policy(make_model(name, **changes)), tiny_tokenizer, requests(prompts, 1), Sampling(20), [1, 2]))
    assert bool(calls) == (family != "Gemma2"), "soft-capping is not the kernel's"


def test_the_kernel_serves_where_it_is_right(monkeypatch):
    kind = (CPU, torch.float32, 8, 2)
    assert not own_lengths.reads_own_lengths(*kind), "there is no CUDA device"
    monkeypatch.setattr(own_lengths, "varlen_attn", kernel)
    assert own_lengths.is_right(*kind)

    def wrong(*args, seqused_k, **kwargs):
        return kernel(*args, seqused_k=torch.full_like(seqused_k, 40), **kwargs)

    def windowless(*args, window_size, **kwargs):
        return kernel(*args, window_size=(-1, -1), **kwargs)

    def refusing(*args, **kwargs):
        raise RuntimeError("head size must be a multiple of 8")

    for other in (wrong, windowless, refusing, lambda *args: args[0]):
        monkeypatch.setattr(own_lengths, "varlen_attn", other)
        assert not own_lengths.is_right(*kind)


# ------------------------------------------------------------------------------------------------- no waits


def test_a_step_never_waits_and_a_block_is_read_once(policy, prompts, tiny_tokenizer, monkeypatch):
    found, order, captured = Counter(), [], []
    run, tolist = static.StaticStep.run, static.Coming.tolist

    def capture(step, device):
        def watched():
            with Operations(found), Calls(found):
                step()
            found["steps"] += 1

        captured.append(step)
        return watched

    def noted(self, steps):
        order.append(steps)
        return run(self, steps)

    def read(self):
        order.append("read")
        return tolist(self)

    monkeypatch.setattr(static_step, "capture", capture)
    monkeypatch.setattr(static.StaticStep, "run", noted)
    monkeypatch.setattr(static.Coming, "tolist", read)
    sampling = Sampling(64, top_p=0.9, repetition_penalty=1.1, min_new_tokens=64)
    CachedEngine(static=True).generate(policy, tiny_tokenizer, requests(prompts), sampling, STOPS)
    # the first token is the prompt's, and the first step of a new size is not repeated
    assert found["steps"] == 63 - len(captured) and found["waits"] == found["copies"] == 0
    # a block is read while the next one runs, and there are no steps beyond the last token
    assert order == [16, "read", 16, "read", 16, "read", 15, "read", "read"]


def test_a_model_that_waits_decodes_as_before(policy, prompts, tiny_tokenizer, caplog):
    head = policy.transformer.get_output_embeddings()
    want = CachedEngine().generate(policy, tiny_tokenizer, requests(prompts), Sampling(9), STOPS)
    head.register_forward_hook(lambda module, args, out: out + out.flatten()[0].item() * 0)
    with caplog.at_level(logging.WARNING, engine.__name__):
        for _ in range(2):
            got = CachedEngine(static=True).generate(policy, tiny_tokenizer, requests(prompts), Sampling(9), STOPS)
            check_same(want, got)
    (record,) = caplog.records
    assert "cannot decode by static steps" in record.message and "_local_scalar_dense waits" in record.message


def test_boolean_indices_wait():
    mask = torch.tensor([True, False])
    for wait in (lambda: mask[mask], lambda: mask.nonzero(), lambda: mask.any().item()):
        with pytest.raises(NotImplementedError, match="waits"), NoWaits():
            wait()
    with NoWaits():
        assert mask[torch.tensor([1])].shape == (1,)


def test_a_step_that_can_not_be_captured_runs_as_it_is(policy, prompts, tiny_tokenizer, monkeypatch, caplog):
    """A CUDA graph, which this torch has no device for, refuses."""
    monkeypatch.undo()

    class Refusing:
        def replay(self):
            raise AssertionError

    def refuse(graph, **settings):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refusing)
    monkeypatch.setattr(static_step, "_capture_stream", str)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    ran = []
    with caplog.at_level(logging.WARNING, static_step.__name__):
        static_step.capture(lambda: ran.append(1), torch.device("cuda"))()
    assert ran == [1] and "not permitted when stream is capturing). The results are the same" in caplog.text
    assert static_step.capture(policy.forward, CPU) == policy.forward


@pytest.mark.parametrize(
    ("limits", "more"),
    [
        (dict(keep_prefixes=2), {}),
        (dict(prefill_chunk=4), {}),
        (dict(reserve=False), {}),
        (dict(static=False), {}),
        (dict(static=None), {}),
        (dict(), dict(alternatives=2)),
        (dict(), dict(adapter="default")),
    ],
    ids=str,
)
def test_what_is_no_plain_rollout_decodes_step_by_step(limits, more, make_model, tiny_tokenizer, graphs):
    policy = Policy(lora(make_model("Llama")))
    asked = [Request([1, 2, 3], [0, 1], **more), Request([4, 5], [2])]
    engine = CachedEngine(**{"static": True, **limits})
    got = engine.generate(policy, tiny_tokenizer, asked, Sampling(6), [])
    check_same(CachedEngine().generate(policy, tiny_tokenizer, asked, Sampling(6), []), got)
    assert not graphs


def test_a_gpu_decodes_by_static_steps(policy, monkeypatch):
    """Unless ranks hold a model in parts, or it is told not to."""
    assert not CachedEngine()._decodes_statically(policy, [])
    assert engine.reason_against_static(policy) is None  # tried here, where the model is, and kept
    monkeypatch.setattr(engine, "device_of", lambda policy: torch.device("cuda"))
    assert CachedEngine()._decodes_statically(policy, [])
    assert not CachedEngine(static=False)._decodes_statically(policy, [])
    monkeypatch.setattr(engine, "holds_part", lambda: True)
    assert not CachedEngine()._decodes_statically(policy, [])


def test_bad_requests_and_bad_weights_are_named(policy, tiny_tokenizer):
    ask = [Request([1], [0]), Request([5] * 8, [0])]
    with pytest.raises(ValueError, match=r"request 1: a prompt of 8 tokens.*max_live_tokens 12"):
        CachedEngine(max_live_tokens=12, static=True).generate(policy, tiny_tokenizer, ask, Sampling(8), [])
    with pytest.raises(ValueError, match="request 0: the prompt has no tokens"):
        CachedEngine(static=True).generate(policy, tiny_tokenizer, [Request([], [0])], Sampling(8), [])
    assert CachedEngine(static=True).generate(policy, tiny_tokenizer, [], Sampling(4), []) == []
    policy.transformer.lm_head.weight.data[7] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        CachedEngine(static=True).generate(policy, tiny_tokenizer, ask, Sampling(40), [])


# ------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("fails", [False, True])
def test_adapters_are_merged_and_the_policy_stays_as_it_was(fails, make_model, prompts, tiny_tokenizer, monkeypatch):
    policy = Policy(lora(make_model("Llama")))
    policy.train()
    asked = requests(prompts)
    want = CachedEngine().generate(policy, tiny_tokenizer, asked, Sampling(24), STOPS)
    before, seen, push = state_of(policy), Counter(), ActiveSequence.push

    def watched(self, *more):
        layers = [m for m in policy.model.modules() if hasattr(m, "merged")]
        seen.update(layer.merged for layer in layers)
        seen["rows"] += 1
        if fails and seen["rows"] > 30:
            raise OSError("the power is out")
        push(self, *more)

    monkeypatch.setattr(ActiveSequence, "push", watched)
    run = CachedEngine(static=True).generate
    if fails:
        with pytest.raises(OSError, match="power"):
            run(policy, tiny_tokenizer, asked, Sampling(24), STOPS)
    else:
        check_same(want, run(policy, tiny_tokenizer, asked, Sampling(24), STOPS), abs=1e-4)
    assert seen[True] and not seen[False]
    monkeypatch.undo()
    after = state_of(policy)
    for part, was in before.items():
        assert after[part] == was, part
    with policy.model.disable_adapter():
        off = [CachedEngine(static=way).generate(policy, tiny_tokenizer, asked, Sampling(24), STOPS) for way in (0, 1)]
        check_same(*off)
    assert ids(off[0]) != ids(want)


def test_a_head_that_embeddings_share_is_merged_apart(make_model, prompts, tiny_tokenizer):
    model = lora(make_model("Llama", tie_word_embeddings=True))
    policy = Policy(model)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings().get_base_layer()
    assert embeddings.weight is head.weight
    check_same(*both(policy, tiny_tokenizer, requests(prompts), Sampling(24)), abs=1e-4)
    with decoding_weights(model, CPU):
        assert embeddings.weight is not head.weight
    assert embeddings.weight is head.weight


@pytest.mark.parametrize("adapters", [False, True])
def test_weights_are_cast_once_under_autocast(adapters, make_model, prompts, tiny_tokenizer, graphs, monkeypatch):
    model = make_model("Llama")
    policy = Policy(lora(model, std=0.05) if adapters else model)
    weights = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}

    def casts():
        """Of weights, in the steps of now; and of anything."""
        shapes = [tuple(args[0].shape) for recording, _ in graphs for func, args, *_ in recording.operations
                  if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to)]  # fmt: skip
        graphs.clear()
        return len(weights & {*shapes}), len(shapes)

    with torch.autocast("cpu", torch.bfloat16):
        want, got = both(policy, tiny_tokenizer, requests(prompts), Sampling(16), [])
        assert casts()[0] == 0
        for a, b in zip(chain.from_iterable(want), chain.from_iterable(got), strict=True):
            if not adapters:
                assert (a.input_ids[0], a.logprobs[0]) == (b.input_ids[0], pytest.approx(b.logprobs[0], abs=1e-5))
            elif a.input_ids[0] == b.input_ids[0]:  # merged products round apart
                assert a.logprobs[0] == pytest.approx(b.logprobs[0], abs=0.1)
        monkeypatch.setattr(engine, "decoding_weights", lambda *args: nullcontext())
        both(policy, tiny_tokenizer, requests(prompts), Sampling(16), [])
        assert min(casts()) > 0, "weights that stay are cast in each step"
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_training_goes_on_after_rollouts(make_model, prompts, tiny_tokenizer):
    policy = Policy(lora(make_model("Llama"), std=0.05))
    policy.train()
    row = torch.tensor([prompts[3]])
    with torch.autocast("cpu", torch.bfloat16):
        CachedEngine(static=True).generate(policy, tiny_tokenizer, requests(prompts), Sampling(4), [])
        with policy.native_attention() as model:
            model(input_ids=row, labels=row, use_cache=False).loss.backward()
    trained = [p.grad for p in policy.parameters() if p.requires_grad]
    assert trained and all(grad is not None and grad.isfinite().all() for grad in trained)


def test_half_precision_is_merged_in_fp32(make_model, prompts, tiny_tokenizer):
    model = make_model("Llama").bfloat16()
    check_same(*both(Policy(model), tiny_tokenizer, requests(prompts), Sampling(16)), abs=0.05)
    adapted = lora(model)
    exact = {}
    for name, layer in adapted.named_modules():
        if hasattr(layer, "merged_adapters"):
            exact[name] = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
    with decoding_weights(adapted, CPU):
        for name, whole in exact.items():
            held = adapted.get_submodule(name).get_base_layer().weight
            assert held.dtype == torch.bfloat16 and torch.equal(held, whole.bfloat16())
    assert not any(getattr(layer, "merged", False) for layer in adapted.modules())


def test_adapters_that_can_not_be_merged_stay_apart(make_model, prompts, tiny_tokenizer, monkeypatch):
    policy = Policy(lora(make_model("Llama")))
    layers = [layer for layer in policy.model.modules() if hasattr(layer, "merged_adapters")]
    before = state_of(policy)

    def refuse(*args, **kwargs):
        raise RuntimeError("this variant cannot be merged")

    for layer in layers:
        monkeypatch.setattr(layer, "merge", refuse)
    with decoding_weights(policy.model, CPU):
        assert not any(layer.merged for layer in layers)
        assert state_of(policy)["tensors"] == before["tensors"]
    check_same(*both(policy, tiny_tokenizer, requests(prompts), Sampling(9)))


def test_layers_of_other_types_keep_their_weights(make_model, prompts, tiny_tokenizer):
    """As quantized ones are: what their weights mean is their own affair."""

    class Own(torch.nn.Linear):
        pass

    model = make_model("Llama")
    model.model.layers[0].self_attn.q_proj.__class__ = Own
    adapted = lora(model)
    layers = {name: layer for name, layer in adapted.named_modules() if hasattr(layer, "merged_adapters")}
    with decoding_weights(adapted, CPU):
        apart = [name for name, layer in layers.items() if not layer.merged]
        assert len(layers) == 5 and len(apart) == 1 and "layers.0.self_attn.q_proj" in apart[0]
    check_same(*both(Policy(adapted), tiny_tokenizer, requests(prompts), Sampling(9)), abs=1e-4)


# ------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("settings", SETTINGS[:-1], ids=str)
def test_the_chooser_is_the_sampler(settings):
    """Bit for bit, on the same logits, step after step; the vocabulary is larger than what top-p sorts first."""
    vocabulary, sampling = 3000, Sampling(12, **settings)
    prompts = [(1, 2, 3), (5,), (7, 7, 8), (9, 30)]
    rows = [ActiveSequence(p, 2**63 + i, sampling, frozenset(STOPS), None) for i, p in enumerate(prompts)]
    chooser = TokenChooser(sampling, STOPS, vocabulary, CPU)
    state, draw = first_state(rows, CPU, chooser.penalized), torch.Generator().manual_seed(0)
    for step in range(8):
        logits = torch.randn(4, vocabulary, generator=draw) * (0.3 if step % 2 else 3)
        logits[:, :20] += 4  # stops, and tokens that come again
        tokens, logprobs = sample_tokens(logits, rows)
        found = chooser.advance(logits, state)
        assert [part.tolist() for part in found] == [tokens, logprobs]
        for row, token in zip(rows, tokens, strict=True):
            row.ids.append(token)
        assert state.token.tolist() == tokens and state.done.tolist() == [t in STOPS for t in tokens]
        state.done.zero_()  # so that all go on
    assert max(len({*row.ids}) for row in rows) > 3
