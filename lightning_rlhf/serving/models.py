"""What a server serves: models by name, found in the folder of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.formats import Message
from lightning_rlhf.data.templates import answer_lead, set_chat_template, stop_token_ids
from lightning_rlhf.data.tokens import TokenizeError, encode_prompt
from lightning_rlhf.models import Policy, load_causal_lm, load_tokenizer
from lightning_rlhf.models.loading import Dtype, load_stop_token_ids
from lightning_rlhf.rollout import CachedEngine, room
from lightning_rlhf.rollout.engine import reason_against
from lightning_rlhf.serving.errors import ApiError
from lightning_rlhf.serving.limits import Limits
from lightning_rlhf.serving.one_at_a_time import one_at_a_time
from lightning_rlhf.serving.worker import Worker

log = logging.getLogger(__name__)
_CHUNK = 128
"""Tokens of a prompt that run in one step: more would hold up running streams, fewer would run long prompts slowly."""
_PREFIXES = 8
"""Finished answers whose keys are kept for the next turns of their chats."""


@dataclass
class Served:
    """A model that requests name.

    Attributes:
        name: Its name in requests.
        policy: The model.
        tokenizer: Its tokenizer.
        stops: Tokens that end an answer.
        worker: What generates its answers.
        engine: The class that does so, for people.
        lead: The blank that the chat template writes before an answer, and that is not part of it.
        created: When it was loaded, in seconds since 1970.
    """

    name: str
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[int]
    worker: Worker
    engine: str
    lead: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int | None:
        """Number of tokens that the model reads, if it says so."""
        most = 2**40
        return found if (found := room(self.policy, (), most)) < most else None

    def encode(self, prompt: Sequence[Message] | str) -> list[int]:
        """Tokenizes a prompt as inference does.

        Raises:
            ApiError: The chat template refuses the messages, there are no tokens, or there is no chat template.
        """
        param = "prompt" if isinstance(prompt, str) else "messages"
        try:
            return encode_prompt(self.tokenizer, prompt, stop_ids=self.stops)
        except TokenizeError as error:
            raise ApiError(400, f"{param}: {error}.", param) from error
        except ValueError as error:
            raise ApiError(400, f"The model {self.name} cannot chat: {error}", "model") from error


def load_served(
    name: str,
    source: str,
    limits: Limits,
    *,
    dtype: Dtype = "float32",
    device: str = "cpu",
    chat_template: str | None = None,
    max_live_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> Served:
    """Loads a model with its worker, which is not started yet.

    Args:
        name: The model's name in requests.
        source: Directory or hub id of a causal LM or of adapters, which are merged.
        limits: The server's limits.
        dtype: Data type of the weights.
        device: Device of the weights.
        chat_template: Preset or Jinja file that replaces the model's chat template.
        max_live_tokens: See :class:`~lightning_rlhf.rollout.CachedEngine`.
        trust_remote_code: Run code that comes with the model.

    Raises:
        OSError: The model does not exist or cannot be read.
        ValueError: The chat template does not fit the model.
    """
    tokenizer = load_tokenizer(source, trust_remote_code)
    own = tokenizer.eos_token_id  # a template may replace it
    if chat_template is not None and set_chat_template(tokenizer, chat_template):
        raise ValueError(f"{source} does not know the tokens of the chat template {chat_template!r}.")
    model = load_causal_lm(source, dtype=dtype, vocab_size=len(tokenizer), trust_remote_code=trust_remote_code)
    policy = Policy(model.requires_grad_(False).to(device), layout="padded")
    stops = stop_token_ids(tokenizer, [own, *load_stop_token_ids(source, trust_remote_code)])
    lead = answer_lead(tokenizer) if tokenizer.chat_template else ""
    if reason := reason_against(policy):
        log.warning("%s is served one request at a time: %s.", name, reason)
        worker = Worker(lambda: one_at_a_time(policy, tokenizer), name)
        return Served(name, policy, tokenizer, stops, worker, "HFGenerateEngine", lead)
    engine = CachedEngine(
        max_live_tokens, limits.max_rows, prefill_chunk=_CHUNK, keep_prefixes=_PREFIXES, reserve=False
    )
    worker = Worker(lambda: engine.session(policy, tokenizer), name)
    return Served(name, policy, tokenizer, stops, worker, "CachedEngine", lead)
