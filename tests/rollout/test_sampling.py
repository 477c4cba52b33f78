"""Tokens come from the right distribution, log-probs are of the right one, and neither sees its neighbors."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_rlhf.rollout import Sampling
from lightning_rlhf.rollout import sampling as module
from lightning_rlhf.rollout.sampling import likeliest_tokens, sample_tokens
from lightning_rlhf.rollout.sequence import ActiveSequence

VOCABULARY = 12
LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)) * 1.5
PROMPT = (3, 3, 7)
EVERYTHING = dict(temperature=0.6, top_k=6, top_p=0.9, repetition_penalty=1.8)


def rows(n, prompt=PROMPT, stops=(), first=0, **settings):
    return [
        ActiveSequence(prompt, key, Sampling(**settings), frozenset(stops), None) for key in range(first, first + n)
    ]


def pvalue(counts, want):
    """Of Pearson's chi-square test that counts come from a distribution like ``want``."""
    want = want.double() * (counts.sum() / want.sum())
    statistic = ((counts - want) ** 2 / want).sum()
    return torch.special.gammaincc(torch.tensor((len(want) - 1) / 2).double(), statistic / 2).item()


def expected(logits, prompt, s):
    """By transformers' own processors."""
    steps = LogitsProcessorList()
    if s.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.temperature != 1:
        steps.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        steps.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        steps.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        steps.append(MinPLogitsWarper(s.min_p))
    return steps(torch.tensor([prompt]), logits[None].clone())[0].softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(temperature=0.5),
        dict(temperature=2.5),
        dict(top_k=4),
        dict(top_k=1),
        dict(top_k=100),
        dict(top_p=0.7),
        dict(top_p=0.05),
        dict(top_k=5, top_p=0.6),
        dict(min_p=0.2),
        dict(min_p=1.0),
        dict(min_p=0.1, top_p=0.9, temperature=1.5),
        dict(min_p=0.05, top_k=7),
        dict(repetition_penalty=2.0),
        dict(repetition_penalty=0.5, temperature=0.8),
        EVERYTHING,
    ],
    ids=str,
)
def test_tokens_have_the_exact_distribution(settings):
    n = 6_000
    tokens, logprobs = sample_tokens(LOGITS.expand(n, -1), rows(n, **settings))
    want = expected(LOGITS, PROMPT, Sampling(**settings)).double()
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCABULARY)
    possible = want > 0
    assert counts[~possible].sum() == 0
    assert possible.sum() == 1 or pvalue(counts[possible], want[possible]) > 1e-3
    # kept before every processor, but at the temperature
    plain = (LOGITS / settings.get("temperature", 1.0)).log_softmax(-1)
    torch.testing.assert_close(torch.tensor(logprobs), plain[tokens], atol=1e-5, rtol=0)


def test_steps_and_keys_are_independent():
    """Of one key over many steps, and of neighbors at one step: pairs of tokens have the product distribution."""
    n = 6_000
    many = rows(n)
    first, _ = sample_tokens(LOGITS.expand(n, -1), many)
    for row in many:
        row.ids = [0]
    second, _ = sample_tokens(LOGITS.expand(n, -1), many)
    p = LOGITS.softmax(-1).double()
    product = (p[:, None] * p).flatten()
    for a, b in [(first, second), (first[:-1:2], first[1::2])]:
        pairs = torch.bincount(torch.tensor(a) * VOCABULARY + torch.tensor(b), minlength=VOCABULARY**2)
        often = product * len(a) > 5
        counts = torch.cat([pairs[often], pairs[~often].sum()[None]])
        want = torch.cat([product[often], product[~often].sum()[None]])
        assert pvalue(counts, want) > 1e-3


def test_unlikely_tokens_keep_their_chance():
    """Three hundred tokens of probability 1e-5 each."""
    logits = torch.full((301,), 1e-5).log()
    logits[0] = 0.0
    n = 30_000
    tokens, _ = sample_tokens(logits.expand(n, -1), rows(n))
    assert abs(sum(token > 0 for token in tokens) - 90) < 40  # four standard deviations
    assert len(set(tokens)) > 60


