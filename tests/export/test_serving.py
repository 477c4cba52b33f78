"""Commands that serve an export: what a shell makes of them."""

import json
import shlex

import pytest

from lightning_rlhf.export.serving import serve_directory, serve_gguf
from lightning_rlhf.models.runs import Source


@pytest.fixture
def adapters(tmp_path):
    """``adapters(name, **config)``: a directory with this adapter config."""

    def make(folder="lora", **config):
        path = tmp_path / folder
        path.mkdir()
        content = {"base_model_name_or_path": "org/base", "r": 16, "task_type": "CAUSAL_LM", **config}
        (path / "adapter_config.json").write_text(json.dumps(content))
        return Source(path, "adapters", "mine")

    return make


def test_paths_are_quoted(tmp_path):
    file = tmp_path / "it's mine" / "a $model.gguf"
    assert shlex.split(serve_gguf(file).command) == ["llama-server", "-m", str(file)]


def test_adapters_are_served_over_their_base(adapters):
    source = adapters()
    found = serve_directory(source)
    assert found.command == f"vllm serve org/base --enable-lora --lora-modules mine={source.path}"
    assert '"model": "mine"' in found.notes[0]


@pytest.mark.parametrize(
    "config, rank",
    [({"r": 16}, None), ({"r": 8}, None), ({"r": 17}, "32"), ({"r": 64}, "64"), ({"rank_pattern": {"q": 100}}, "128")],
)
def test_a_rank_above_vllm_s_default_is_allowed_for(adapters, config, rank):
    command = shlex.split(serve_directory(adapters(**config)).command)
    assert (command[command.index("--max-lora-rank") + 1] if "--max-lora-rank" in command else None) == rank


def test_a_path_that_vllm_would_split_is_given_as_json(adapters):
    source = adapters("lr=1e-4, seed=0")
    module = shlex.split(serve_directory(source).command)[-1]
    assert json.loads(module) == {"name": "mine", "path": str(source.path)}


def test_the_chat_template_of_the_adapters_is_given(adapters):
    source = adapters()
    (source.path / "chat_template.jinja").write_text("{{ messages }}")
    assert shlex.split(serve_directory(source).command)[-2:] == [
        "--chat-template",
        str(source.path / "chat_template.jinja"),
    ]


@pytest.mark.parametrize(
    "config, what",
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, "trainable_token_indices"),
        ({"task_type": "SEQ_CLS", "modules_to_save": ["score"]}, "a score head"),
    ],
)
def test_adapters_that_vllm_refuses_are_merged_first(adapters, config, what):
    source = adapters(**config)
    found = serve_directory(source)
    assert found.command == f"lightning-rlhf export {source.path} --format hf"
    assert found.notes == (f"vLLM does not load adapters with {what}: merge them first.",)


def test_a_reward_model_without_an_offset_needs_no_note_on_it(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"], "score_offset": 0.0}')
    found = serve_directory(Source(tmp_path, "model", "rm"))
    assert "--runner pooling" in found.command and not any("score_offset" in note for note in found.notes)
