"""Completes the vocabulary of a GGUF file where llama.cpp's converter leaves gaps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys, TokenType

#: Fields that a writer writes by itself.
_WRITTEN = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", Keys.General.ARCHITECTURE)
#: Score of a token that stands for an unused row.
_UNUSED = -1e4
#: Fields of tokens that end a generation: llama.cpp has three places for them.
_STOPS = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)


def complete_vocabulary(source: Path, target: Path, model: Path, stop_token_ids: Sequence[int]) -> tuple[int, ...]:
    """Copies a GGUF file and completes its vocabulary. Tensors are copied byte by byte.

    The converter gives each token of a SentencePiece-like ``tokenizer.json`` the same score, but llama.cpp merges by
    scores: they become the ranks of the merges. If the embeddings have more rows than the tokenizer has tokens,
    llama.cpp refuses the file: unused tokens are added. The converter writes one stop token: the others are added.

    Args:
        source: The converter's file.
        target: The file to write.
        model: Directory with the tokenizer, from which ``source`` was made.
        stop_token_ids: Tokens that end a generation, the tokenizer's eos token first.

    Returns:
        The stop tokens for which the format has no place.
    """
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    types = {name: field.types for name, field in reader.fields.items() if name not in _WRITTEN}
    stops = dict(zip(_STOPS, stop_token_ids, strict=False))
    fields |= {**_tokens(fields, _rows(reader)), **stops}
    fields |= _scores(fields, model)
    writer = GGUFWriter(target, arch=fields[Keys.General.ARCHITECTURE])
    for name in {**types, **stops}:
        kinds = types.get(name, [GGUFValueType.UINT32])
        writer.add_key_value(name, fields[name], kinds[0], kinds[-1] if kinds[0] == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, raw_dtype=tensor.tensor_type
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            writer.write_tensor_data(tensor.data)
    finally:
        writer.close()
    return tuple(stop_token_ids[len(_STOPS) :])


def _rows(reader: GGUFReader) -> int:
    """Number of rows of the embeddings."""
    return next(int(tensor.shape[-1]) for tensor in reader.tensors if tensor.name == "token_embd.weight")


def _tokens(fields: dict[str, Any], rows: int) -> dict[str, Any]:
    """The lists of tokens, with an unused token for each row of the embeddings that has none."""
    known = len(fields[Keys.Tokenizer.LIST])
    fill = {
        Keys.Tokenizer.LIST: [f"[PAD{i}]" for i in range(known, rows)],
        Keys.Tokenizer.SCORES: [_UNUSED] * (rows - known),
        Keys.Tokenizer.TOKEN_TYPE: [int(TokenType.UNUSED)] * (rows - known),
    }
    return {name: fields[name] + more for name, more in fill.items() if more and name in fields}


def _scores(fields: dict[str, Any], model: Path) -> dict[str, Any]:
    """The scores of a SentencePiece-like vocabulary, if the converter did not know them.

    llama.cpp joins the two neighbors whose text has the highest score, and ``tokenizer.json`` those of the first merge.
    All merges that make one text have neighboring ranks, so the rank of the first is the text's.
    """
    tokens, scores = fields[Keys.Tokenizer.LIST], fields.get(Keys.Tokenizer.SCORES)
    if scores is None or len(set(scores) - {_UNUSED}) > 1:
        return {}
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    ranks: dict[str, int] = {}
    for merge in content["model"]["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), len(ranks))
    # a text that no merge makes must not be made: it comes after all others
    found = [-float(ranks.get(token, len(ranks))) for token in tokens]
    return {Keys.Tokenizer.SCORES: found}
