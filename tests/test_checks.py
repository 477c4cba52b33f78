"""What a command line refuses is refused in Python too: every choice, every number, every bool of what users make."""

import inspect
import math
from typing import Literal, get_args, get_origin

import numpy as np
import pytest

from lightning_rlhf import (
    GAE,
    KL,
    Algorithm,
    Critic,
    DPOModule,
    GroupLoss,
    Groups,
    GRPOModule,
    InstructionDataModule,
    KTOModule,
    Load,
    Loss,
    PairShaping,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    Ptx,
    RewardModule,
    Rollout,
    Sampling,
    SFTModule,
    Shaping,
    UnpairedDataModule,
    Updates,
    WeightedLoss,
)
from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.moved import MOVED
from lightning_rlhf.stages.optim import CosineWarmup
from lightning_rlhf.stages.rl import RLStage


def score(prompts, completions):
    return [0.0] * len(completions)


ROWS = [{"prompt": "a", "completion": "b"}]
OWNERS = {
    SFTModule: dict(pretrained="nowhere"),
    RewardModule: dict(pretrained="nowhere"),
    DPOModule: dict(pretrained="nowhere"),
    KTOModule: dict(pretrained="nowhere"),
    PPOModule: dict(pretrained="nowhere", reward=score),
    GRPOModule: dict(pretrained="nowhere", reward=score),
    InstructionDataModule: dict(train=ROWS),
    PreferenceDataModule: dict(train=ROWS),
    UnpairedDataModule: dict(train=ROWS),
    PromptDataModule: dict(train=ROWS),
    WeightedLoss: dict(name="sft"),
    **{
        group: {}
        for group in (
            Sampling,
            Ptx,
            Load,
            Rollout,
            KL,
            Shaping,
            Critic,
            GAE,
            Loss,
            GroupLoss,
            Groups,
            Updates,
            PairShaping,
        )
    },
    Algorithm: {},
}
LEAST = {  # the last that is right, and the first that is wrong
    "at least 1": (1, 0),
    "at least 0": (0, -1),
    "above 0": (1e-9, 0.0),
    "at least 0 and at most 1": (1, 1.5),
    "at least 0 and below 1": (0.5, 1.0),
    "above 0 and below 1": (0.5, 1.0),
}


def arguments():
    """Each argument of a known kind: its owner, name, kinds and whether it may be None."""
    for owner in OWNERS:
        for name, hint in inspect.get_annotations(owner.__init__, eval_str=True).items():
            kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
            if get_origin(hint) is Literal:
                kinds = [hint]
            if len(kinds) == 1 and (kinds[0] in (int, float, bool) or get_origin(kinds[0]) is Literal):
                yield pytest.param(owner, name, kinds[0], id=f"{owner.__name__}.{name}")


@pytest.mark.parametrize(("owner", "name", "kind"), arguments())
def test_no_argument_takes_what_is_none_of_its_kind(owner, name, kind):
    wrong = {int: [2.5, "3", True, math.nan], float: ["0.1", math.nan, True], bool: ["no", 1, None]}
    for value in wrong.get(kind, ["tokens", 0, True]):
        with pytest.raises(ValueError, match=rf"\b{name} (must be|is) "):
            owner(**{**OWNERS[owner], name: value})


