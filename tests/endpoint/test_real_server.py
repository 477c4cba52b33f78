"""The endpoint asks a real server, our own, of a small trained model."""

from pathlib import Path

import pytest
from server_process import serving

from lightning_rlhf.endpoint import Budget, ChatRequest, Endpoint, EndpointError, Ledger


@pytest.mark.distributed
def test_a_real_server_answers_and_its_usage_is_counted(stories_model_dir, tmp_path):
    asked = [
        ChatRequest([{"role": "user", "content": f"Tell me about {what}."}], i, temperature=1.0, max_tokens=20, seed=i)
        for i, what in enumerate(["a dog", "a cat", "小狗", "a very old tree"])
    ]
    with serving(tmp_path / "log", stories_model_dir) as server, Ledger(tmp_path / "l.db") as ledger:
        model = Path(stories_model_dir).name
        budget = Budget(tokens=5000)
        with Endpoint(f"{server.url}/v1", model, concurrency=2) as endpoint:
            replies = endpoint.ask(asked, ledger, budget)
            with pytest.raises(EndpointError, match="HTTP 404"):
                Endpoint(f"{server.url}/v1", "another").ask(asked[:1])
        for one, reply in zip(asked, replies, strict=True):
            most = budget.most(one.body(model)).tokens
            assert reply.text and reply.usage.prompt > 0 and reply.usage.prompt + reply.usage.completion < most
            assert set(reply.notes) <= {"length"} and (reply.usage.completion == 20 or reply.finish_reason == "stop")
        assert ledger.totals().paid.tokens == sum(one.usage.prompt + one.usage.completion for one in replies)
    with Ledger(tmp_path / "l.db") as ledger, Endpoint(f"{server.url}/v1", model) as endpoint:
        assert endpoint.ask(asked, ledger, budget) == replies  # nobody is there any more
