"""What was sampled in an iteration, as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_rlhf.data import Message
from lightning_rlhf.rewards import Samples
from lightning_rlhf.rl.experience import Experience


class Sampled(NamedTuple):
    """Completions of an iteration.

    Attributes:
        experience: They and what is known of them.
        samples: What rewards read of them; None where this rank has none.
        trees: Which of its trees are meant.
    """

    experience: Experience
    samples: Samples | None
    trees: Sequence[int]


def completion_records(sampled: Sampled, flat: Tensor) -> list[dict[str, Any]]:
    """Makes a record per completion.

    Args:
        sampled: Completions with scores. Those that nothing was learned from have no advantages.
        flat: (B,) bool: which groups of the experience have one score for all.

    Returns:
        Records with ``row``, ``prompt``, ``completion``, ``score``, ``score/PART`` of each part of the reward,
        ``reward/NAME`` of its further numbers, ``advantage`` (the mean over its tokens), ``length``, ``truncated``,
        ``flat``, ``learned`` (whether the loss has its tokens), and ``data/COLUMN`` of the prompt's further columns.
        None stands for what does not apply.
    """
    experience, samples, trees = sampled
    if samples is None or not trees:
        return []
    scored = experience.scored
    numbers: dict[str, Tensor] = {"score": experience.scores}
    if scored is not None:
        numbers |= {f"score/{name}": part for name, part in scored.parts.items()}
        numbers |= {f"reward/{name}": extra for name, extra in scored.extras.items()}
    lengths = experience.lengths
    learned = [False] * len(lengths)
    if len(experience.advantages):
        sums = experience.sum_by_sequence(experience.advantages).double()
        numbers["advantage"] = sums / sums.new_tensor(lengths)
        learned = (experience.sum_by_sequence(experience.weight) > 0).tolist()
    columns = {name: [x if math.isfinite(x) else None for x in c.double().tolist()] for name, c in numbers.items()}
    every, chosen, found = experience.group.tolist(), set(trees), []
    for i, tree in enumerate(every):
        if tree in chosen:
            found.append(
                {
                    "row": experience.rows[tree],
                    "prompt": _text(samples.prompts[i]),
                    "completion": samples.completions[i],
                    **{name: column[i] for name, column in columns.items()},
                    **({} if "advantage" in columns else {"advantage": None}),
                    "length": lengths[i],
                    "truncated": samples.truncated[i],
                    "flat": bool(flat[tree]),
                    "learned": learned[i],
                    **{f"data/{name}": values[i] for name, values in samples.columns.items()},
                }
            )
    return found


def _text(prompt: list[Message] | str) -> str:
    """A plain text as it is, a single message by its content, several with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
