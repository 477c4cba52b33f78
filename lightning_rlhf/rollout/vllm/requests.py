"""What the server is asked for a completion, and what it answers."""

from __future__ import annotations

from typing import Any, Literal

from lightning_rlhf.rollout.sequence import ActiveSequence
from lightning_rlhf.rollout.types import Sampling
from lightning_rlhf.rollout.vllm.client import VLLMError

#: What of a distribution the server's log-probs are: the values of its option ``--logprobs-mode``, without their end.
LogProbs = Literal["raw", "processed"]


def check_sampling(sampling: Sampling, logprobs: LogProbs) -> None:
    """Refuses settings that the server would change, or whose log-probs would be others than the stages need.

    Args:
        sampling: Sampling settings.
        logprobs: Which log-probs the server sends.

    Raises:
        ValueError: It is one; the message names it.
    """
    s = sampling
    for name, value, fits, rule in (
        ("temperature", s.temperature, s.temperature == 0 or s.temperature >= 0.01, "0 or at least 0.01"),
        ("repetition_penalty", s.repetition_penalty, s.repetition_penalty <= 2, "at most 2"),
        ("presence_penalty", s.presence_penalty, -2 <= s.presence_penalty <= 2, "between -2 and 2"),
        ("frequency_penalty", s.frequency_penalty, -2 <= s.frequency_penalty <= 2, "between -2 and 2"),
        ("logit_bias", s.logit_bias, all(-100 <= v <= 100 for v in s.logit_bias.values()), "between -100 and 100"),
    ):
        if not fits:
            raise ValueError(f"VLLMEngine: sampling.{name}={value!r}, and vLLM takes only {rule}.")
    if logprobs == "raw" and s.temperature not in (0, 1):
        raise ValueError(
            f"VLLMEngine: sampling.temperature={s.temperature}, and vLLM's raw log-probs are those of temperature 1. "
            "Sample at 1, or start the server with --logprobs-mode processed_logprobs and set engine.logprobs to "
            "processed."
        )
    off = Sampling()
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
             "min_new_tokens")  # fmt: skip
    changed = [name for name in names if getattr(s, name) != getattr(off, name)] if logprobs == "processed" else []
    if changed:
        raise ValueError(
            f"VLLMEngine: vLLM's processed log-probs are those after sampling.{changed[0]}={getattr(s, changed[0])!r}, "
            "and the losses need those before. Leave it out, or set engine.logprobs to raw and temperature to 1."
        )


def completion_body(model: str, row: ActiveSequence) -> dict[str, Any]:
    """Returns the body of ``/v1/completions`` for a row: a function of its prompt, key and settings alone.

    Args:
        model: What the server calls the weights.
        row: The row. It has no tokens yet.
    """
    sampling = row.sampling
    return {
        "model": model,
        "prompt": list(row.prompt),
        "seed": row.key,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": {str(token): value for token, value in sampling.logit_bias.items()},
        "stop": list(sampling.stop_strings),
        "stop_token_ids": sorted(row.stops),
        "ignore_eos": True,  # the stops above, and no others
        "skip_special_tokens": False,  # stop strings may have them
        "logprobs": row.alternatives,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # names the alternatives by their ids
    }


def read_completion(answer: Any, row: ActiveSequence) -> None:
    """Gives a row the tokens of an answer. Text and end are the row's own, as with every engine.

    Args:
        answer: The JSON.
        row: The row that was asked for.

    Raises:
        VLLMError: There are no ids or log-probs, the prompt is another, or the answer ended too early.
    """
    try:
        [choice] = answer["choices"]
        ids, found = choice.get("token_ids"), choice.get("logprobs") or {}
        logprobs, likeliest = found.get("token_logprobs"), found.get("top_logprobs") or ()
        prompt = choice.get("prompt_token_ids")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise VLLMError(f"The vLLM server's answer has no choice: {str(answer)[:200]}") from None
    if not ids or not all(isinstance(i, int) for i in ids):
        raise VLLMError(
            "The vLLM server answered without token ids, and text can't be learned from. Use vLLM 0.10.2 or newer, "
            "which has return_token_ids."
        )
    short = row.alternatives and len(likeliest) != len(ids)
    if not isinstance(logprobs, list) or len(logprobs) != len(ids) or None in logprobs or short:
        raise VLLMError(
            f"The vLLM server answered {len(ids)} tokens without the log-prob of each, which the losses need. See its "
            "log and version."
        )
    if prompt is not None and tuple(prompt) != row.prompt:
        raise VLLMError(
            f"The vLLM server read a prompt of {len(prompt)} tokens in place of one of {len(row.prompt)}: it cuts or "
            "changes prompts. Start it without options that do."
        )
    for place, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        if row.done:
            return
        row.push(token, logprob, _likeliest(likeliest[place], row.alternatives) if row.alternatives else ())
    if not row.done:
        raise VLLMError(
            f"The vLLM server ended a completion after {len(ids)} tokens ({choice.get('finish_reason')}, "
            f"{choice.get('stop_reason')!r}), where neither a stop token, a stop string nor max_new_tokens="
            f"{row.sampling.max_new_tokens} ends it. See its log."
        )


def _likeliest(found: dict[str, float], count: int) -> list[tuple[int, float]]:
    """Reads tokens such as ``token_id:7``; the sampled one may be among them beside so many others."""
    every = [(int(name.removeprefix("token_id:")), logprob) for name, logprob in found.items()]
    return sorted(every, key=lambda pair: (-pair[1], pair[0]))[:count]
