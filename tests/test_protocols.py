"""Objects of one's own are taken for what they can do, whatever they inherit from."""

from types import SimpleNamespace

import lightning.pytorch as L
import pytest

from lightning_rlhf import KL, SampleCompletions, Sampling
from lightning_rlhf.protocols import DrawsSamples, stop_tokens_of
from lightning_rlhf.rl.checks import PTX, check_adaptive_kl, check_beside, check_lengths


class Texts:
    def longest(self, part):
        return 90


class Prompts(L.LightningDataModule):
    """Prompts of one's own, with texts beside them."""

    batch_size, beside, as_text = 8, {"ptx": Texts()}, True

    def longest(self, part):
        return {"train": 30, "val": 40}[part]

    def sample_prompts(self, n):
        return ["Once upon"] * n

    def sample_columns(self, n):
        return [{"wanted": i} for i in range(n)]


def test_lengths_of_ones_own_data_module_are_checked():
    check_lengths(Prompts(), ["train"], 16, {"the context": 46})
    with pytest.raises(ValueError, match=r"A prompt of 40 tokens and a completion .* have 56, over 46: the context"):
        check_lengths(Prompts(), ["train", "val"], 16, {"the context": 46})
    with pytest.raises(ValueError, match=r"A text of data.ptx has 90 tokens, over updates.micro_batch_tokens=80"):
        check_beside(PTX, 0.1, 80, Prompts())
    with pytest.raises(ValueError, match=r"A KL horizon of 1.0 is too short for 16 samples"):
        check_adaptive_kl(KL(target=1.0, horizon=1.0), 2, Prompts())
    for check in (lambda: check_lengths(None, ["train"], 16, {"it": 1}), lambda: check_beside(PTX, 0.1, 80, object())):
        check()  # who knows no lengths can't be refused


def test_sample_prompts_of_ones_own_data_module():
    callback = SampleCompletions(num_prompts=2)
    found = callback._find(SimpleNamespace(datamodule=Prompts()))
    assert [(prompt, columns) for _, prompt, columns in found] == [("Once upon", {"wanted": i}) for i in range(2)]
    with pytest.raises(ValueError, match=r"use a data module with sample_prompts\(n\) and sample_columns\(n\)"):
        callback._find(SimpleNamespace(datamodule=Texts()))


def test_a_module_of_ones_own_says_how_it_samples():
    module = SimpleNamespace(sampling=Sampling(stop_strings=["."]), samples_per_prompt=3, stop_token_ids=[5, 2])
    assert isinstance(module, DrawsSamples) and stop_tokens_of(module) == (5, 2)
    assert list(SampleCompletions()._sampling(module).stop_strings) == ["."]
    assert not SampleCompletions()._sampling(object()).stop_strings and not stop_tokens_of(object())
