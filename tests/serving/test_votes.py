"""Votes reach their files whole, whatever happens, and training reads them as they are."""

import hashlib
import json
import math
import multiprocessing
import os
import resource
import signal
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from ballots import PROMPT, answer, ballot, thumb
from in_loop import in_loop
from server_process import serving

from lightning_rlhf import PreferenceDataModule
from lightning_rlhf.data.preference_formats import to_preference
from lightning_rlhf.serving.tally import tally
from lightning_rlhf.serving.votes import Votes, preferences, unpaired
from lightning_rlhf.serving.weights import WeightHashes, weight_hashes


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def turn(text):
    return [{"role": "assistant", "content": text}]


# ------------------------------------------------------------------------------------------------ what rows follow


@pytest.mark.parametrize(
    "vote, pairs",
    [
        (ballot("left"), [("A dog.", "A cat.")]),
        (ballot("right"), [("A cat.", "A dog.")]),
        (ballot("tie"), []),
        (ballot("both_bad"), []),
        (ballot("left", edited={"answer": 0, "content": "My dog."}), [("A dog.", "A cat."), ("My dog.", "A dog.")]),
        (ballot("tie", edited={"answer": 1, "content": "My cat."}), [("My cat.", "A cat.")]),
        (ballot(None, edited={"answer": 1, "content": "My cat."}), [("My cat.", "A cat.")]),
        (ballot("left", right="A dog."), []),
        (ballot("left", right="  "), []),
        (ballot("left", left="\n\nHuman: a\n\nAssistant: b"), [("\n\nHuman: a\n\nAssistant: b", "A cat.")]),
        (thumb("good"), []),
    ],
)
def test_decided_votes_and_edits_are_preferences_and_nothing_else_is(vote, pairs):
    found = preferences(vote)
    assert found == [{"prompt": PROMPT, "chosen": turn(a), "rejected": turn(b)} for a, b in pairs]
    for row, (better, worse) in zip(found, pairs, strict=True):
        read = to_preference(row)  # the format is found out
        assert [answer[0]["content"] for answer in read.answers] == [better, worse] and list(read.prompt) == PROMPT
        assert read.unread == () and read.margins is None and read.scores is None


def test_thumbs_are_unpaired_rows():
    assert unpaired(thumb("good")) == [{"prompt": PROMPT, "completion": turn("A dog."), "label": True}]
    assert unpaired(thumb("bad")) == [{"prompt": PROMPT, "completion": turn("A dog."), "label": False}]
    assert unpaired(thumb("good", " ")) == [] and unpaired(ballot()) == []


def test_files_have_what_follows_and_undo_takes_it_back(tmp_path):
    votes = Votes(tmp_path / "new")
    assert votes.read() == [] and not votes.folder.exists(), "only a vote makes the folder"
    kept, gone, thumbed = (
        votes.add(ballot("left")),
        votes.add(ballot("right", comment="为什么\n不")),
        votes.add(thumb("bad")),
    )
    assert [row["chosen"] for row in lines(votes.folder / "preferences.jsonl")] == [turn("A dog."), turn("A cat.")]
    votes.undo(gone["id"])
    votes.undo(thumbed["id"])
    assert [row["id"] for row in votes.read()] == [kept["id"]]
    assert [row["chosen"] for row in lines(votes.folder / "preferences.jsonl")] == [turn("A dog.")]
    assert lines(votes.folder / "unpaired.jsonl") == []
    assert [row["kind"] for row in lines(votes.folder / "votes.jsonl")] == ["vote"] * 3 + ["undo"] * 2, (
        "nothing is lost"
    )
    with pytest.raises(KeyError):
        votes.undo(gone["id"])


def test_preference_data_module_reads_the_file_as_it_is(tmp_path, stories_model_dir):
    from lightning_rlhf.models import load_tokenizer

    votes = Votes(tmp_path)
    for i in range(8):
        votes.add(
            ballot(("left", "right", "tie", "both_bad")[i % 4], prompt=[{"role": "user", "content": f"Who {i}?"}])
        )
    tokenizer = load_tokenizer(stories_model_dir)
    data = PreferenceDataModule(str(tmp_path / "preferences.jsonl"), tokenizer=tokenizer, val_fraction=0.0)
    data.prepare_data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("fit")
    assert len(data._rows["train"]) == 4


