"""From a request's fields to rows: limits, context, sampling settings."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from lightning_rlhf.rollout import Request, Sampling, sample_key
from lightning_rlhf.serving.errors import ApiError
from lightning_rlhf.serving.models import Served
from lightning_rlhf.serving.rows import Rows
from lightning_rlhf.serving.schema import SamplingBody
from lightning_rlhf.serving.server import Server


def open_rows(
    server: Server,
    served: Served,
    body: SamplingBody,
    prompts: Sequence[Sequence[int]],
    default_tokens: int | None,
    alternatives: int = 0,
) -> Rows:
    """Starts the answers of a request: ``n`` per prompt, in the order of the prompts.

    An answer depends on the model, its prompt, the seed, its number among the ``n``, and the sampling settings.

    Args:
        server: The server.
        served: The model.
        body: The request.
        prompts: Token ids of each prompt.
        default_tokens: Maximum number of tokens if the request gives none. None: what the context leaves.
        alternatives: Number of likeliest tokens to report beside each token.

    Raises:
        ApiError: The request is too large for the model or the server, or the server is busy.
    """
    check_load(server, served, body.n * len(prompts))
    seed = secrets.randbits(63) if body.seed is None else body.seed
    jobs = []
    for prompt in prompts:
        sampling = _sampling(body, answer_tokens(served, prompt, body.limit, default_tokens))
        jobs += [
            (Request(prompt, [sample_key(seed, i)], alternatives, served.adapter), sampling) for i in range(body.n)
        ]
    try:
        return Rows(served.worker, jobs, served.stops)
    except ValueError as error:
        raise ApiError(400, str(error)) from error


def check_load(server: Server, served: Served, rows: int) -> None:
    """Refuses rows that the server cannot take now, or ever.

    Raises:
        ApiError: There are too many.
    """
    most = server.limits.max_rows + server.limits.max_queue
    if rows > most:
        raise ApiError(400, f"n asks for {rows} answers in all, and this server takes at most {most}.", "n")
    if served.worker.unfinished + rows > most:
        message = f"{served.worker.unfinished} answers are unfinished, and {most} is the limit. Try again later."
        raise ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": "1"})


def answer_tokens(served: Served, prompt: Sequence[int], limit: int | None, default: int | None) -> int:
    """Returns the maximum number of tokens of an answer.

    Raises:
        ApiError: Prompt and answer exceed the context.
    """
    wanted, context = limit if limit is not None else default, served.context
    if context is None:
        if wanted is None:
            raise ApiError(400, f"The model {served.name} has no context length. Give max_tokens.", "max_tokens")
        return wanted
    left = context - len(prompt)
    if left < max(1, limit or 1):
        asked = "" if limit is None else f" and {limit} of the answer ({len(prompt) + limit} in all)"
        raise ApiError(
            400,
            f"This model's context is {context} tokens, but the request has {len(prompt)} tokens of the prompt{asked}. "
            "Shorten the prompt or lower the maximum.",
            "messages" if default is None else "prompt",
            "context_length_exceeded",
        )
    return left if wanted is None else min(left, wanted)


def _sampling(body: SamplingBody, max_new_tokens: int) -> Sampling:
    if body.min_tokens > max_new_tokens:
        raise ApiError(
            400, f"min_tokens is {body.min_tokens}, but an answer has at most {max_new_tokens} tokens.", "min_tokens"
        )
    return Sampling(
        max_new_tokens=max_new_tokens,
        min_new_tokens=body.min_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias={int(token): bias for token, bias in body.logit_bias.items()},
        stop_strings=body.stops,
    )


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The usage of a request in OpenAI's form."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
