"""Collecting from a server that fails, bills and plants faults by rule: counts, kills, concurrency, budget."""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter

import pytest
from collecting import Collecting, attempts
from endpoint import PASSING, FakeEndpoint, planted
from forked import python
from server_process import serving

from lightning_rlhf.collection import command
from lightning_rlhf.collection.parse import same

#: Kills of each test. By hand: KILLS=100.
KILLS = int(os.environ.get("KILLS", "4"))
GENERATOR = (
    "{{class_path: EndpointGenerator, init_args: {{base_url: {url}, model: fake, concurrency: {concurrency}, "
    "backoff: 0.01, timeout: 5, retries: 8, patience: 50}}}}"
)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Seeds of one line each, so that a list shows them whole."""
    path = tmp_path_factory.mktemp("seeds") / "seeds.jsonl"
    rows = [{"prompt": planted.task(lang, i, i, 23 - i), "lang": lang} for lang in ("en", "zh") for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def processes():
    return Collecting()


def options(out, url, seeds, languages="{en: 40, zh: 40}", concurrency=8):
    generator = GENERATOR.format(url=url, concurrency=concurrency)
    wanted = ["--languages", languages, "--seeds", str(seeds), "--pilot", "3", "--requests", "6", "--min_yield", "0"]
    return ["--out", str(out), "--generator", generator, *wanted]


def data(out):
    parts = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
    return parts | {path.name: path.read_bytes() for path in (out / "trace").iterdir() if path.name != "settings.json"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, seeds):
    """The files of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with FakeEndpoint(seed=1) as server:
        command.main(options(out, server.url, seeds))
        before = len(server.requests)
        command.main(options(out, server.url, seeds))
        assert len(server.requests) == before  # a second run sends nothing
    return out


@pytest.mark.parametrize("concurrency", [1, 4, 32])
def test_neither_concurrency_nor_delays_nor_faults_change_a_file(concurrency, whole, seeds, tmp_path):
    faults = dict.fromkeys(set(PASSING) - {"silence", "hang"}, 0.03)
    with FakeEndpoint(seed=1, faults=faults, delay=(0, 0.02)) as server:
        command.main(options(tmp_path / "out", server.url, seeds, concurrency=concurrency))
        assert server.faulty.total() > 5 and server.most <= concurrency
    assert data(tmp_path / "out") == data(whole)


def test_each_step_drops_what_was_planted(seeds, tmp_path):
    shares = planted.Shares(broken=0.0)
    with FakeEndpoint(seed=2, shares=shares) as server:
        command.main([*options(tmp_path / "out", server.url, seeds, "{en: 90, zh: 90}"), "--requests", "20"])
        asked = [body for _, body in server.requests]
    expected, answers = Counter(), Counter()
    for body in asked:
        said = planted.plant(body, 2, shares)
        if said.mode == "answer":
            answers.update(said.counts())
            continue
        seen = {same(text) for _, text in planted.NUMBERED.findall(body["messages"][-1]["content"])}
        for kind, text in said.items:
            again = kind != "refusal" and same(text) in seen
            expected["again" if again else kind] += 1
            seen.add(same(text))
    found, dropped, of_rows = Counter(), Counter(), Counter()
    steps = [json.loads(path.read_text())["step"] for path in sorted((tmp_path / "out" / "trace").glob("step-*"))]
    for count in (count for step in steps for count in step["counts"].values()):
        found.update(count["unread"])
        for total, tally in ((dropped, count["instruction"]), (of_rows, count["row"])):
            for name, of_filter in tally["filters"].items():
                total[name] += of_filter["dropped"]
                total[f"{name} changed"] += of_filter["changed"]
    assert found["repeats an example"] + found["repeats itself"] == expected["again"] > 0
    assert found["an answer"] == expected["refusal"] > 0
    assert dropped["Script"] == expected["foreign"] > 0
    assert dropped["Length"] == expected["short"] > 0
    assert dropped["Repetition"] == expected["repeated"] > 0
    assert dropped["MissingInput"] == expected["missing"] > 0
    assert dropped["PersonalData changed"] == expected["personal"] > 0  # not what is "nobody"'s
    assert expected["nobody"] > 0
    kept = " ".join(task["text"] for step in steps for task in step["remembered"])
    for mask in ("[EMAIL]", "[PHONE]", "[CARD NUMBER]", "[ID NUMBER]", ".example.com", " 4111 1111 1111 1111"):
        assert mask in kept
    assert ".zz" not in kept and "4012 8888" not in kept and "11010519491231002X" not in kept
    assert of_rows["PersonalData changed"] == answers["personal"] > 0
    assert set(found) == {"repeats an example", "repeats itself", "an answer"}
    assert of_rows["Refusal"] >= answers["refusal"] > 0  # some of the bundled answers decline too
    assert of_rows["Repetition"] == answers["repeated"] > 0


