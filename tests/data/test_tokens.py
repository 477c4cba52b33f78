import pickle
import random
from itertools import groupby

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lightning_rlhf.data.formats import Conversation
from lightning_rlhf.data.instruction import encode_instruction
from lightning_rlhf.data.templates import CHAT_TEMPLATES, set_chat_template, stop_token_ids
from lightning_rlhf.data.tokens import TokenizeError, Tokens, encode, encode_prompt, encode_reply, spell, truncate

INST = (  # as Llama 2's: BOS and eos around every exchange, roles must alternate, no markers
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
THINKING = (  # as Qwen3's: the thinking of all turns but the last is stripped
    "{% for m in messages %}"
    "{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_THINKING = THINKING.replace(
    "+ '\n' + content + '<|im_end|>' + '\n' }}",
    "+ '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ content }}{% endgeneration %}"
    "{% else %}{{ content }}{% endif %}{{ '<|im_end|>' + '\n' }}",
)
CLOSING = (  # as Phi's: the eos stands at the end of the whole conversation, behind the token that ends turns
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
THOUGHTS = [
    ("user", "2+2?"),
    ("assistant", "<think>hm</think>4"),
    ("user", "3+3?"),
    ("assistant", "<think>so</think>6"),
]

CONVERSATIONS = {
    "english": [("user", "What is the capital of France?"), ("assistant", "Paris.")],
    "chinese": [("system", "你是一个助手。"), ("user", "北京在哪里？"), ("assistant", "在中国北方，\n天气很好。")],
    "emoji": [("user", "🙂👩‍👩‍👧 é"), ("assistant", "🎉🎉 ok 👍🏽")],
    "empty system": [("system", ""), ("user", "Hi"), ("assistant", "Hello, how are you?")],
    "several turns": [
        ("system", "Be kind."),
        ("user", "Hello"),
        ("assistant", "Hi 🙂"),
        ("user", "公园？"),
        ("assistant", "def add(a, b):\n    return a + b"),
        ("user", "Thanks, fox\n"),
        ("assistant", "再见"),
    ],
    "whitespace inside": [("user", "  a\n\n"), ("assistant", "x  y\t\nz")],
}


def chat(turns):
    return Conversation(messages=tuple({"role": role, "content": content} for role, content in turns))


def template_ids(tokenizer, messages, prompt=False):
    encoded = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, add_generation_prompt=prompt
    )
    return list(encoded["input_ids"])


def runs(tokenizer, tokens):
    """The texts of the stretches that are scored."""
    pairs = zip(tokens.input_ids, tokens.scored, strict=True)
    return [
        tokenizer.decode([i for i, _ in run], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for scored, run in groupby(pairs, key=lambda pair: pair[1])
        if scored
    ]


@pytest.fixture
def stories(stories_model_dir):
    """SentencePiece-like: a blank before every text, byte fallback, BOS by default, a template without stop tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(stories_model_dir)
    tokenizer.chat_template = (stories_model_dir / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture
def merging():
    """A BPE over whole texts, without words, that knows the merge 'bc'."""
    vocabulary = {symbol: i for i, symbol in enumerate(["<unk>", "</s>", "a", "b", "c", "d", "bc"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    set_chat_template(fast, "plain")
    return fast


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_presets(tiny_tokenizer, name, turns):
    set_chat_template(tiny_tokenizer, name)
    conversation = chat(turns)
    tokens = encode(tiny_tokenizer, conversation)
    before = " " if name == "vicuna" else ""
    answers = [before + content + tiny_tokenizer.eos_token for role, content in turns if role == "assistant"]
    assert runs(tiny_tokenizer, tokens) == answers
    last = encode(tiny_tokenizer, conversation, "last")
    assert runs(tiny_tokenizer, last) == answers[-1:]
    everything = encode(tiny_tokenizer, conversation, "all")
    assert everything.scored == [False] + [True] * (len(everything.input_ids) - 1)
    ids = template_ids(tiny_tokenizer, conversation.messages)
    assert tokens.input_ids == everything.input_ids
    for i, (role, _) in enumerate(turns):
        if role == "assistant":
            prompt = template_ids(tiny_tokenizer, conversation.messages[:i], prompt=True)
            assert encode_prompt(tiny_tokenizer, conversation.messages[:i]) == prompt
            if name != "plain":  # which has nothing between question and answer, so that tokens may join them
                assert ids[: len(prompt)] == prompt
                assert tokens.input_ids == last.input_ids == ids


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_chatml_without_markers_equals_chatml_with_them(tiny_tokenizer, turns, loss_on):
    unmarked = encode(tiny_tokenizer, chat(turns), loss_on)
    assert "generation %}" not in tiny_tokenizer.chat_template
    set_chat_template(tiny_tokenizer, "chatml")
    assert encode(tiny_tokenizer, chat(turns), loss_on) == unmarked
    source = CHAT_TEMPLATES["chatml"].template
    marked = "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    for other in (
        "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",  # without the stop token
        "{%- generation -%}{{ message['content'] + '<|im_end|> ' }}{%- endgeneration -%}",  # with text after it
    ):
        tiny_tokenizer.chat_template = source.replace(marked, other)
        assert runs(tiny_tokenizer, encode(tiny_tokenizer, chat(turns), loss_on)) == (
            runs(tiny_tokenizer, unmarked)
            if loss_on != "all"
            else [tiny_tokenizer.decode(template_ids(tiny_tokenizer, chat(turns).messages)[1:])]
        )


def test_masks_by_hand(tiny_tokenizer):
    tokens = encode(tiny_tokenizer, chat(CONVERSATIONS["english"]))
    start, stop = tiny_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def ids(text):
        return tiny_tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = [start, *ids("user\nWhat is the capital of France?"), stop, *ids("\n"), start, *ids("assistant\n")]
    answer = [*ids("Paris."), stop]
    assert tokens.input_ids == [*prompt, *answer, *ids("\n")]
    assert tokens.scored == [False] * len(prompt) + [True] * len(answer) + [False]


def test_inst_template_without_markers(tiny_tokenizer):
    tiny_tokenizer.chat_template = INST
    conversation = chat(CONVERSATIONS["several turns"][1:])
    tokens = encode(tiny_tokenizer, conversation)
    assert tokens.input_ids == template_ids(tiny_tokenizer, conversation.messages)
    assert runs(tiny_tokenizer, tokens) == [
        " Hi 🙂 <|im_end|>",
        " def add(a, b):\n    return a + b <|im_end|>",
        " 再见 <|im_end|>",
    ]
    assert tokens.input_ids[:1] == [tiny_tokenizer.bos_token_id]
    assert tokens.input_ids[1] != tiny_tokenizer.bos_token_id


REPLIES = [[("user", "公园？ 🙂")], [("user", " fox\n")], [("user", "a"), ("assistant", "b"), ("user", "c")]]


@pytest.mark.parametrize("kind", ["tiny", "stories"])
@pytest.mark.parametrize("name", ["own", "inst", *CHAT_TEMPLATES])
@pytest.mark.parametrize("reply", REPLIES, ids=str)
def test_a_reply_to_sampled_tokens_is_what_the_template_writes_there(tiny_tokenizer, stories, kind, name, reply):
    tokenizer = tiny_tokenizer if kind == "tiny" else stories
    if name in CHAT_TEMPLATES:
        set_chat_template(tokenizer, name)
    elif name == "inst":
        tokenizer.chat_template = INST
    elif kind == "stories":
        pytest.skip("its own template has no stop tokens")
    first, reply = chat([("user", "What is it?"), ("assistant", "Paris, 你好.")]).messages, chat(reply).messages
    prompt, tokens = encode_prompt(tokenizer, first[:1]), encode(tokenizer, chat(
        [(m["role"], m["content"]) for m in first]), "last")  # fmt: skip
    end = len(tokens.scored) - tokens.scored[::-1].index(True)
    stop, answer = tokens.input_ids[end - 1], tokens.input_ids[len(prompt) : end]
    assert tokens.input_ids[: len(prompt)] == prompt and stop in stop_token_ids(tokenizer)
    whole = encode_prompt(tokenizer, [*first, *reply])
    assert [*prompt, *answer, *encode_reply(tokenizer, reply, stop)] == whole
    cut = [*prompt, *answer[:-1], *encode_reply(tokenizer, reply, answer[-2])]  # a stop string ended the turn
    assert spell(tokenizer, cut).replace(" ", "") == spell(tokenizer, whole).replace(" ", "")


def test_a_reply_that_the_template_cannot_write_is_refused(tiny_tokenizer):
    tiny_tokenizer.chat_template = INST
    with pytest.raises(TokenizeError, match="roles must alternate"):
        encode_reply(tiny_tokenizer, chat([("user", "a"), ("user", "b")]).messages, 4)
    tiny_tokenizer.chat_template = THINKING.replace("'\n' + content", "'\n' + content[:4]")
    with pytest.raises(TokenizeError, match="doesn't write an answer as it is"):
        encode_reply(tiny_tokenizer, chat([("user", "a")]).messages, 4)


def test_half_a_surrogate_pair_is_a_tokenize_error(tiny_tokenizer):
    said = [{"role": "user", "content": "a\ud83d"}]
    for encoded in (lambda: encode_prompt(tiny_tokenizer, said), lambda: encode_prompt(tiny_tokenizer, "a\ud83d"),
                    lambda: encode_reply(tiny_tokenizer, said, 4)):  # fmt: skip
        with pytest.raises(TokenizeError, match=r"U\+D83D, which is half a surrogate pair"):
            encoded()


def test_refusal_of_the_template_is_a_tokenize_error(tiny_tokenizer):
    tiny_tokenizer.chat_template = INST
    with pytest.raises(TokenizeError, match="refused the conversation: roles must alternate") as caught:
        encode(tiny_tokenizer, chat(CONVERSATIONS["chinese"]))
    assert caught.value.kind == "template refused the conversation"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.kind, str(copy)) == (caught.value.kind, caught.value.reason)


def test_template_that_strips_thinking(tiny_tokenizer):
    tiny_tokenizer.chat_template = THINKING
    conversation = chat(THOUGHTS)
    with pytest.raises(TokenizeError, match=r"turn 2 \(assistant\).*loss_on to 'last'.*generation markers"):
        encode(tiny_tokenizer, conversation)
    tokens = encode(tiny_tokenizer, conversation, "last")
    assert tokens.input_ids == template_ids(tiny_tokenizer, conversation.messages)
    assert runs(tiny_tokenizer, tokens) == ["<think>so</think>6<|im_end|>"]
    assert encode(tiny_tokenizer, conversation, "all").input_ids == tokens.input_ids


def test_markers_serve_a_template_that_strips_thinking(tiny_tokenizer):
    tiny_tokenizer.chat_template = MARKED_THINKING
    tokens = encode(tiny_tokenizer, chat(THOUGHTS))
    assert tokens.input_ids == template_ids(tiny_tokenizer, chat(THOUGHTS).messages)
    assert runs(tiny_tokenizer, tokens) == ["4<|im_end|>", "<think>so</think>6<|im_end|>"]
    assert runs(tiny_tokenizer, encode(tiny_tokenizer, chat(THOUGHTS), "last")) == ["<think>so</think>6<|im_end|>"]


def test_prompt_that_is_not_how_the_answer_begins(tiny_tokenizer):
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("assistant\n' }}", "assistant\n<think>' }}")
    for loss_on in ("assistant", "last"):
        with pytest.raises(TokenizeError) as caught:
            encode(tiny_tokenizer, chat(CONVERSATIONS["english"]), loss_on)
        assert caught.value.kind == "template rewrites turns"


def test_turn_ends_with_its_first_stop_token(tiny_tokenizer):
    tiny_tokenizer.chat_template = CLOSING
    tiny_tokenizer.eos_token = "</s>"
    conversation = chat(CONVERSATIONS["several turns"])
    tokens = encode(tiny_tokenizer, conversation)
    assert runs(tiny_tokenizer, tokens) == [
        "Hi 🙂<|im_end|>",
        "def add(a, b):\n    return a + b<|im_end|>",
        "再见<|im_end|>",
    ]
    assert tokens.input_ids == template_ids(tiny_tokenizer, conversation.messages)


@pytest.mark.parametrize("template", [None, "chatml"])
def test_stop_token_within_the_content_does_not_end_the_turn(tiny_tokenizer, template):
    set_chat_template(tiny_tokenizer, template)
    tokens = encode(tiny_tokenizer, chat([("user", "Hi"), ("assistant", "a<|im_end|>b")]))
    assert runs(tiny_tokenizer, tokens) == ["a<|im_end|>b<|im_end|>"]


def test_stop_token_within_a_content_that_the_template_trims(tiny_tokenizer):
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("m['content']", "m['content'] | trim")
    tokens = encode(tiny_tokenizer, chat([("user", "Hi"), ("assistant", " a<|im_end|>b\n")]))
    assert runs(tiny_tokenizer, tokens) == ["a<|im_end|>b<|im_end|>"]


def test_last_of_two_turns_that_touch(tiny_tokenizer):
    set_chat_template(tiny_tokenizer, "plain")
    conversation = chat([("user", "Hi"), ("assistant", "Hello"), ("assistant", "Bye")])
    assert runs(tiny_tokenizer, encode(tiny_tokenizer, conversation, "last")) == ["Bye<|im_end|>"]
    assert runs(tiny_tokenizer, encode(tiny_tokenizer, conversation)) == ["Hello<|im_end|>Bye<|im_end|>"]


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_eos_is_added_where_the_template_has_no_stop(stories, loss_on):
    turns = [("user", "Hi"), ("assistant", "Once upon a time"), ("user", "你好"), ("assistant", "The end. 🙂")]
    tokens = encode(stories, chat(turns), loss_on)
    assert tokens.input_ids == [*template_ids(stories, chat(turns).messages), stories.eos_token_id]
    assert tokens.scored[-1]
    if loss_on != "all":
        expected = ["Once upon a time\n", "The end. 🙂\n</s>"]
        assert runs(stories, tokens) == (expected if loss_on == "assistant" else expected[1:])
        begin = tokens.scored.index(True)
        assert (
            stories.convert_ids_to_tokens(tokens.input_ids[begin])[0] == "▁"
        )  # the decoder strips it, the model writes it


def test_eos_is_added_behind_the_last_assistant_turn(stories):
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    tokens = encode(stories, chat(turns))
    assert runs(stories, tokens) == ["Hello\n</s>"]
    ids = list(tokens.input_ids)
    ids.remove(stories.eos_token_id)
    assert ids == template_ids(stories, chat(turns).messages)


@pytest.mark.parametrize(
    "source", ["{{ m.content }}{% endgeneration %}{{ '\n' }}", "{{ m.content + '\n' }}{% endgeneration %}"]
)
def test_eos_is_added_where_markers_have_no_stop(tiny_tokenizer, source):
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' }}"
        "{% if m.role == 'assistant' %}{% generation %}" + source + "{% else %}{{ m.content + '\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokens = encode(tiny_tokenizer, chat(CONVERSATIONS["english"]))
    assert runs(tiny_tokenizer, tokens) == ["Paris.\n<|im_end|>"]
    assert tokens.input_ids[:-1] == template_ids(tiny_tokenizer, chat(CONVERSATIONS["english"]).messages)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_presets_with_a_sentencepiece_like_tokenizer(stories, name, turns):
    set_chat_template(stories, name)
    conversation = chat(turns)
    tokens = encode(stories, conversation)
    ids = template_ids(stories, conversation.messages)
    assert tokens.input_ids.count(stories.bos_token_id) == 1
    assert tokens.input_ids[0] == stories.bos_token_id
    assert stories.decode(tokens.input_ids) == stories.decode(ids)
    if name != "plain":
        assert tokens.input_ids == ids
    for i, (role, _) in enumerate(turns):
        if role == "assistant":
            last = encode(stories, chat(turns[: i + 1]), "last")
            prompt = template_ids(stories, conversation.messages[:i], prompt=True)
            assert last.input_ids[: len(prompt)] == prompt
            assert last.scored.index(True) == len(prompt)
    answers = [content for role, content in turns if role == "assistant"]
    assert [run.removesuffix(stories.eos_token).strip() for run in runs(stories, tokens)] == answers
    assert all(run.endswith(stories.eos_token) for run in runs(stories, tokens))


def test_no_token_reaches_over_the_border(merging):
    conversation = chat([("user", "ab"), ("assistant", "cd")])
    a, b, c, d, bc, eos = merging.convert_tokens_to_ids(["a", "b", "c", "d", "bc", "</s>"])
    assert template_ids(merging, conversation.messages) == [a, bc, d, eos]
    tokens = encode(merging, conversation)
    assert tokens == Tokens([a, b, c, d, eos], [False, False, True, True, True])
    assert encode_prompt(merging, conversation.messages[:1]) == [a, b]


def test_every_border_of_several_turns(merging):
    turns = [
        ("user", "b"),
        ("assistant", "cb"),
        ("user", "cab"),
        ("assistant", "c"),
        ("user", "a"),
        ("assistant", "bc"),
    ]
    tokens = encode(merging, chat(turns))
    texts = merging.convert_ids_to_tokens(tokens.input_ids)
    assert texts == ["b", "c", "b", "</s>", "c", "a", "b", "c", "</s>", "a", "bc", "</s>"]
    assert runs(merging, tokens) == ["cb</s>", "c</s>", "bc</s>"]
    last = encode(merging, chat(turns[:4]), "last")  # only the border that this row trains at
    assert merging.convert_ids_to_tokens(last.input_ids) == ["bc", "b", "</s>", "c", "a", "b", "c", "</s>"]
    assert last.input_ids[:7] == [*encode_prompt(merging, chat(turns[:3]).messages), 4]


def test_border_within_a_sentencepiece_word(stories):
    set_chat_template(stories, "plain")
    turns = [("user", "Once upon a ti"), ("assistant", "me there was")]
    joint = template_ids(stories, chat(turns).messages)
    prompt = encode_prompt(stories, chat(turns[:1]).messages)
    assert joint[: len(prompt)] != prompt
    tokens = encode(stories, chat(turns))
    assert tokens.input_ids[: len(prompt)] == prompt
    assert tokens.scored == [False] * len(prompt) + [True] * (len(tokens.input_ids) - len(prompt))
    assert stories.decode(tokens.input_ids) == stories.decode(joint) == "<s> Once upon a time there was</s>"


def test_pieces_that_spell_another_text_are_refused(merging):
    merging.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # puts blanks between tokens
    with pytest.raises(TokenizeError) as caught:
        encode(merging, chat([("user", "ab"), ("assistant", "cd")]))
    assert caught.value.kind == "prompt and completion don't join"


@pytest.mark.parametrize("pad", ["<|im_end|>", "</s>"])
@pytest.mark.parametrize("name", [None, *CHAT_TEMPLATES])
def test_stop_is_scored_also_if_it_is_the_pad(tiny_tokenizer, name, pad):
    set_chat_template(tiny_tokenizer, name)
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token if pad == "<|im_end|>" else pad
    tokens = encode(tiny_tokenizer, chat(CONVERSATIONS["several turns"]))
    ends = [i for i, scored in enumerate(tokens.scored) if scored and not [*tokens.scored, False][i + 1]]
    assert len(ends) == 3
    assert all(tokens.input_ids[end] in stop_token_ids(tiny_tokenizer) for end in ends)


def test_random_conversations(tiny_tokenizer, stories):
    draw = random.Random(0)
    alphabet = ["a", "the ", " fox", "\n", "  ", "你好", "。", "🙂", "é", "1", "\t", "'s", "def "]
    for trial in range(120):
        tokenizer = (tiny_tokenizer, stories)[trial % 2]
        set_chat_template(tokenizer, draw.choice(list(CHAT_TEMPLATES)))
        contents = ["x" + "".join(draw.choices(alphabet, k=draw.randint(0, 6))) + "y" for _ in range(4)]
        turns = list(zip(["user", "assistant"] * 2, contents, strict=True))
        messages = chat(turns).messages
        ids = template_ids(tokenizer, messages)
        tokens = encode(tokenizer, chat(turns))
        prompts = [template_ids(tokenizer, messages[:i], prompt=True) for i in (1, 3)]
        if all(ids[: len(prompt)] == prompt for prompt in prompts):
            assert tokens.input_ids == ids
        assert tokens.input_ids[: len(prompts[0])] == prompts[0]
        last = encode(tokenizer, chat(turns), "last")
        assert last.input_ids[: len(prompts[1])] == prompts[1]
        assert tokenizer.decode(tokens.input_ids) == tokenizer.decode(last.input_ids) == tokenizer.decode(ids)
        answers = [run.removesuffix(tokenizer.eos_token).strip(" ") for run in runs(tokenizer, tokens)]
        assert answers == contents[1::2]


def test_first_token_is_never_scored(tiny_tokenizer):
    set_chat_template(tiny_tokenizer, "alpaca")
    for loss_on in ("assistant", "last", "all"):
        assert not encode(tiny_tokenizer, chat(CONVERSATIONS["english"]), loss_on).scored[0]
    assert not encode(tiny_tokenizer, Conversation(text="fox")).scored[0]


def test_plain_text_without_bos(tiny_tokenizer):
    tokens = encode(tiny_tokenizer, Conversation(text="The fox 今天"))
    assert tokens.input_ids == [*tiny_tokenizer("The fox 今天")["input_ids"], tiny_tokenizer.eos_token_id]
    assert tokens.scored == [False] + [True] * (len(tokens.input_ids) - 1)
    assert encode_prompt(tiny_tokenizer, "The fox 今天") == tokens.input_ids[:-1]


@pytest.mark.parametrize("text", ["Once upon a time", "<s> Once upon a time", "Once upon a time</s>"])
def test_plain_text_has_one_bos_and_one_eos(stories, text):
    tokens = encode(stories, Conversation(text=text), "last")
    words = stories("Once upon a time", add_special_tokens=False)["input_ids"]
    assert [i for i in tokens.input_ids if stories.convert_ids_to_tokens(i) != "▁"] == [1, *words, 2]
    assert tokens.input_ids.count(1) == tokens.input_ids.count(2) == 1
    assert tokens.scored == [False] + [True] * (len(tokens.input_ids) - 1)


def test_eos_that_the_tokenizer_adds_is_not_doubled(merging):
    from tokenizers.processors import TemplateProcessing

    merging.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    assert merging("ad")["input_ids"] == [2, 5, 1]
    assert encode(merging, Conversation(text="ad")).input_ids == [2, 5, 1]
    assert encode_prompt(merging, "ad") == [2, 5]
    assert encode_prompt(merging, [{"role": "user", "content": "ad"}]) == [2, 5]


def test_eos_that_a_prompt_spells_stays(merging):
    assert encode_prompt(merging, "ad</s>") == [2, 5, 1]


def test_rows_without_anything_to_read_are_refused(tiny_tokenizer):
    for conversation, kind in [
        (Conversation(text=""), "nothing to score"),
        (chat([("user", "Hi")]), "no assistant turn"),
        (Conversation(messages=()), "no messages"),
        (chat([("assistant", "Hi")]), "nothing before the assistant"),
    ]:
        with pytest.raises(TokenizeError) as caught:
            encode(tiny_tokenizer, conversation)
        assert caught.value.kind == kind
    with pytest.raises(TokenizeError, match="the prompt has no tokens"):
        encode_prompt(tiny_tokenizer, "")


def test_all_tokens_of_a_conversation_without_answer(tiny_tokenizer):
    conversation = chat([("system", "Be kind."), ("user", "Hi")])
    tokens = encode(tiny_tokenizer, conversation, "all")
    assert tokens.input_ids == template_ids(tiny_tokenizer, conversation.messages)
    assert tokens.scored == [False] + [True] * (len(tokens.input_ids) - 1)


def test_faults_of_the_tokenizer_are_no_fault_of_the_row(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"loss_on is 'prompt'. Choose one of: assistant, last, all"):
        encode(tiny_tokenizer, chat(CONVERSATIONS["english"]), "prompt")
    tiny_tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template.*chatml") as caught:
        encode(tiny_tokenizer, chat(CONVERSATIONS["english"]))
    assert not isinstance(caught.value, TokenizeError)


def test_truncate():
    tokens = Tokens([5, 6, 7, 8, 9, 3], [False, False, True, True, True, False])
    assert truncate(tokens, 6) is tokens
    assert truncate(tokens, 5) == Tokens([5, 6, 7, 8, 9], [False, False, True, True, True], cut=False)
    assert truncate(tokens, 4) == Tokens([5, 6, 7, 8], [False, False, True, True], cut=True)
    assert truncate(truncate(tokens, 4), 3) == Tokens([5, 6, 7], [False, False, True], cut=True)
    assert truncate(tokens, 2) is None


# What rows ask of the template and the loss


def turns(*messages):
    return Conversation(tuple({"role": role, "content": content, **keys} for role, content, keys in messages))


TALK = (("user", "Rome?", {}), ("assistant", "No.", {"weight": 0}), ("user", "Oslo?", {}), ("assistant", "Yes.", {}))
LEARNT = tuple((role, content, {}) for role, content, _ in TALK)


@pytest.mark.parametrize("template", [None, "chatml", "llama3", "vicuna"])
def test_turns_of_weight_0_are_not_learned(tiny_tokenizer, template):
    set_chat_template(tiny_tokenizer, template)
    whole, weighted = encode(tiny_tokenizer, turns(*LEARNT)), encode(tiny_tokenizer, turns(*TALK))
    assert weighted.input_ids == whole.input_ids
    assert runs(tiny_tokenizer, weighted) == runs(tiny_tokenizer, whole)[1:]
    first = (TALK[0], ("assistant", "No.", {"weight": 1}), TALK[2], ("assistant", "Yes.", {"weight": 0}))
    assert runs(tiny_tokenizer, encode(tiny_tokenizer, turns(*first))) == runs(tiny_tokenizer, whole)[:1]
    every = encode(tiny_tokenizer, turns(*TALK), "all")
    missing = [i for i, read in enumerate(every.scored) if not read][1:]  # the first token is never read
    assert missing == [i for i, (a, b) in enumerate(zip(whole.scored, weighted.scored, strict=True)) if a and not b]
    assert encode(tiny_tokenizer, turns(*TALK), "last").scored == weighted.scored


def test_weights_that_leave_nothing_or_cant_be_had(tiny_tokenizer):
    for conversation, loss_on, message in (
        (turns(*TALK[:2]), "assistant", "every turn .* has the weight 0"),
        (turns(*TALK[:3], ("assistant", "Yes.", {"weight": 0})), "last", "every turn .* has the weight 0"),
        (turns(("user", "a", {"weight": 1}), ("assistant", "b", {})), "assistant", r"turn 1 \(user\) has the weight 1"),
        (turns(("user", "a", {"weight": 0}), ("assistant", "b", {})), "all", r"turn 1 \(user\) has the weight 0"),
    ):
        with pytest.raises(TokenizeError, match=message):
            encode(tiny_tokenizer, conversation, loss_on)


TOOLS = [{"type": "function", "function": {"name": "stock_price"}}]


def test_tools_reach_the_template_or_are_refused(tiny_tokenizer):
    conversation = Conversation(turns(*LEARNT).messages, options={"tools": TOOLS})
    with pytest.raises(TokenizeError, match="'tools', and the chat template doesn't write them"):
        encode(tiny_tokenizer, conversation)
    tiny_tokenizer.chat_template = (
        "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}" + tiny_tokenizer.chat_template
    )
    tokens = encode(tiny_tokenizer, conversation)
    messages = [dict(m) for m in conversation.messages]
    want = tiny_tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=True, return_dict=False)
    assert tokens.input_ids == want
    assert runs(tiny_tokenizer, tokens) == ["No.<|im_end|>", "Yes.<|im_end|>"]
    prompt = encode_prompt(tiny_tokenizer, conversation.messages[:1], conversation.options)
    assert tokens.input_ids[: len(prompt)] == prompt
    asked = Conversation(turns(*LEARNT).messages, options={"tokenize": True})
    with pytest.raises(TokenizeError, match="a row can't set 'tokenize'"):
        encode(tiny_tokenizer, asked)


def test_reasoning_reaches_the_template_or_is_refused(tiny_tokenizer):
    conversation = turns(("user", "2+2?", {"name": "ann"}), ("assistant", "4", {"reasoning_content": "2+2=4"}))
    with pytest.raises(TokenizeError, match="turn 2 has 'reasoning_content', and the chat template doesn't write it"):
        encode(tiny_tokenizer, conversation)
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace(
        "+ m['content']",
        "+ ('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m['content']",
    )
    tokens = encode(tiny_tokenizer, conversation)
    assert runs(tiny_tokenizer, tokens) == ["<think>2+2=4</think>4<|im_end|>"] and tokens.unread == ("name of a turn",)


@pytest.mark.parametrize("template", [None, "chatml"])
def test_a_text_that_brings_its_stop_token_is_learned_with_one(tiny_tokenizer, template):
    set_chat_template(tiny_tokenizer, template)
    want = encode(tiny_tokenizer, chat([("user", "Hi"), ("assistant", "Hello!"), ("user", "a"), ("assistant", "b")]))
    for end in ("<|im_end|>", "<|im_end|>\n", "<|im_end|><|im_end|>"):
        turns = [("user", "Hi"), ("assistant", f"Hello!{end}"), ("user", "a"), ("assistant", f"b{end}")]
        tokens = encode(tiny_tokenizer, chat(turns))
        assert (
            (tokens.input_ids, tokens.scored) == (want.input_ids, want.scored)
            and tokens.extra_stops
            and not want.extra_stops
        )
        history = chat(turns).messages[:3]
        assert encode_prompt(tiny_tokenizer, history) == want.input_ids[: len(encode_prompt(tiny_tokenizer, history))]
    alone = chat([("user", "Hi"), ("assistant", "<|im_end|>\n")])  # as a reward model may be given one, and no row may
    assert runs(tiny_tokenizer, encode(tiny_tokenizer, alone)) == ["<|im_end|>"]
    with pytest.raises(TokenizeError, match=r"turn 2 \(assistant\) is only a stop token") as caught:
        encode_instruction([alone.messages, None, {}], tiny_tokenizer, "assistant", 100, False)
    assert caught.value.kind == "empty turn"


def test_a_generation_prompt_that_opens_a_block_is_named(tiny_tokenizer):
    for template in (tiny_tokenizer.chat_template, CHAT_TEMPLATES["chatml"].template):  # without markers, and with
        head, end, tail = template.rpartition("' }}{% endif %}")
        tiny_tokenizer.chat_template = f"{head}<think>{end}{tail}"
        for loss_on in ("assistant", "last"):
            with pytest.raises(TokenizeError, match=r"ends with '<think>', .*chat_template.*FILE") as caught:
                encode(tiny_tokenizer, chat(CONVERSATIONS["english"]), loss_on)
            assert "loss_on" not in str(caught.value)