RANGES = [
    (Rollout, "at least 1", ["samples_per_prompt"]),
    (Updates, "at least 1", ["epochs", "minibatches", "micro_batch_tokens", "max_skipped"]),
    (Updates, "above 0", ["target_kl", "max_grad_norm"]),
    (KL, "at least 0", ["coef"]),
    (KL, "above 0", ["target", "horizon"]),
    (Loss, "at least 0", ["clip_high", "entropy_coef", "ptx_coef"]),
    (Loss, "at least 0 and at most 1", ["clip_low"]),
    (GAE, "at least 0 and at most 1", ["gamma", "lam"]),
    (Critic, "at least 0", ["lr", "loss_coef"]),
    (Critic, "above 0", ["clip"]),
    (Shaping, "at least 0", ["missing_eos_penalty"]),
    (Shaping, "above 0", ["clip"]),
    (SFTModule, "at least 1", ["max_skipped"]),
    (RewardModule, "at least 1", ["max_skipped"]),
    (RewardModule, "at least 0", ["centering_coef"]),
    (DPOModule, "at least 1", ["max_skipped"]),
    (DPOModule, "above 0", ["beta"]),
    (PairShaping, "at least 0", ["length_alpha"]),
    (PairShaping, "at least 0 and at most 1", ["ld_alpha"]),
    (PairShaping, "above 0 and below 1", ["f_alpha"]),
    (WeightedLoss, "above 0", ["weight"]),
    *(
        (kind, rule, names)
        for kind in (InstructionDataModule, PreferenceDataModule, PromptDataModule)
        for rule, names in {
            "at least 1": ["batch_size", "eval_batch_size", "max_length", "streaming_window"],
            "at least 0": ["num_proc"],
            "at least 0 and below 1": ["val_fraction"],
        }.items()
    ),
    (InstructionDataModule, "at least 1", ["max_tokens"]),
    (PreferenceDataModule, "at least 0", ["num_workers"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "name", "rule"),
    [pytest.param(owner, name, rule, id=f"{owner.__name__}.{name}") for owner, rule, names in RANGES for name in names],
)
def test_every_number_has_its_range(owner, name, rule, tiny_model_dir):
    given = {**OWNERS[owner], **({"pretrained": tiny_model_dir} if "pretrained" in OWNERS[owner] else {})}
    right, wrong = LEAST[rule]
    with pytest.raises(ValueError, match=rf"^(\w+\.)?{name} must be {rule}, got {wrong}"):
        owner(**{**given, name: wrong})
    owner(**{**given, name: right})


def test_words_name_the_choices():
    with pytest.raises(ValueError, match=r"loss\.aggregation is 'tokens'. Choose one of: token, sequence"):
        Loss(aggregation="tokens")
    with pytest.raises(ValueError, match=r"sampling\.max_new_tokens must be a whole number, got 2.5"):
        Sampling(max_new_tokens=2.5)
    with pytest.raises(ValueError, match="k1 cannot be a loss"):
        KL(where="loss", estimator="k1")
    with pytest.raises(ValueError, match=r"set kl\.coef above 0"):
        KL(coef=0.0, target=6.0)


def test_numbers_of_numpy_are_numbers():
    def f(a: int, b: float, c: bool = True, d: float | None = None) -> None: ...

    check_arguments(f, dict(a=np.int64(3), b=np.float32(0.5), c=np.bool_(False), d=None), a=Range(3), b=Range(0, 1))
    check_arguments(f, dict(a=3, b=1))


@pytest.mark.parametrize("wrong", [dict(warmup=-0.1), dict(final=1.5), dict(total_steps=0), dict(final=math.nan)])
def test_a_schedule_has_ranges_too(wrong):
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        CosineWarmup(optimizer, **wrong)


def test_former_names_are_not_arguments_and_their_places_are():
    classes = {**globals(), "max_skipped": None}
    for owner, table in MOVED.items():
        for name, place in table.items():
            group, _, field = place.partition(".")
            parameters = inspect.signature(classes[owner]).parameters
            assert name not in parameters and group in parameters, name
            if field:
                assert field in inspect.signature(classes[parameters[group].annotation]).parameters, place


def test_former_names_are_refused_in_python_with_what_to_write():
    with pytest.raises(TypeError, match=r"PPOModule: kl_coef is kl\.coef now\. Write kl=KL\(coef=\.\.\.\)"):
        PPOModule("nowhere", score, kl_coef=0.1)
    with pytest.raises(TypeError, match=r"Write load=Load\(quantization=\.\.\.\)"):
        SFTModule("nowhere", quantization="nf4")
    with pytest.raises(TypeError, match=r"Write centering_coef=\.\.\."):
        RewardModule("nowhere", center=0.1)
    with pytest.raises(TypeError, match=r"Own: target_kl is updates\.target_kl now\. Write updates=Updates\("):
        type("Own", (RLStage,), {})("nowhere", score, target_kl=0.1)
    with pytest.raises(TypeError, match="PreferenceDataModule: streaming is streaming_window now"):
        PreferenceDataModule("nowhere", streaming=True)
    with pytest.raises(TypeError, match=r"PromptDataModule: ptx_max_length is ptx\.max_length now\. Write ptx=Ptx\("):
        PromptDataModule("nowhere", ptx_max_length=8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        InstructionDataModule("nowhere", nothing=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        SFTModule("nowhere", nothing=1)
    assert list(inspect.signature(PPOModule).parameters)[:3] == ["pretrained", "reward", "critic"]