# ------------------------------------------------------------------------------------------------ nothing is lost


def test_half_a_line_of_a_killed_process_does_no_harm(tmp_path):
    votes = Votes(tmp_path)
    first = votes.add(ballot())
    for name in ("votes.jsonl", "preferences.jsonl"):
        with open(tmp_path / name, "a", encoding="utf-8") as file:
            file.write('{"id": "half", "messages": [{"role": "us')
    assert [row["id"] for row in votes.read()] == [first["id"]]
    second = votes.add(ballot("right"))
    assert [row["id"] for row in lines(tmp_path / "votes.jsonl")] == [first["id"], second["id"]]
    assert len(lines(tmp_path / "preferences.jsonl")) == 2


def test_a_start_mends_files_that_a_killed_process_left_behind(tmp_path):
    votes = Votes(tmp_path)
    votes.mend()
    assert list(tmp_path.iterdir()) == [], "there is nothing to mend"
    votes.add(ballot())
    votes.add(thumb("good"))
    right = {name: (tmp_path / name).read_bytes() for name in ("preferences.jsonl", "unpaired.jsonl")}
    (tmp_path / "preferences.jsonl").unlink()
    (tmp_path / "unpaired.jsonl").write_text('{"prompt": ')
    Votes(tmp_path).mend()
    assert {name: (tmp_path / name).read_bytes() for name in right} == right


def test_a_line_that_is_no_vote_is_named(tmp_path):
    votes = Votes(tmp_path)
    votes.add(ballot())
    with open(tmp_path / "votes.jsonl", "a", encoding="utf-8") as file:
        file.write("what?\n")
    with pytest.raises(ValueError, match=r"votes\.jsonl, line 2 is not a vote"):
        votes.read()


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    Votes(tmp_path).add(ballot())
    before = (tmp_path / "votes.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, hard))
    try:
        with pytest.raises(OSError):
            Votes(tmp_path).add(ballot())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "votes.jsonl").read_bytes() == before


def test_a_vote_counts_though_what_follows_from_it_cannot_be_written(tmp_path, caplog):
    """A retry would store it twice."""
    votes = Votes(tmp_path)
    (tmp_path / "preferences.jsonl").mkdir()
    votes.add(ballot("left"))
    assert len(votes.read()) == 1 and "made anew" in caplog.text
    (tmp_path / "preferences.jsonl").rmdir()
    Votes(tmp_path).mend()
    assert len(lines(tmp_path / "preferences.jsonl")) == 1


def vote_often(folder, name):
    votes = Votes(folder)
    for i in range(40):
        row = votes.add(ballot("left", left=name * 5000, right="b", comment=f"{name}{i}"))
        if i % 10 == 0:
            votes.undo(row["id"])