def test_rows_do_not_see_their_neighbors():
    """Greedy, plain, cut and penalized rows in one batch, in any order, draw what they draw alone."""
    mixed = [
        *rows(5, temperature=0),
        *rows(5, first=5),
        *rows(5, first=10, top_k=3),
        *rows(5, first=15, top_p=0.8, temperature=0.7),
        *rows(5, first=20, **EVERYTHING),
        *rows(5, first=25, max_new_tokens=9, min_new_tokens=3, stops=[int(LOGITS.argmax())], temperature=0.2),
    ]
    logits = torch.randn(len(mixed), VOCABULARY, generator=torch.Generator().manual_seed(1)) + LOGITS
    alone = [tuple(x[0] for x in sample_tokens(logits[i : i + 1], [row])) for i, row in enumerate(mixed)]
    for seed in range(3):
        order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed)).tolist()
        together = list(zip(*sample_tokens(logits[order], [mixed[i] for i in order]), strict=True))
        for i, (token, logprob) in zip(order, together, strict=True):
            assert token == alone[i][0] and logprob == pytest.approx(alone[i][1], abs=1e-6)


def test_chunks_of_noise_change_nothing(monkeypatch):
    many = rows(50)
    logits = torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(1))
    want = sample_tokens(logits, many)
    monkeypatch.setattr(module, "_CHUNK", 7 * VOCABULARY)
    assert sample_tokens(logits, many) == want


def test_a_nucleus_wider_than_the_first_look_is_exact(monkeypatch):
    """Flat rows are sorted whole; peaked ones beside them are not, with the same tokens either way."""
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(1))
    logits[::2] *= 4
    some = rows(40, top_p=0.9)
    narrow, _ = sample_tokens(logits, some)
    monkeypatch.setattr(module, "NUCLEUS", 3000)
    assert sample_tokens(logits, some)[0] == narrow
    for row, token in enumerate(narrow):
        assert expected(logits[row], PROMPT, Sampling(top_p=0.9))[token] > 0
    assert max(int((logits[i] > logits[i, t]).sum()) for i, t in enumerate(narrow)) > 1024


def test_stop_tokens_are_impossible_before_the_minimum():
    stop = int(LOGITS.argmax())
    (row,) = rows(1, temperature=0, max_new_tokens=9, min_new_tokens=2, stops=[stop])
    tokens, logprobs = sample_tokens(LOGITS[None], [row])
    assert tokens == [int(LOGITS.topk(2).indices[1])]
    assert logprobs[0] == pytest.approx(LOGITS.log_softmax(-1)[tokens[0]].item(), abs=1e-6)
    row.ids = [0, 0]
    assert sample_tokens(LOGITS[None], [row])[0] == [stop]


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("least", [0, 3])
def test_scores_equal_those_of_transformers_processors(penalty, least):
    """Bit for bit, in every step of rows that join late or have ended; afterwards the logits are what they were."""
    vocabulary, stops = 50_000, [3, 49_999]
    settings = Sampling(9, temperature=0, repetition_penalty=penalty, min_new_tokens=least)
    draw = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(vocabulary, (n,), generator=draw).tolist()) for n in (40, 1, 7)]
    prompts[1] = (3, *prompts[1] * 3, 3)  # a stop token, and tokens that come again
    many = [ActiveSequence(p, i, settings, frozenset(stops), None) for i, p in enumerate(prompts)]
    for step in range(6):
        active = many if step else many[:2]
        logits = torch.randn(len(active), vocabulary, generator=draw) * 3
        logits[:, stops] += 20
        kept = logits.clone()
        with module._processed(logits, active):
            scores = logits.clone()
        assert torch.equal(logits, kept)
        tokens, logprobs = sample_tokens(logits, active)
        assert torch.equal(logits, kept)
        for i, row in enumerate(active):
            wanted = LogitsProcessorList([
                RepetitionPenaltyLogitsProcessor(penalty),
                MinNewTokensLengthLogitsProcessor(len(row.prompt), least, stops),
            ])(torch.tensor([[*row.prompt, *row.ids]]), kept[i : i + 1].clone())[0]  # fmt: skip
            assert torch.equal(scores[i], wanted)
            assert tokens[i] == wanted.argmax() and logprobs[i] == kept[i].log_softmax(-1)[tokens[i]]
            if i != 1 or step < 2:  # the other one has ended
                row.ids.append(tokens[i])
    assert [len(row.ids) for row in many] == [6, 2, 5]