@pytest.mark.slow
def test_kills_change_no_file_and_lose_no_reply(whole, seeds, tmp_path, processes):
    rng, concurrency = random.Random(KILLS), 8
    with FakeEndpoint(seed=1, delay=(0, 0.01 * KILLS)) as server:
        arguments = options(tmp_path / "out", server.url, seeds, concurrency=concurrency)
        processes.kill_often(arguments, rng, KILLS, server, len(attempts(whole / "ledger.sqlite")))
        again = check_bill(server.bill, tmp_path / "out" / "ledger.sqlite", KILLS, concurrency)
        before = len(server.requests)
        assert processes.finish(arguments) == 0 and len(server.requests) == before
    print(f"\n{KILLS} kills at concurrency {concurrency}, {before} requests, {again} paid for again")
    assert data(tmp_path / "out") == data(whole)


def check_bill(bill, ledger, killed, concurrency):
    """What the server billed is what the ledger knows as paid or lost, and little was paid for twice: how much."""
    again = len(bill) - len({line["body"] for line in bill})
    assert again <= killed * concurrency
    known = {name: (state, tokens) for name, state, tokens in attempts(ledger)}
    for line in bill:
        state, tokens = known[line["id"]]
        assert state in ("answered", "lost"), line
        if state == "answered":
            assert tokens == line["prompt"] + line["completion"]
    answered = Counter(name.rpartition("-")[0] for name, (state, _) in known.items() if state == "answered")
    assert max(answered.values()) == 1  # no reply that arrived was asked for again
    return again


@pytest.mark.slow
def test_a_budget_is_never_passed_and_leaves_what_it_paid_for(seeds, tmp_path, processes, capsys):
    prices = {"in": 1.0, "cached": 0.5, "out": 2.0}
    budget = 0.02
    with FakeEndpoint(seed=1, faults={"cut": 0.1, "http_500": 0.1}, delay=(0, 0.05)) as server:
        arguments = options(tmp_path / "out", server.url, seeds, concurrency=32)
        arguments += ["--budget", json.dumps({"money": budget, "prices": prices})]
        for _ in range(3):
            process = processes.start(arguments)
            process.join(3)
            process.kill()
            process.join()
        with pytest.raises(SystemExit, match=r"The budget is used up: of 0\.02 money"):
            command.main(arguments)
        prompt, cached, completion = server.spent()
        spent = ((prompt - cached) * prices["in"] + cached * prices["cached"] + completion * prices["out"]) / 1e6
        assert 0.2 * budget < spent <= budget
        command.main([*arguments[:-2], "--budget", json.dumps({"money": 20, "prices": prices})])
    rows = [line for part in ("train", "val") for line in (tmp_path / "out" / f"{part}.jsonl").open(encoding="utf-8")]
    assert len(rows) == 80


def test_a_budget_too_small_for_one_request_says_so(seeds, tmp_path):
    with FakeEndpoint(seed=1) as server:
        arguments = [*options(tmp_path / "out", server.url, seeds), "--budget", "{tokens: 10}"]
        with pytest.raises(SystemExit, match=r"The budget is used up: of 10 tokens, 0 were spent or may be"):
            command.main(arguments)
        assert server.requests == []
    assert "0 instructions" in (tmp_path / "out" / "card.md").read_text()


@pytest.mark.slow
def test_a_thousand_rows_of_each_language(tmp_path):
    with FakeEndpoint(seed=3, faults=dict.fromkeys(("http_500", "truncated"), 0.02)) as server:
        generator = GENERATOR.format(url=server.url, concurrency=16)
        command.main(["--out", str(tmp_path / "out"), "--languages", "{en: 1000, zh: 1000}", "--generator", generator])
    rows = [
        json.loads(line)
        for part in ("train", "val")
        for line in (tmp_path / "out" / f"{part}.jsonl").open(encoding="utf-8")
    ]
    assert Counter(row["lang"] for row in rows) == {"en": 1000, "zh": 1000}
    assert len({same(row["messages"][0]["content"]) for row in rows}) == 2000
    assert all(planted.language(row["messages"][0]["content"]) == row["lang"] for row in rows)
    card = (tmp_path / "out" / "card.md").read_text(encoding="utf-8")
    assert "2,000 instructions with answers (1,000 in en, 1,000 in zh)" in card