@pytest.mark.distributed
def test_two_processes_never_mix_a_line(tmp_path):
    fork = multiprocessing.get_context("fork")  # it does not import torch again
    processes = [fork.Process(target=vote_often, args=(tmp_path, name)) for name in "xy"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    found = lines(tmp_path / "votes.jsonl")
    assert Counter(row.get("comment", " ")[0] for row in found) == {"x": 40, "y": 40, " ": 8}
    assert all(len(set(row["answers"][0]["content"])) == 1 for row in found if row["kind"] == "vote")
    assert len(lines(tmp_path / "preferences.jsonl")) == 72
    before = (tmp_path / "preferences.jsonl").read_bytes()
    Votes(tmp_path).mend()
    assert Counter(before.splitlines()) == Counter((tmp_path / "preferences.jsonl").read_bytes().splitlines())


@pytest.mark.slow
@pytest.mark.distributed
def test_kill_9_loses_no_vote_that_was_answered(tmp_path, run_dir):
    votes, answered = tmp_path / "votes", []
    with serving(tmp_path / "log", run_dir, "--votes", votes) as server:

        def post(i):
            with httpx.Client(base_url=server.url, timeout=60) as client:
                for j in range(1000):
                    found = client.post("/v1/votes", json=ballot(comment=f"{i} {j}" * 300))
                    assert found.status_code == 200, found.text
                    answered.append(found.json()["id"])
                    if len(answered) == 60:
                        os.kill(server.process.pid, signal.SIGKILL)

        with ThreadPoolExecutor(4) as pool:
            failures = [future.exception() for future in [pool.submit(post, i) for i in range(4)]]
        assert all(isinstance(failure, httpx.TransportError) for failure in failures), failures
    found = [row["id"] for row in Votes(votes).read()]
    assert len(answered) >= 60 and set(answered) <= set(found) and len(found) == len(set(found))
    Votes(votes).mend()
    assert len(lines(votes / "preferences.jsonl")) == len(found)


# ------------------------------------------------------------------------------------------------ over HTTP


@in_loop
async def test_a_vote_over_http_names_the_weights(running, tmp_path, stories_model_dir):
    hashes = WeightHashes({"stories": str(stories_model_dir)})
    async with running(votes=Votes(tmp_path), hashes=hashes) as app:
        body = ballot("right", sampling={"temperature": 0.5, "top_k": 3}, blind=True, comment="short")
        body["answers"][0]["model"] = "stories"
        found = await app.client.post("/v1/votes", json=body)
        assert found.status_code == 200, found.text
        assert found.json()["preferences"] == 1 and found.json()["unpaired"] == 0
        [row] = lines(tmp_path / "votes.jsonl")
        assert row["id"] == found.json()["id"] and row["time"].endswith("+00:00")
        digest = hashlib.sha256((stories_model_dir / "model.safetensors").read_bytes()).hexdigest()
        assert row["answers"][0]["weights"] == {"model.safetensors": digest}
        assert row["answers"][1]["weights"] is None, "another server's model"
        for name in ("messages", "vote", "sampling", "blind", "comment"):
            assert row[name] == body[name]
        assert [answer["seed"] for answer in row["answers"]] == [3, 3]
        assert [answer["reward"] for answer in row["answers"]] == [1.0, -1.0]
        summary = (await app.client.get("/v1/votes")).json()
        assert summary["votes"] == 1 and summary["folder"] == str(tmp_path)
        gone = await app.client.post("/v1/votes/undo", json={"id": row["id"]})
        assert gone.status_code == 200 and lines(tmp_path / "preferences.jsonl") == []
        again = await app.client.post("/v1/votes/undo", json={"id": row["id"]})
        assert again.status_code == 404 and "taken back" in again.json()["error"]["message"]


@in_loop
async def test_what_is_no_vote_is_refused_by_name(running, tmp_path):
    one = {"answers": [answer("sft", "A dog.")]}
    wrong = [
        ({"vote": "middle"}, "vote must be left, right"),
        ({"vote": "good"}, "one of left, right"),
        ({"vote": "left", **one}, "one of good, bad"),
        ({"vote": None}, "give vote, edited, or both"),
        ({"messages": [*PROMPT, *turn("a")]}, "end with the user's turn"),
        ({"answers": []}, "answers must be a list"),
        ({"edited": {"answer": 1, "content": "a"}, **one, "vote": "good"}, "edited.answer must be 0"),
        ({"edited": {"answer": 0, "content": ""}}, "edited.content must be"),
        ({"comment": "a" * 10_001}, "comment must be"),
        ({"sampling": {"temperature": "hot"}}, "sampling"),
        ({"margin": 1}, "no field margin"),
        ({"comment": "\ud800"}, "surrogate"),
    ]
    async with running(votes=Votes(tmp_path / "votes")) as app:
        for change, says in wrong:
            content = json.dumps({**ballot(), **change})
            found = await app.client.post("/v1/votes", content=content, headers={"content-type": "application/json"})
            assert found.status_code == 400 and says in found.json()["error"]["message"], (change, found.text)
    assert not (tmp_path / "votes").exists()


@in_loop
async def test_files_that_cannot_be_written_are_an_error(running, tmp_path):
    (tmp_path / "file").write_text("")
    async with running(votes=Votes(tmp_path / "file")) as app:
        found = await app.client.post("/v1/votes", json=ballot())
        assert found.status_code == 500 and "cannot be written" in found.json()["error"]["message"]


def test_threads_do_not_mix_lines(tmp_path):
    votes = Votes(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: votes.add(ballot(comment=str(i) * 3000)), range(40)))
    assert threading.active_count() < 20 and len(lines(tmp_path / "votes.jsonl")) == 40


