"""The memory of a rollout: keys and values of tokens that are sampled together."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from lightning_rlhf.plan.layout import Layout, Moment
from lightning_rlhf.plan.measure import Found
from lightning_rlhf.plan.shapes import Shape
from lightning_rlhf.rollout import CachedEngine, RemoteEngine
from lightning_rlhf.stages.rl import RLStage


class Sampled(NamedTuple):
    """Completions that are sampled together.

    Attributes:
        rows: Their number.
        tokens: Tokens in the cache when all are as long as they may be.
        rounds: How often as many follow, until an iteration has all.
    """

    rows: int
    tokens: int
    rounds: int


def sampled_together(module: RLStage, shape: Shape) -> Sampled:
    """Tells how many completions the engine decodes at once; none, if it decodes elsewhere."""
    if isinstance(module.engine, RemoteEngine):
        return Sampled(0, 0, 0)
    shares = shape.completions > 1
    each = shape.completions * shape.answer + shape.prompt * (1 if shares else shape.completions)
    total = shape.prompts * shape.completions
    engine: Any = module.engine
    limit = engine.max_live_tokens if isinstance(engine, CachedEngine) else None
    rows = total if limit is None else max(1, min(total, limit * shape.completions // each))
    if isinstance(engine, CachedEngine) and engine.max_rows is not None:
        rows = min(rows, engine.max_rows)
    return Sampled(rows, -(-rows * each // shape.completions), -(-total // rows))


def token_bytes(config: Any, item: int, tp: int) -> int:
    """Bytes of the keys and values of a token in all layers of a rank.

    Args:
        config: The policy's text model's.
        item: Bytes of a number.
        tp: Ranks that hold a copy of the model together.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * item // tp)


def rollout(
    module: RLStage, config: Any, shape: Shape, found: Found, layout: Layout, held: Moment, item: int
) -> Moment:
    """Tells what a rank holds while it samples. It holds whole weights and no gradients.

    Args:
        module: The stage.
        config: The policy's text model's.
        shape: The sizes of an iteration.
        found: What a rank without shares takes.
        layout: How ranks share it.
        held: What a rank holds between steps.
        item: Bytes of a number in a forward pass.
    """
    sampled = sampled_together(module, shape)
    engine: Any = module.engine
    prefilled = min(shape.prompts * shape.prompt, getattr(engine, "prefill_tokens", shape.prompt)) * (sampled.rows > 0)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    parts = Counter(
        {
            "weights": round(found.trained + found.frozen),
            "states": held.parts["states"],
            "offloaded": held.parts["offloaded"],
            "logits": 3 * 4 * sampled.rows * config.vocab_size // layout.tp,
            "temporary": prefilled * item * (4 * config.hidden_size + 3 * inner // layout.tp),
            "rollout cache": sampled.tokens * token_bytes(config, item, layout.tp),
        }
    )
    return Moment("rollout", parts)
