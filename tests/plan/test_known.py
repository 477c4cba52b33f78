"""Layouts of large models whose answer is known, from configs alone."""

from types import SimpleNamespace

import pytest

from lightning_rlhf import Load, LoRA, PPOModule, Rollout, Sampling, SFTModule, Updates
from lightning_rlhf.plan import Device, Planner, Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EIGHT = Settings(8, 80 * 10**9, Device(), "bf16-mixed")


def lengths(prompts, completions):
    return [0.0 for _ in completions]


def test_ppo_of_a_7b_with_four_models(large_config):
    model = large_config(4096, 32, 32, 32, 11008)
    module = PPOModule(
        model,
        lengths,
        rollout=Rollout(sampling=Sampling(max_new_tokens=512)),
        updates=Updates(micro_batch_tokens=4096),
        load=Load("bfloat16", gradient_checkpointing=True),
    )
    planner = Planner(module, SimpleNamespace(max_length=512, batch_size=128, max_tokens=None), EIGHT)
    zero, gemini = (planner.answer(planner.layout(plugin)) for plugin in ("zero2", "gemini"))
    # three models in 16 bits on each rank, and states of 12 bytes of two of them over 8 ranks
    billion = 6.738e9
    assert zero.most.parts["weights"] == pytest.approx(3 * 2 * billion, rel=0.03)
    assert zero.most.parts["states"] == pytest.approx(2 * 12 / 8 * billion, rel=0.03)
    assert gemini.fits and gemini.most.on_device < zero.most.on_device
    # keys and values: 2 x 32 layers x 4,096 numbers of 2 bytes a token, 16 rows of 1,024
    assert gemini.places[0].parts["rollout cache"] == 16 * 1024 * 2 * 32 * 4096 * 2


@pytest.mark.exhaustive
def test_lora_of_a_70b(large_config):
    model = large_config(8192, 80, 64, 8, 28672)
    module = SFTModule(model, lora=LoRA(r=16), load=Load("bfloat16", gradient_checkpointing=True))
    planner = Planner(module, SimpleNamespace(max_length=4096, batch_size=8, max_tokens=4096), EIGHT)
    whole, cut = (planner.answer(planner.layout("ddp", tp)) for tp in (1, 4))
    assert not whole.fits and whole.most.parts["weights"] == pytest.approx(2 * 69e9, rel=0.03)
    assert cut.fits and cut.most.parts["weights"] == pytest.approx(2 * 69e9 / 4, rel=0.03)