def test_adapters_are_hashed_without_their_base(tmp_path):
    for name in ("model.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    assert weight_hashes(str(tmp_path)) == {
        "adapter_model.safetensors": hashlib.sha256(b"adapter_model.safetensors").hexdigest()
    }
    assert weight_hashes("no/model") == {}


# ------------------------------------------------------------------------------------------------ rates


def wilson(wins, n, z=1.959964):
    middle, half = wins / n + z * z / (2 * n), z * math.sqrt(wins / n * (1 - wins / n) / n + z * z / (4 * n * n))
    return [(middle + side) / (1 + z * z / n) for side in (-half, half)]


def votes_of(*choices, **more):
    return [ballot(choice, prompt=[{"role": "user", "content": str(i)}], **more) for i, choice in enumerate(choices)]


def test_rates_and_intervals_are_wilsons():
    found = tally(votes_of(*["left"] * 7, *["right"] * 3))
    [pair] = found["pairs"]
    assert (pair["a"], pair["b"], pair["wins"], pair["losses"]) == ("ppo", "sft", 3, 7)
    assert pair["rate"] == 0.3 and [pair["low"], pair["high"]] == pytest.approx(wilson(3, 10), abs=1e-4)
    assert found["left"]["rate"] == 0.7 and [found["left"]["low"], found["left"]["high"]] == pytest.approx(
        wilson(7, 10), abs=1e-4
    )
    assert found["reward"]["rate"] == 0.7, "the reward model prefers the left one in all"


def test_ties_count_half_and_say_nothing_of_reward_and_side():
    found = tally([*votes_of("left", "tie", "both_bad"), thumb("good"), thumb("good"), thumb("bad")])
    assert found["votes"] == 6 and found["both_bad"] == 1
    [pair] = found["pairs"]
    assert pair["rate"] == pytest.approx(1 / 3, abs=1e-4) and pair["ties"] == 2
    assert found["reward"]["votes"] == found["left"]["votes"] == 1
    assert found["thumbs"] == [{"model": "sft", **found["thumbs"][0]}] and found["thumbs"][0]["rate"] == 0.6667


def test_votes_on_one_prompt_are_one_sample():
    same, apart = tally([ballot("left")] * 20)["pairs"][0], tally(votes_of(*["left"] * 20))["pairs"][0]
    assert same["rate"] == apart["rate"] == 0.0 and same["high"] > 0.7 > 0.2 > apart["high"]


def test_no_votes_have_no_rates():
    found = tally([])
    assert found["pairs"] == found["thumbs"] == [] and found["reward"]["rate"] is None and found["left"]["votes"] == 0


def test_equal_rewards_count_half_and_a_model_beside_itself_has_no_win_rate():
    vote = ballot("left")
    vote["answers"] = [answer("sft", "a", reward=1.0), answer("sft", "b", reward=1.0)]
    found = tally([vote])
    assert found["pairs"] == [] and found["reward"]["rate"] == 0.5


def test_models_of_one_name_with_other_weights_are_told_apart():
    old, new = ballot("left"), ballot("right")
    old["answers"][0]["weights"], new["answers"][0]["weights"] = {"m": "a" * 64}, {"m": "b" * 64}
    assert [pair["b"] for pair in tally([old, new])["pairs"]] == ["sft aaaaaaaa", "sft bbbbbbbb"]
