"""Fixtures: a tiny tokenizer and model made here, a small trained one, and the folder with real data."""

import os
import signal
import threading
from html.parser import HTMLParser
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_WAIT_POLICY="PASSIVE",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
ROOT = Path(__file__).resolve().parents[1]
# a shell's background jobs, and their children, ignore Ctrl-C: tests of it would wait for nothing
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris.",
    "user assistant system Hello, how are you? I am fine, thank you!",
    "今天天气很好，我们去公园散步吧。你好，请问北京在哪里？",
    "机器学习是人工智能的一个分支。def add(a, b): return a + b",
]


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker begins one when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in slow)  # stable


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Tokenized rows go to a folder of the test run's."""
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def ports():
    """No run inherits the port that an earlier one chose: by then another process may hold it."""
    yield
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def assets():
    """The folder with real data."""
    folder = Path(os.environ.get("LIGHTNING_RLHF_ASSETS", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no assets in {folder}: set LIGHTNING_RLHF_ASSETS")
    return folder


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="</s>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=100_000,  # the model's context decides
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = CHATML
    return fast


@pytest.fixture
def tiny_tokenizer():
    """Byte-level BPE of about 400 entries, ChatML, eos <|im_end|>, pad </s>."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A random Llama of two layers beside the tiny tokenizer, as a Hugging Face directory."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"), width=32)


@pytest.fixture(scope="session")
def stories_model_dir():
    """stories260K, a trained Llama with a SentencePiece-like tokenizer: tests/assets/README.md."""
    return ROOT / "tests" / "assets" / "stories260K"


@pytest.fixture(scope="session")
def wide_model_dir(tmp_path_factory):
    """The same in the width that 4-bit layers need on a CPU."""
    return save_tiny_model(tmp_path_factory.mktemp("wide-model"), width=64)


@pytest.fixture(scope="session")
def deep_model_dir(tmp_path_factory):
    """The tiny one with four layers."""
    return save_tiny_model(tmp_path_factory.mktemp("deep-model"), width=32, layers=4)


def save_tiny_model(path, width, layers=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attention_dropout=0.0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


_VOID = {"meta", "line", "polyline", "polygon", "path", "br"}


class Page(HTMLParser):
    """Elements with their tags, attributes and text; refuses tags that don't match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        element = dict(tag=tag, text="", inside=[e["tag"] for e in self._open], **{f"@{k}": v for k, v in attrs})
        self.elements.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        assert tag in _VOID

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag, **attributes):
        wanted = {f"@{k.rstrip('_')}": v for k, v in attributes.items()}
        return [e for e in self.elements if e["tag"] == tag and all(e.get(k) == v for k, v in wanted.items())]

    def texts(self, tag, **attributes):
        return [e["text"] for e in self.all(tag, **attributes)]


@pytest.fixture
def parse():
    """``parse(text or path)``: the elements of a page, which must be well-formed."""
    return lambda page: Page(page.read_text(encoding="utf-8") if isinstance(page, Path) else page)
