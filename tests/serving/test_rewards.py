"""``/v1/rewards`` gives the numbers that PPO gets."""

import asyncio
import json
import threading

import pytest
import torch
from in_loop import in_loop

from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.data.tokens import encode_prompt
from lightning_rlhf.rewards import RewardModelReward, Samples, make_reward, render
from lightning_rlhf.serving.errors import ApiError
from lightning_rlhf.serving.scoring import Scorer

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who was Ben?"}]
ANSWERS = ["A dog.", "Ben was a big, red fox who liked to play.", "He"]


@pytest.fixture(scope="module")
def reward(run_dir, served):
    reward = RewardModelReward(run_dir / "reward" / "hf" / "best", served.tokenizer)
    reward.load()
    return reward


def expected(reward, served, prompts, answers, truncated):
    trees = render(served.tokenizer, prompts, answers, truncated)
    return reward(Samples(pack(trees), prompts, answers, truncated, {})).total.tolist()


def test_scores_equal_the_reward_models_on_the_same_rows(client, reward, served):
    conversations = [
        {"prompt": CHAT, "answers": ANSWERS, "truncated": [False, True, False]},
        {"messages": [*CHAT, {"role": "assistant", "content": ANSWERS[0]}]},
        {"prompt": "Once upon a", "answers": ["time", " time there was"]},
    ]
    found = client.post("/v1/rewards", json={"conversations": conversations})
    assert found.status_code == 200, found.text
    want = expected(
        reward, served, [CHAT] * 4 + ["Once upon a"] * 2, [*ANSWERS, ANSWERS[0], "time", " time there was"],
        [False, True, False, False, False, False],
    )  # fmt: skip
    data = found.json()["data"]
    assert [entry["index"] for entry in data] == [0, 1, 2]
    assert [len(entry["scores"]) for entry in data] == [3, 1, 2]
    scores = [score for entry in data for score in entry["scores"]]
    assert scores == pytest.approx(want, abs=1e-5)
    assert scores[0] == pytest.approx(scores[3], abs=1e-5), "both forms of one conversation"
    assert len({round(score, 4) for score in scores}) == 5
    assert found.json()["model"] == "reward" and found.json()["usage"]["total_tokens"] > 50


def test_a_chats_reward_is_that_of_the_sampled_tokens(client, reward, served):
    body = {"messages": CHAT, "max_tokens": 30, "n": 3, "seed": 5, "reward": True, "stop": ["."], "logprobs": True}
    choices = client.post("/v1/chat/completions", json=body).json()["choices"]
    ids = {served.tokenizer.convert_ids_to_tokens(i): i for i in range(len(served.tokenizer))}
    prompt = encode_prompt(served.tokenizer, CHAT)
    trees = []
    for choice in choices:
        names = [entry["token"].replace(" ", "▁") for entry in choice["logprobs"]["content"]]
        tokens = [ids[name] for name in names]
        if choice["finish_reason"] == "stop" and tokens[-1] not in served.stops:
            tokens[-1] = served.stops[0]  # PPO ends an answer that a stop string ended by the stop token
        trees.append(Tree(prompt, [Branch(tokens)]))
    texts = [choice["message"]["content"] for choice in choices]
    want = reward(Samples(pack(trees), [CHAT] * 3, texts, [False] * 3, {})).total.tolist()
    assert [choice["reward"] for choice in choices] == pytest.approx(want, abs=1e-5)
    assert {choice["finish_reason"] for choice in choices} == {"stop"}, "the stop strings are what is tested"


def test_a_streams_last_chunks_have_the_rewards(client):
    body = {"messages": CHAT, "max_tokens": 12, "n": 2, "seed": 5, "reward": True}
    whole = client.post("/v1/chat/completions", json=body).json()["choices"]
    lines = client.post("/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and not line.endswith("[DONE]")]
    ends = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert [end["reward"] for end in ends] == pytest.approx([choice["reward"] for choice in whole], abs=1e-5)


@pytest.mark.parametrize(
    "conversation, says",
    [
        ({"prompt": "a"}, "give messages, or prompt and answers"),
        ({"answers": ["a"]}, "give messages, or prompt and answers"),
        ({"messages": CHAT}, "the assistant's answer"),
        ({"prompt": "a", "answers": []}, "answers must be a list of 1 to"),
        ({"prompt": "a", "answers": ["b"], "truncated": [True, False]}, "one entry per answer"),
        ({"prompt": "word " * 600, "answers": ["b"]}, "512"),
    ],
)
def test_what_cannot_be_scored_is_refused(client, conversation, says):
    found = client.post("/v1/rewards", json={"conversations": [conversation]})
    assert found.status_code == 400
    assert says in found.json()["error"]["message"]


def lengths(prompts, completions):
    return [float(len(c)) for c in completions]


@in_loop
async def test_a_function_scores_too_and_its_parts_are_named(running, served):
    made = make_reward([{"source": lengths, "weight": 2.0}], served.tokenizer)
    async with running(scorer=Scorer("lengths", made, served.tokenizer)) as app:
        body = {"conversations": [{"prompt": "Ben", "answers": ["a", "bbb"]}]}
        [entry] = (await app.client.post("/v1/rewards", json=body)).json()["data"]
        assert entry["scores"] == [2.0, 6.0] and entry["parts"] == {"lengths": [1.0, 3.0]}
        assert (await app.client.post("/v1/rewards", json={**body, "model": "other"})).status_code == 404


@in_loop
async def test_a_conversation_that_is_too_long_says_both_numbers(running, reward, served):
    async with running(scorer=Scorer("reward", reward, served.tokenizer)) as app:
        prompt, answers = "word " * 300, ["b"]
        [tree] = render(served.tokenizer, [prompt], answers, [False])
        body = {"conversations": [{"prompt": prompt, "answers": answers}]}
        found = (await app.client.post("/v1/rewards", json=body)).json()["error"]
        assert found["code"] == "context_length_exceeded"
        assert f" {tree.num_tokens} tokens" in found["message"] and " 512 tokens" in found["message"]


@in_loop
async def test_a_full_queue_of_the_reward_is_429(running, served):
    go = threading.Event()

    def slow(prompts, completions):
        go.wait()
        return [0.0 for _ in completions]

    scorer = Scorer("slow", make_reward(slow, served.tokenizer), served.tokenizer, max_queue=1)
    async with running(scorer=scorer) as app:
        body = {"conversations": [{"prompt": "a", "answers": ["b"]}]}
        tasks = [asyncio.create_task(app.client.post("/v1/rewards", json=body)) for _ in range(3)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result().status_code for task in done] == [429]
        go.set()
        assert sorted([(await task).status_code for task in tasks]) == [200, 200, 429]


@in_loop
async def test_without_a_reward_both_ways_say_how_to_get_one(running):
    async with running() as app:
        chat = {"messages": [{"role": "user", "content": "a"}], "reward": True}
        for path, body in (("/v1/rewards", {"conversations": [{"prompt": "a", "answers": ["b"]}]}),
                           ("/v1/chat/completions", chat)):  # fmt: skip
            found = await app.client.post(path, json=body)
            assert found.status_code == 400 and "--reward" in found.json()["error"]["message"]


def test_scores_that_are_not_finite_are_an_error_of_the_server(served):
    def bad(prompts, completions):
        return [torch.nan for _ in completions]

    scorer = Scorer("bad", make_reward(bad, served.tokenizer), served.tokenizer)
    with pytest.raises(ApiError, match="not a finite number") as caught:
        asyncio.run(scorer.score(["a"], ["b"], [False]))
    assert caught.value.status == 500
