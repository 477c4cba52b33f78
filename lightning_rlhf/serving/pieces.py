"""Tokens as the bytes and texts that log-probs are reported for."""

from __future__ import annotations

from functools import lru_cache

from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """The character by which byte-level tokenizers write each byte: itself if it is visible, otherwise one from 256 on.

    Source: GPT-2's encoder.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


@lru_cache(maxsize=2**17)  # asking a tokenizer for its special tokens takes longer than a step
def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Returns the bytes that a token stands for. A special token stands for its name."""
    name = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(name, str):  # a row of the embeddings without a token
        return b""
    if token in tokenizer.added_tokens_decoder:
        return name.encode()
    if _is_byte_level(tokenizer):
        return bytes(_byte_of()[c] for c in name if c in _byte_of())
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):  # SentencePiece's bytes
        return bytes([int(name[3:5], 16)])
    return name.replace("▁", " ").encode()


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    r"""Returns a token's text. Bytes that are no whole character are written as OpenAI does: ``bytes:\xe4\xbd``."""
    raw = token_bytes(tokenizer, token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(rf"\x{byte:02x}" for byte in raw)


@lru_cache(maxsize=64)
def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the special tokens, which a text does not show."""
    return frozenset(tokenizer.all_special_ids)


@lru_cache(maxsize=64)
def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)
