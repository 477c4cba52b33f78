"""The commands that serve what was exported."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import NamedTuple

from lightning_rlhf.models.runs import Source

#: Ranks that ``--max-lora-rank`` accepts (docs.vllm.ai, LoRAConfig.max_lora_rank); its default is 16.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class Serving(NamedTuple):
    """How to serve an export.

    Attributes:
        command: A command, quoted for a shell.
        notes: What the user must know.
    """

    command: str
    notes: tuple[str, ...] = ()


def serve_gguf(file: Path) -> Serving:
    """Serves a GGUF file with llama.cpp.

    Args:
        file: The file.
    """
    return Serving(shlex.join(["llama-server", "-m", str(file)]))


def serve_directory(source: Source) -> Serving:
    """Serves a directory with vLLM.

    Args:
        source: Whole weights or adapters.
    """
    if source.kind == "adapters":
        return _serve_adapters(source)
    command = ["vllm", "serve", str(source.path)]
    return _serve_reward_model(source, command) if source.is_reward_model else Serving(shlex.join(command))


def _serve_reward_model(source: Source, command: list[str]) -> Serving:
    """Scores as they are: of one label vLLM returns the sigmoid unless ``use_activation`` is false.

    Sources: docs.vllm.ai/en/v0.15.0/models/pooling_models (runner), .../api/vllm/config/pooler (the config's fields;
    ``logit_mean`` since v0.23), .../api/vllm/model_executor/layers/pooler/activations (sigmoid for one label).
    """
    pooler = json.dumps({"pooling_type": "LAST", "use_activation": False})
    notes = ["vLLM scores the last token of a text: send the answer up to its stop token, with nothing behind it."]
    offset = float(source.config.get("score_offset") or 0.0)
    if offset:
        notes.append(
            f"vLLM does not know score_offset: subtract {offset:.6g} from its scores, or add "
            f'"logit_mean": {offset:.6g} to --pooler-config (vLLM 0.23 or later).'
        )
    return Serving(shlex.join([*command, "--runner", "pooling", "--pooler-config", pooler]), tuple(notes))


def _serve_adapters(source: Source) -> Serving:
    """Sources: docs.vllm.ai/en/latest/features/lora, and the checks of vLLM's ``PEFTHelper``."""
    config = source.config
    beyond = [
        what
        for what, found in (
            ("a score head", source.is_reward_model),
            ("DoRA", config.get("use_dora")),
            ("modules_to_save", config.get("modules_to_save") and not source.is_reward_model),
            ("trainable_token_indices", config.get("trainable_token_indices")),
        )
        if found
    ]
    if beyond:  # then the adapters must be merged
        merge = ["lightning-rlhf", "export", str(source.path), "--format", "hf"]
        return Serving(shlex.join(merge), (f"vLLM does not load adapters with {', '.join(beyond)}: merge them first.",))
    module = f"{source.name}={source.path}"
    if module.count("=") > 1 or "," in module:  # vLLM splits at each
        module = json.dumps({"name": source.name, "path": str(source.path)})
    command = ["vllm", "serve", source.base, "--enable-lora", "--lora-modules", module]
    rank = max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()])
    if rank > 16:
        command += ["--max-lora-rank", str(next((r for r in _RANKS if r >= rank), rank))]
    template = source.path / "chat_template.jinja"
    if template.is_file():  # otherwise vLLM renders by the base model's own
        command += ["--chat-template", str(template)]
    return Serving(shlex.join(command), (f'Requests name the adapters as their model: "model": "{source.name}".',))