@pytest.mark.slow
def test_kills_while_answers_are_ranked_change_no_file(seeds, tmp_path, processes):
    with FakeEndpoint(seed=4, delay=(0, 0.01 * KILLS)) as server:
        judge = (
            f"{{class_path: lightning_rlhf.evaluation.ChatJudge, init_args: {{base_url: {server.url}, model: judge, "
            "concurrency: 8, backoff: 0.01}}"
        )
        rest = ["--preferences", str(seeds), "--samples", "3", "--judge", judge, "--generator"]
        rest.append(GENERATOR.format(url=server.url, concurrency=8))
        assert processes.finish(["--out", tmp_path / "whole", *rest]) == 0
        first = len(server.bill)
        arguments = ["--out", tmp_path / "killed", *rest]
        processes.kill_often(arguments, random.Random(KILLS), KILLS, server, first)
        again = check_bill(server.bill[first:], tmp_path / "killed" / "ledger.sqlite", KILLS, 8)
        rows = [json.loads(line) for line in (tmp_path / "killed" / "train.jsonl").open(encoding="utf-8")]
        before = len(server.requests)
        assert processes.finish(arguments) == 0 and len(server.requests) == before
    print(f"\n{KILLS} kills at concurrency 8, {before - first} requests, {again} paid for again")
    assert data(tmp_path / "killed") == data(tmp_path / "whole")
    for row in rows:  # this server's judge prefers the longer answer
        assert [len(text) for text in row["ranked"]] == sorted(map(len, row["ranked"]), reverse=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_ctrl_c_waits_for_replies_and_a_second_one_does_not(seeds, tmp_path):
    with FakeEndpoint(seed=1, delay=(60, 60)) as server:
        command = [python(), "-m", "lightning_rlhf", "collect", *options(tmp_path / "out", server.url, seeds)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            while not server.requests:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            said = ""
            while "under way" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            rest = process.communicate(timeout=40)[1]
            assert time.monotonic() - start < 30  # less than a reply takes; most of it goes to the interpreter's end
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert re.search(r"SIGINT: waiting for what is under way \(\d requests\), .* Ctrl-C again ends at once", said)
    assert len(rest.strip().splitlines()) == 1 and rest.strip().startswith("SIGINT: stopped. What arrived is kept in ")
    assert {state for _, state, _ in attempts(tmp_path / "out" / "ledger.sqlite")} == {"lost"}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_real_server_writes_and_judges(stories_model_dir, tmp_path):
    """Ours, with a model of stories: its stories are answers, and it knows no verdict."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"A {what}."}) + "\n" for what in ("dog", "red ball", "tree")))
    template = tmp_path / "template.txt"
    template.write_text("{prompt} {answer_a} {answer_b}")
    with serving(tmp_path / "log", stories_model_dir) as server:
        model = stories_model_dir.name
        generator = GENERATOR.format(url=f"{server.url}/v1", concurrency=4).replace("model: fake", f"model: {model}")
        judge = (
            f"{{class_path: ChatJudge, init_args: {{base_url: {server.url}/v1, model: {model}, max_tokens: 8, "
            f"template: {template}}}}}"
        )
        arguments = ["--preferences", str(prompts), "--samples", "3"]
        writing = ["--generator", generator, "--answer_sampling", "{max_tokens: 400, temperature: 1.0}"]
        command.main(["--out", str(tmp_path / "ranked"), *arguments, *writing, "--reward", "reward_of_letters.letters"])
        # its own stories would not fit in its context of 512 tokens
        written = ["--generator", "scripted.Scripted"]
        command.main(["--out", str(tmp_path / "judged"), *arguments, *written, "--judge", judge])
    rows = [json.loads(line) for line in (tmp_path / "ranked" / "train.jsonl").open(encoding="utf-8")]
    assert rows and all(row["scores"] == sorted(row["scores"], reverse=True) for row in rows)
    card = (tmp_path / "judged" / "card.md").read_text(encoding="utf-8")
    assert "No pair has answers of different lengths" in card and "pairs without a verdict" in card
