import pytest
from transformers import PreTrainedTokenizerFast

from lightning_rlhf.data import templates
from lightning_rlhf.data.templates import CHAT_TEMPLATES, answer_lead, set_chat_template, stop_token_ids

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hi 🙂"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4\n"},
]
ALPACA_HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
VICUNA_HEAD = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# Written out by hand, from the formats as their models' authors published them. The tiny tokenizer's eos is <|im_end|>.
RENDERED = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
    "<|im_start|>assistant\nHi 🙂<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4\n<|im_end|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n你好<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi 🙂<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>",
    "alpaca": "Be kind.\n\n### Instruction:\n你好\n\n### Response:\nHi 🙂<|im_end|>\n\n"
    "### Instruction:\n2+2?\n\n### Response:\n4\n<|im_end|>",
    "vicuna": "Be kind. USER: 你好 ASSISTANT: Hi 🙂<|im_end|>USER: 2+2? ASSISTANT: 4\n<|im_end|>",
    "zephyr": "<|system|>\nBe kind.<|im_end|>\n<|user|>\n你好<|im_end|>\n<|assistant|>\nHi 🙂<|im_end|>\n"
    "<|user|>\n2+2?<|im_end|>\n<|assistant|>\n4\n<|im_end|>\n",
    "plain": "Be kind.你好Hi 🙂<|im_end|>2+2?4\n<|im_end|>",
}
PROMPTED = {
    "chatml": "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": ALPACA_HEAD + "### Instruction:\n2+2?\n\n### Response:\n",
    "vicuna": VICUNA_HEAD + "USER: 2+2? ASSISTANT:",
    "zephyr": "<|user|>\n2+2?<|im_end|>\n<|assistant|>\n",
    "plain": "2+2?",
}


def render(tokenizer, messages, prompt=False):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def test_every_preset_is_tested():
    assert CHAT_TEMPLATES.keys() == RENDERED.keys() == PROMPTED.keys()
    assert all(name == preset.name for name, preset in CHAT_TEMPLATES.items())


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_presets_render_exactly(tiny_tokenizer, name):
    set_chat_template(tiny_tokenizer, name)
    assert render(tiny_tokenizer, CHAT) == RENDERED[name]
    assert render(tiny_tokenizer, CHAT[3:4], prompt=True) == PROMPTED[name]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_generation_prompt_is_how_the_answer_begins(tiny_tokenizer, name):
    set_chat_template(tiny_tokenizer, name)
    for end in (2, 4):
        assert render(tiny_tokenizer, CHAT).startswith(render(tiny_tokenizer, CHAT[:end], prompt=True))


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "plain"])
def test_empty_system_turn_leaves_the_preamble_out(tiny_tokenizer, name):
    set_chat_template(tiny_tokenizer, name)
    expected = PROMPTED[name].removeprefix(ALPACA_HEAD).removeprefix(VICUNA_HEAD)
    assert render(tiny_tokenizer, [{"role": "system", "content": ""}, CHAT[3]], prompt=True) == expected


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "zephyr", "plain"])
def test_roles_that_would_vanish_are_refused(tiny_tokenizer, name):
    set_chat_template(tiny_tokenizer, name)
    with pytest.raises(Exception, match="no role tool"):
        render(tiny_tokenizer, [*CHAT[:2], {"role": "tool", "content": "x"}])


def test_none_keeps_the_tokenizers_own(tiny_tokenizer):
    before = tiny_tokenizer.chat_template
    assert set_chat_template(tiny_tokenizer, None) == 0
    assert tiny_tokenizer.chat_template == before


