"""Means over tokens do not depend on how the tokens came."""

import pytest
import torch

from lightning_rlhf.metrics import Perplexity, TokenMean, perplexity, token_mean


@pytest.mark.parametrize("cuts", [[100], [1, 99], [30, 30, 40]])
def test_any_split_gives_the_mean_over_all_tokens(cuts):
    g = torch.Generator().manual_seed(0)
    values, weight = torch.randn(100, generator=g), torch.randint(0, 2, (100,), generator=g).float()
    mean, ppl = TokenMean(), Perplexity()
    for v, w in zip(values.split(cuts), weight.split(cuts), strict=True):
        mean.update(v, w)
        ppl.update(-v.abs(), w)
    want = values[weight > 0].double().mean()
    assert mean.compute() == pytest.approx(want.item(), abs=1e-7)
    assert token_mean(values, weight).item() == pytest.approx(want.item(), abs=1e-6)
    assert ppl.compute() == pytest.approx(perplexity(-values.abs(), weight).item(), rel=1e-6)


def test_a_metric_reset_under_inference_mode_takes_updates_outside_it():
    metric = TokenMean()
    with torch.inference_mode():
        metric.update(torch.ones(2), torch.ones(2))
        metric.reset()
    metric.update(torch.full((2,), 3.0), torch.ones(2))
    assert metric.compute() == 3
