"""Arguments of stages by short names, for tests that vary one at a time."""

from lightning_rlhf.models import Load
from lightning_rlhf.moved import MOVED
from lightning_rlhf.rl import GAE, KL, Critic, Loss, Rollout, Shaping, Updates

GROUPS = dict(critic=Critic, rollout=Rollout, kl=KL, shaping=Shaping, gae=GAE, loss=Loss, updates=Updates, load=Load)
#: Short names, and where their values go.
PLACES = {name: place for table in MOVED.values() for name, place in table.items() if "." in place}
PLACES |= {"critic_kind": "critic.kind", "trunk_grad": "critic.trunk_grad"}


def grouped(**given):
    """``grouped(kl_coef=0.1, lora=LoRA())`` is ``{"kl": KL(coef=0.1), "lora": LoRA()}``."""
    found, groups = {}, {}
    for name, value in given.items():
        group, _, field = PLACES.get(name, name).partition(".")
        if name == "kl_penalty" and value != "reward":
            groups.setdefault("kl", {})["estimator"] = value
            value = "loss"
        if name == "critic" and not isinstance(value, Critic):
            group, field = "critic", "pretrained"
        if field:
            groups.setdefault(group, {})[field] = value
        else:
            found[name] = value
    return found | {group: GROUPS[group](**fields) for group, fields in groups.items()}
