"""A directory of 4-bit weights in the GPTQ format, served."""

import httpx
import pytest
import torch
from server_process import serving
from widened import save_widened

from lightning_rlhf.models import load_tokenizer
from lightning_rlhf.models.loading import load_exported
from lightning_rlhf.quantize import Grid
from lightning_rlhf.quantize.methods import quantize

pytest.importorskip("gptqmodel", reason="gptqmodel isn't installed")


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory, stories_model_dir):
    folder = tmp_path_factory.mktemp("four_bits")
    wide = save_widened(stories_model_dir, folder / "wide")
    tokenizer = load_tokenizer(wide)
    rows = torch.randint(3, len(tokenizer), (16, 64), generator=torch.Generator().manual_seed(0))
    return quantize(wide, folder / "stories", "gptq", Grid(4, 32, True), list(rows))


def test_a_gptq_directory_is_served_with_its_own_answers(four_bits, tmp_path):
    model, tokenizer = load_exported(four_bits, "float32").eval(), load_tokenizer(four_bits)
    ids = tokenizer("Once upon a time")["input_ids"]
    with torch.no_grad():
        whole = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0]
        logits = model(whole[None]).logits[0, :-1].log_softmax(-1)
    want = logits.gather(1, whole[1:, None])[:, 0].tolist()
    body = {"prompt": ids, "max_tokens": 24, "temperature": 0, "echo": True, "logprobs": 1}
    with serving(tmp_path / "log", four_bits) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        assert client.get("/health").json()["engines"] == {"stories": "CachedEngine"}
        [choice] = client.post("/v1/completions", json=body).json()["choices"]
        chat = {"messages": [{"role": "user", "content": "Who was Ben?"}], "max_tokens": 8, "seed": 1}
        answers = [client.post("/v1/chat/completions", json=chat).json()["choices"] for _ in range(2)]
    assert choice["text"] == tokenizer.decode(whole, skip_special_tokens=True)
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(want, abs=1e-3)
    assert answers[0] == answers[1] and answers[0][0]["message"]["content"]
