"""Log-probs of prompts: in pieces between the steps of running streams, and the same numbers."""

import asyncio
import itertools
import math

import pytest
import torch
from in_loop import in_loop

from lightning_rlhf.rollout.kv_cache import Decoder
from lightning_rlhf.rollout.scheduler import Scheduler
from lightning_rlhf.serving.logprobs import prompt_logprobs

PROMPT = [1, *(3 + 7 * i % 500 for i in range(299))]


@in_loop
async def test_pieces_alternate_with_the_steps_of_a_stream(running, monkeypatch):
    step, extend, events = Scheduler.step, Decoder.extend, []

    def stepping(self):
        events.append("step")
        step(self)

    def extending(self, tokens, *args, every=False, **kwargs):
        if every:
            events.append(len(tokens))
        return extend(self, tokens, *args, every=every, **kwargs)

    monkeypatch.setattr(Scheduler, "step", stepping)
    monkeypatch.setattr(Decoder, "extend", extending)
    long = {"prompt": "Once", "max_tokens": 400, "min_tokens": 400, "seed": 1}
    echo = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1}
    async with running() as app:
        running_one = asyncio.create_task(app.client.post("/v1/completions", json=long))
        while events.count("step") < 5:
            await asyncio.sleep(0.001)
        answers = await asyncio.gather(*(app.client.post("/v1/completions", json=echo) for _ in range(2)))
        assert not running_one.done()
        assert answers[0].json()["choices"] == answers[1].json()["choices"]
        assert len(answers[0].json()["choices"][0]["logprobs"]["tokens"]) == 300
        text = (await running_one).json()["choices"][0]["text"]
        alone = (await app.client.post("/v1/completions", json=long)).json()["choices"][0]["text"]
    assert text == alone
    pieces = [i for i, event in enumerate(events) if event != "step"]
    assert sorted(events[i] for i in pieces) == [11, 11, *[48] * 12]  # nothing follows the last token
    assert all("step" in events[a:b] for a, b in itertools.pairwise(pieces))


@pytest.mark.parametrize("temperature", [0, 2.0])
@pytest.mark.parametrize("length", [1, 2, 65, 300])
def test_pieces_give_the_log_probs_of_the_whole(served, length, temperature):
    prompt = PROMPT[:length]
    pieces = list(prompt_logprobs(served.policy, None, prompt, temperature, 2, 64))
    assert [len(piece) for piece in pieces][:-1] == [65, *[64] * (len(pieces) - 2)][: len(pieces) - 1]
    found = [token for piece in pieces for token in piece]
    [whole] = prompt_logprobs(served.policy, None, prompt, temperature, 2)
    with torch.no_grad(), served.policy.native_attention() as model:
        logits = model(input_ids=torch.tensor([prompt])).logits[0, :-1] / (temperature or 1)
    want = logits.log_softmax(-1)
    for tokens in (found, whole):
        assert [token.id for token in tokens] == prompt and math.isnan(tokens[0].logprob)
        own = want.gather(1, torch.tensor(prompt[1:], dtype=torch.long)[:, None])[:, 0].tolist()
        assert [token.logprob for token in tokens[1:]] == pytest.approx(own, abs=1e-4)
        best = want.topk(2)
        assert [[i for i, _ in token.alternatives] for token in tokens[1:]] == best.indices.tolist()
        values = [p for token in tokens[1:] for _, p in token.alternatives]
        assert values == pytest.approx(best.values.flatten().tolist(), abs=1e-4)
