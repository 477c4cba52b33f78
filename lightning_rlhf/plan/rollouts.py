"""One iteration of reinforcement learning without sampling: the passes that score a micro-batch, and an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_rlhf.models.backbone import is_checkpointing
from lightning_rlhf.plan.fakes import real_tensors
from lightning_rlhf.plan.shapes import Shape
from lightning_rlhf.rewards.model import RewardModelReward
from lightning_rlhf.rl import Experience, UpdateStats
from lightning_rlhf.stages.rl import RLStage

#: Name of the stretch in which updates begin.
UPDATE = "update"


def iteration(
    module: RLStage, shape: Shape, begin: Callable[[str], None], may_reuse: bool, batch: Any, batch_idx: int
) -> None:
    """Stands for ``training_step``: an iteration after its rollout, with one update.

    Args:
        module: The stage.
        shape: Its micro-batch.
        begin: Is told where updates begin.
        may_reuse: An update may go back through the passes that score, as it can't in sharded models.
        batch: Unused, as ``batch_idx``.
        batch_idx: See above.
    """
    reuses = may_reuse and module.updates.reuse_forward and module.updates.minibatches == shape.passes == 1
    kept: dict[str, Any] | None = {} if reuses and not is_checkpointing(module.policy.transformer) else None
    _score(module, micro_batch(shape, kept))
    begin(UPDATE)
    weight = torch.ones(shape.rows * shape.answers * shape.answer) / shape.tokens
    for _ in range(min(2, shape.passes)):
        for loss in module.compute_losses(micro_batch(shape, kept), weight, UpdateStats()):
            module.updater.backward(loss)
    module.updater.step(module.trainable_parameters(), 1.0, module.updates.max_grad_norm, count=True)


def micro_batch(shape: Shape, kept: dict[str, Any] | None) -> Experience:
    """A micro-batch of completions of which everything is known.

    Args:
        shape: Its size.
        kept: Where outputs of scoring passes are kept for the update. None: they are not.
    """
    sequences = shape.rows * shape.answers
    names = ("rollout_logprobs", "old_logprobs", "reference_logprobs", "entropies", "values", "returns")
    more = ("advantages", "weight", "share", "factor")
    columns: dict[str, Any] = {name: torch.ones(sequences * shape.answer) for name in (*names, *more)}
    found = Experience(
        shape.trees(),
        tuple(range(shape.rows)),
        last_values=torch.ones(sequences),
        scores=torch.ones(sequences),
        truncated=torch.ones(sequences, dtype=torch.bool),
        cached_outputs=kept,
        **columns,
    )
    with real_tensors():
        found.batch  # noqa: B018 - it is packed where it is first asked for
    return found


@torch.no_grad()
def _score(module: RLStage, experience: Experience) -> None:
    """The passes of all models before the updates, in the order of the stage's."""
    batch, temperature = experience.batch, module.sampling.temperature
    for reward in module.reward.modules():
        if isinstance(reward, RewardModelReward):
            reward.model(batch, normalize=True)
    if module.needs_reference:
        module.actors.forward("reference", batch, temperature=temperature)
    module.forward_for_scoring("policy", experience, temperature=temperature, entropy=True)
    critic = module.critic_settings
    if critic is not None and critic.kind_for(module.lora) != "head":
        module.forward_for_scoring("critic", experience)