def test_half_precision_is_scored_in_fp32():
    half = LOGITS.bfloat16()[None]
    tokens, logprobs = sample_tokens(half, rows(1))
    assert logprobs[0] == pytest.approx(half.float().log_softmax(-1)[0, tokens[0]].item(), abs=1e-6)


@pytest.mark.parametrize("settings", [dict(), dict(temperature=0), dict(top_p=0.9), dict(top_k=3), EVERYTHING], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_end_their_own_row(bad, settings):
    want = sample_tokens(LOGITS.expand(2, -1), rows(2, **settings))
    logits = LOGITS.repeat(2, 1)
    logits[1, 4] = bad
    both = rows(2, **settings)
    tokens, logprobs = sample_tokens(logits, both)
    assert (tokens[0], logprobs[0]) == (want[0][0], want[1][0])
    both[1].push(tokens[1], logprobs[1])
    with pytest.raises(FloatingPointError, match="not finite"):
        both[1].future.result(0)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_penalties_and_biases_follow_their_definition(temperature):
    """logit - presence [count > 0] - frequency count + bias, of the completion alone, before the temperature."""
    settings = dict(presence_penalty=0.7, frequency_penalty=-0.4, logit_bias={2: 1.5, 9: -0.5}, temperature=temperature)
    n, said = 20_000, [2, 2, 5, 2]
    many = rows(n, **settings)
    for row in many:
        row.ids = [*said]
    tokens, logprobs = sample_tokens(LOGITS.expand(n, -1), many)
    wanted = LOGITS.clone()
    for token in range(VOCABULARY):  # 3 and 7 are in the prompt, which does not count
        wanted[token] -= 0.7 * (token in said) - 0.4 * said.count(token)
    wanted[2] += 1.5
    wanted[9] -= 0.5
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCABULARY)
    assert pvalue(counts, (wanted / temperature).softmax(-1)) > 1e-3
    plain = (LOGITS / temperature).log_softmax(-1)
    torch.testing.assert_close(torch.tensor(logprobs), plain[tokens], atol=1e-5, rtol=0)
    (greedy,) = rows(1, **{**settings, "temperature": 0.0})
    greedy.ids = [*said]
    assert sample_tokens(LOGITS[None], [greedy])[0] == [int(wanted.argmax())]


def test_a_wide_min_p_is_exact(monkeypatch):
    """Rows with more likely tokens than the first look sorts."""
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(1)) * 0.1
    narrow, _ = sample_tokens(logits, some := rows(40, min_p=0.6))
    monkeypatch.setattr(module, "NUCLEUS", 3000)
    assert sample_tokens(logits, some)[0] == narrow
    assert max(int((logits[i] > logits[i, t]).sum()) for i, t in enumerate(narrow)) > 1024


def test_alternatives_are_the_likeliest_tokens():
    row = ActiveSequence(PROMPT, 0, Sampling(temperature=0.5, top_k=1), frozenset(), None, alternatives=3)
    found = likeliest_tokens(LOGITS, row)
    values, ids = (LOGITS / 0.5).log_softmax(-1).topk(3)
    assert [i for i, _ in found] == ids.tolist()
    assert [v for _, v in found] == pytest.approx(values.tolist())


def test_the_global_generator_is_not_drawn_from():
    before = torch.get_rng_state()
    sample_tokens(LOGITS.expand(4, -1), rows(4, **EVERYTHING))
    assert torch.equal(before, torch.get_rng_state())
