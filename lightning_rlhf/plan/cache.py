"""What a rollout takes: keys and values of tokens that are sampled together."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from lightning_rlhf.models.loading import load_config
from lightning_rlhf.plan.layout import Layout, Moment
from lightning_rlhf.plan.measure import Found
from lightning_rlhf.plan.shapes import Shape
from lightning_rlhf.rollout import CachedEngine
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
    """Tells how many completions the engine decodes at once."""
    shares = shape.completions > 1
    each = shape.completions * shape.answer + shape.prompt * (1 if shares else shape.completions)
    total = shape.prompts * shape.completions
    engine: Any = module.engine
    limit = engine.max_live_tokens if isinstance(engine, CachedEngine) else None
    rows = total if limit is None else max(1, min(total, limit * shape.completions // each))
    if isinstance(engine, CachedEngine) and engine.max_rows is not None:
        rows = min(rows, engine.max_rows)
    return Sampled(rows, -(-rows * each // shape.completions), -(-total // rows))


def token_bytes(module: RLStage, item: int, tp: int) -> int:
    """Bytes of the keys and values of a token in all layers of a rank.

    Args:
        module: The stage.
        item: Bytes of a number.
        tp: Ranks that hold a copy of the model together.
    """
    config: Any = load_config(module.pretrained, module.load.trust_remote_code)  # type: ignore[arg-type]
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * item // tp)


def rollout(module: RLStage, shape: Shape, found: Found, layout: Layout, held: Moment, item: int) -> Moment:
    """What a rank holds while it samples: no gradients, and whole weights.

    Args:
        module: The stage.
        shape: What an iteration has.
        found: What a rank without shares takes.
        layout: How ranks share it.
        held: What a rank holds between steps.
        item: Bytes of a number in a forward pass.
    """
    sampled = sampled_together(module, shape)
    config: Any = load_config(module.pretrained, module.load.trust_remote_code)  # type: ignore[arg-type]
    text = config.get_text_config()
    engine: Any = module.engine
    prefilled = min(shape.prompts * shape.prompt, getattr(engine, "prefill_tokens", shape.prompt))
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    parts = Counter(
        {
            "weights": round(found.trained + found.frozen),
            "states": held.parts["states"],
            "offloaded": held.parts["offloaded"],
            "logits": 3 * 4 * sampled.rows * text.vocab_size // layout.tp,
            "temporary": prefilled * item * (4 * text.hidden_size + 3 * inner // layout.tp),
            "rollout cache": sampled.tokens * token_bytes(module, item, layout.tp),
        }
    )
    return Moment("rollout", parts)