def test_none_without_own_template_names_the_presets(tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chatml, llama3, alpaca, vicuna, zephyr, plain"):
        set_chat_template(tiny_tokenizer, None)


def test_file(tiny_tokenizer, tmp_path):
    source = "{% for m in messages %}{{ m['content'] + '¶' + eos_token }}{% endfor %}"
    path = tmp_path / "mine.jinja"
    path.write_text(source + "\n", encoding="utf-8")
    for chosen in (path, str(path)):
        assert set_chat_template(tiny_tokenizer, chosen) == 0
        assert render(tiny_tokenizer, CHAT[1:2]) == "你好¶<|im_end|>"


def test_missing_file_names_the_presets(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"'chatmI' is neither a preset \(chatml, .*plain\) nor a file"):
        set_chat_template(tiny_tokenizer, "chatmI")


def test_added_tokens_are_counted_once_and_saved(tiny_tokenizer, tmp_path):
    size = len(tiny_tokenizer)
    assert set_chat_template(tiny_tokenizer, "chatml") == 0
    assert set_chat_template(tiny_tokenizer, "llama3") == 3
    assert set_chat_template(tiny_tokenizer, "llama3") == 0
    assert len(tiny_tokenizer) == size + 3
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (loaded.eos_token, len(loaded)) == ("<|eot_id|>", size + 3)
    assert loaded.chat_template == tiny_tokenizer.chat_template
    ids = loaded("a<|eot_id|>b", add_special_tokens=False)["input_ids"]
    assert loaded.decode(ids, skip_special_tokens=True) == "ab"


def test_ordinary_vocabulary_entry_becomes_special(tiny_tokenizer):
    tiny_tokenizer.add_tokens(["<|eot_id|>"])
    assert set_chat_template(tiny_tokenizer, "llama3") == 2
    eot = tiny_tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert tiny_tokenizer.added_tokens_decoder[eot].special


def test_stop_becomes_eos_and_it_is_said(tiny_tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr(templates, "rank_zero_info", said.append)
    set_chat_template(tiny_tokenizer, "chatml")
    assert said == []
    set_chat_template(tiny_tokenizer, "llama3")
    assert tiny_tokenizer.eos_token == "<|eot_id|>"
    assert len(said) == 1
    assert all(word in said[0] for word in ("llama3", "'<|eot_id|>'", "'<|im_end|>'"))


def test_a_files_turn_end_becomes_eos_too(tiny_tokenizer, tmp_path, monkeypatch):
    """Tools that read no generation config stop at the eos alone."""
    said = []
    monkeypatch.setattr(templates, "rank_zero_info", said.append)
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}")
    set_chat_template(tiny_tokenizer, tmp_path / "own.jinja")
    assert tiny_tokenizer.eos_token == "</s>" and stop_token_ids(tiny_tokenizer) == (2,)
    assert len(said) == 1 and all(word in said[0] for word in ("own.jinja", "'</s>'", "'<|im_end|>'"))


def test_further_stop_tokens_come_behind(tiny_tokenizer):
    assert stop_token_ids(tiny_tokenizer, [7, 4, None, 2, 7, -1, 10**6]) == (4, 7, 2)


@pytest.mark.parametrize(
    ("name", "lead"), [("vicuna", " "), ("chatml", ""), ("llama3", ""), ("alpaca", ""), ("zephyr", ""), ("plain", "")]
)
def test_the_blank_before_an_answer_is_the_templates(tiny_tokenizer, name, lead):
    set_chat_template(tiny_tokenizer, name)
    assert answer_lead(tiny_tokenizer) == lead


def test_what_is_no_blank_is_part_of_the_answer(tiny_tokenizer):
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + ('<think></think> ' if m['role'] == 'assistant' else '') }}"
        "{{ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert answer_lead(tiny_tokenizer) == ""


def test_eos_presets_leave_the_eos(tiny_tokenizer):
    set_chat_template(tiny_tokenizer, "zephyr")
    assert tiny_tokenizer.eos_token == "<|im_end|>"


def test_eos_presets_need_an_eos(tiny_tokenizer):
    tiny_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="'alpaca' ends turns with the eos token"):
        set_chat_template(tiny_tokenizer, "alpaca")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_template_begins_with_bos_where_the_tokenizer_does(stories_model_dir, name):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(stories_model_dir)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    set_chat_template(tokenizer, name)
    text = render(tokenizer, CHAT)
    assert text.startswith("<s>")
    assert text.count("<s>") == 1


def test_stop_tokens_of_presets(tiny_tokenizer):
    for name, preset in CHAT_TEMPLATES.items():
        set_chat_template(tiny_tokenizer, name)
        stop = preset.stop or tiny_tokenizer.eos_token
        assert stop_token_ids(tiny_tokenizer) == (tiny_tokenizer.convert_tokens_to_ids(stop),)


def test_stop_token_is_what_the_template_writes_beside_the_eos(tiny_tokenizer):
    tiny_tokenizer.eos_token = "</s>"  # as in base models whose template ends turns with a token that isn't the eos
    assert stop_token_ids(tiny_tokenizer) == (2, tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"))
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content }} \n{% endfor %}{{ '<|im_end|>' }}"
    assert stop_token_ids(tiny_tokenizer) == (2, tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"))


def test_stop_token_of_templates_without_one_is_the_eos(tiny_tokenizer):
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert stop_token_ids(tiny_tokenizer) == (tiny_tokenizer.eos_token_id,)
    tiny_tokenizer.chat_template = None
    assert stop_token_ids(tiny_tokenizer) == (tiny_tokenizer.eos_token_id,)


def test_no_stop_token_is_an_error(tiny_tokenizer):
    tiny_tokenizer.eos_token = None
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="No token ends an assistant turn"):
        stop_token_ids(tiny_tokenizer)


def test_template_that_refuses_every_exchange_is_an_error(tiny_tokenizer):
    tiny_tokenizer.chat_template = "{{ raise_exception('tools only') }}"
    with pytest.raises(ValueError, match="refuses a user turn with its answer: tools only"):
        stop_token_ids(tiny_tokenizer)
