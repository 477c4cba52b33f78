"""The chat page in a real browser, Chromium without a window, against a real server."""

import json
import os
import re
import shutil
import time
from importlib import resources

import pytest
from proxy import Proxy
from server_process import serving

from lightning_rlhf.cli import cli
from lightning_rlhf.serving.votes import Votes

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: make browser"),
]
expect = playwright.expect
expect.set_options(timeout=30_000)  # a busy machine
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
SHORT = {"max_tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 1}
DONE = "[data-again]"  # the button that is there once all answers are


@pytest.fixture(scope="module")
def chat_server(tmp_path_factory, run_dir):
    """A real server with two models, their base and a reward model, behind a proxy."""
    folder = tmp_path_factory.mktemp("chat")
    with serving(folder / "log", run_dir, "--votes", folder / "votes") as process:
        proxy = Proxy(process.url)
        proxy.votes = Votes(folder / "votes")
        yield proxy
        proxy.stop()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # as root, as in CI, Chromium's own sandbox does not start
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=CHROMIUM, args=[*sandbox, "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, chat_server):
    """Opens the page in a fresh browser profile; at the end nothing may have left the host, or failed."""
    contexts, requests, errors, allowed = [], [], [], []

    def start(prefs=None, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(60_000)
        context.on("request", lambda request: requests.append(request.url))
        context.on("weberror", lambda error: errors.append(str(error.error)))
        context.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        stored = json.dumps({"sampling": SHORT, "language": "en", **(prefs or {})})
        name = "lightning_rlhf.settings"
        known = f"location.protocol === 'about:' || localStorage.getItem('{name}')"  # the first page is a blank one
        context.add_init_script(f"{known} || localStorage.setItem('{name}', {stored!r})")
        contexts.append(context)
        return context

    def open_page(prefs=None, context=None, **options):
        page = (context or start(prefs, **options)).new_page()
        page.goto(chat_server.url)
        page.locator("#model-0 option").first.wait_for(state="attached")
        return page

    open_page.allow = allowed.append
    yield open_page
    for context in contexts:
        context.close()
    elsewhere = [url for url in requests if not url.startswith((chat_server.url, f"blob:{chat_server.url}"))]
    assert elsewhere == []
    assert [error for error in errors if not any(text in error for text in allowed)] == []


def send(page, text, wait=True):
    before = page.locator(".turn").count()
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    if wait:
        page.locator(".turn").nth(before).locator(DONE).wait_for()


def events(text, **end):
    """An answer as the server streams it."""

    def chunk(delta, **more):
        return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': None, **more}]})}\n\n"

    pieces = [text[i : i + 50] for i in range(0, len(text), 50)]
    return (
        "".join(chunk({"content": piece}) for piece in pieces)
        + chunk({}, finish_reason="stop", **end)
        + "data: [DONE]\n\n"
    )


def answers(page, *texts, **end):
    """Has the page get these answers instead of the server's."""
    left = iter(texts)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        content_type="text/event-stream", body=events(next(left), **end)))  # fmt: skip


def rows(votes, name):
    path = votes.folder / name
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ talking


def test_send_stream_regenerate_edit_and_undo(visit, chat_server):
    page = visit()
    expect(page.locator("#send")).to_be_disabled()
    page.fill("#prompt", "Once")
    page.dispatch_event("#prompt", "keydown", {"key": "Enter", "isComposing": True})
    assert page.locator(".turn").count() == 0, "Enter that ends the input of Chinese characters sends nothing"
    send(page, "Once upon a time")
    text = page.locator(".answer .text")
    first = text.inner_text()
    assert first and re.fullmatch(r"reward -?\d+\.\d\d", page.locator(".reward").inner_text())
    page.click(DONE)
    expect(page.locator(".place")).to_have_text("2 of 2")
    page.locator(DONE).wait_for()
    second = text.inner_text()
    assert second != first, "it has another seed"
    page.get_by_label("Earlier answer").click()
    expect(text).to_have_text(first, use_inner_text=True)
    send(page, "And then?")
    assert page.locator(".turn").count() == 2
    page.locator(".question").first.hover()
    page.get_by_label("Edit your message").first.click()
    page.locator(".question textarea").fill("Ben was")
    page.get_by_text("Save and send").click()
    expect(page.locator(".bubble")).to_have_text("Ben was")
    page.locator(DONE).wait_for()
    assert page.locator(".turn").count() == 1
    page.locator("#toast").get_by_text("Undo").click()
    expect(page.locator(".bubble").first).to_have_text("Once upon a time")
    assert page.locator(".turn").count() == 2


def test_an_answer_streams_and_stop_frees_its_row(visit, chat_server):
    page = visit({"sampling": {**SHORT, "max_tokens": 400}})
    chat_server.limit = 4_000  # the answer waits in its middle
    try:
        send(page, "Once upon a time there was a big", wait=False)
        expect(page.locator(".answer .text")).to_have_text(re.compile(".{20,}"))
        seen = page.locator(".answer .text").inner_text()
        chat_server.limit = 8_000
        expect(page.locator(".answer .text")).not_to_have_text(seen, use_inner_text=True)
        expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
        expect(page.locator("#send")).to_be_hidden()
        page.keyboard.press("Escape")
        expect(page.locator(".note")).to_have_text("Stopped.")
    finally:
        chat_server.limit = None
    running = page.evaluate(
        "async () => { for (let i = 0; i < 100; i++) { const text = await (await fetch('/metrics')).text();"
        " const rows = text.match(/^lightning_rlhf_rows_running (.*)$/m)[1];"
        " if (rows === '0.0') return rows; await new Promise((r) => setTimeout(r, 50)); } return 'still running'; }"
    )
    assert running == "0.0"
    send(page, "Ben")
    assert page.locator(".turn").count() == 2 and page.locator(".answer .text").last.inner_text()


def test_reload_keeps_the_history_and_two_tabs_share_it(visit):
    page = visit()
    send(page, "Once upon a time")
    text = page.locator(".answer .text").inner_text()
    page.reload()
    expect(page.locator(".answer .text")).to_have_text(text, use_inner_text=True)
    other = visit(context=page.context)
    expect(other.locator("#history .chat")).to_have_text(["Once upon a time"])
    assert other.locator(".turn").count() == 0
    send(other, "Ben was")
    expect(page.locator("#history .chat")).to_have_text(["Ben was", "Once upon a time"])
    other.locator("#history .chat", has_text="Once").click()
    expect(other.locator(".answer .text")).to_have_text(text, use_inner_text=True)
    send(other, "And then?")
    expect(page.locator(".turn")).to_have_count(2)
    page.locator("#history li", has_text="Ben was").hover()
    page.get_by_label("Delete this chat: Ben was").click()
    expect(other.locator("#history .chat")).to_have_count(1)
    page.locator("#toast").get_by_text("Undo").click()
    expect(other.locator("#history .chat")).to_have_count(2)


def test_server_gone_and_back(visit, chat_server):
    visit.allow("ERR_")
    page = visit({"sampling": {**SHORT, "max_tokens": 400}})
    chat_server.limit = 8_000  # the answer waits in its middle
    try:
        send(page, "Once upon a time", wait=False)
        expect(page.locator(".answer .text")).to_have_text(re.compile(".{20,}", re.DOTALL))
        chat_server.stop()
        expect(page.locator(".note.bad")).to_have_text("The answer did not come: the connection was lost")
        assert len(page.locator(".answer .text").inner_text()) > 10, "what came stays"
        expect(page.locator("#banner")).to_have_text("The server does not answer. Trying again…")
    finally:  # also for the tests that follow
        chat_server.limit = None
        chat_server.stop()
        chat_server.start()
    expect(page.locator("#banner")).to_be_hidden()
    page.get_by_text("Try again").click()
    page.get_by_label("Copy").wait_for()
    assert page.locator(".note.bad").count() == 0


def test_a_key_is_asked_for(visit):
    visit.allow("401")

    def guarded(route):
        if route.request.headers.get("authorization") == "Bearer secret":
            return route.continue_()
        error = {"error": {"message": "The API key is missing or wrong.", "code": "invalid_api_key"}}
        return route.fulfill(status=401, content_type="application/json", body=json.dumps(error))

    page = visit()
    page.route("**/v1/**", guarded)
    page.reload()
    page.fill("#key-input", "secret")
    page.press("#key-input", "Enter")
    page.locator("#model-0 option").first.wait_for(state="attached")
    send(page, "Once")
    assert page.locator(".answer .text").inner_text()


def test_export_has_the_chat(visit):
    page = visit({"system": "Be kind."})
    send(page, "Once upon a time")
    found = {}
    for kind in ("markdown", "json", "all"):
        page.click("#export")
        with page.expect_download() as download:
            page.click(f"#export-{kind}")
        with open(download.value.path(), encoding="utf-8") as file:
            found[kind] = file.read()
    assert "> Be kind." in found["markdown"] and "Once upon a time" in found["markdown"]
    assert [json.loads(found["json"])] == json.loads(found["all"])


# ------------------------------------------------------------------------------------------------ votes


def test_blind_comparison_vote_comment_edit_and_undo(visit, chat_server):
    votes = chat_server.votes
    page = visit({"compare": True, "blind": True, "models": ["ppo", "sft"]})
    send(page, "Once upon a time")
    assert page.locator(".answer").count() == 2
    for hidden in (".answer .name", ".answer .reward", ".answer[aria-label*=sft]"):
        assert page.locator(hidden, has_text=re.compile("ppo|sft|reward")).count() == 0
    page.fill(".comment", "kinder")
    page.keyboard.press("Alt+Digit2")
    expect(page.locator(".vote")).to_contain_text("You chose B. The chat goes on with B.")
    names = page.locator(".answer .name").all_inner_texts()
    assert sorted(names) == ["ppo", "sft"] and page.locator(".reward").count() == 2
    row = rows(votes, "votes.jsonl")[-1]
    assert row["vote"] == "right" and row["blind"] and row["comment"] == "kinder"
    assert [answer["model"] for answer in row["answers"]] == names
    assert row["answers"][0]["seed"] == row["answers"][1]["seed"]
    assert all(answer["reward"] is not None and answer["weights"] for answer in row["answers"])
    texts = page.locator(".answer .text").all_inner_texts()
    [pair] = rows(votes, "preferences.jsonl")
    assert pair["chosen"][0]["content"].split() == texts[1].split()
    page.locator(".vote").get_by_text("Undo").click()
    expect(page.locator(".vote")).to_contain_text("Which answer is better?")
    assert rows(votes, "preferences.jsonl") == [] and page.locator(".reward").count() == 0

    page.locator(".vote").get_by_text("Tie").click()
    expect(page.locator(".vote")).to_contain_text("You called it a tie.")
    assert rows(votes, "preferences.jsonl") == []
    page.get_by_label("Make this answer better").first.click()
    page.locator(".answer textarea").fill("My own story.")
    page.locator(".answer").get_by_text("Save").click()
    expect(page.locator(".answer .text").first).to_contain_text("My own story.")
    [pair] = rows(votes, "preferences.jsonl")
    assert (
        pair["chosen"][0]["content"] == "My own story." and pair["rejected"][0]["content"].split() == texts[0].split()
    )
    page.keyboard.press("Alt+KeyZ")
    expect(page.locator("#toast")).to_contain_text("Saved.")
    expect(page.locator(".vote")).to_contain_text("You called it a tie.")
    assert rows(votes, "preferences.jsonl") == []
    page.click("#open-results")
    expect(page.locator("#results")).to_contain_text("ppo against sft")
    expect(page.locator("#results")).to_contain_text("50 %")


def test_thumbs_are_rows_and_can_be_taken_back(visit, chat_server):
    page = visit()
    send(page, "Once upon a time")
    before = len(rows(chat_server.votes, "unpaired.jsonl"))
    good = page.get_by_label("Good answer")
    good.click()
    expect(good).to_have_attribute("aria-pressed", "true")
    assert rows(chat_server.votes, "unpaired.jsonl")[before]["label"] is True
    page.get_by_label("Bad answer").click()
    expect(page.get_by_label("Bad answer")).to_have_attribute("aria-pressed", "true")
    assert [row["label"] for row in rows(chat_server.votes, "unpaired.jsonl")[before:]] == [False]
    lines = len(rows(chat_server.votes, "votes.jsonl"))
    page.evaluate("for (const vote of ['good', 'bad']) document.querySelector(`[data-vote=${vote}]`).click()")
    until(lambda: len(rows(chat_server.votes, "votes.jsonl")) == lines + 4)  # two votes, each instead of another
    expect(page.get_by_label("Bad answer")).to_have_attribute("aria-pressed", "true")
    until(lambda: [row["label"] for row in rows(chat_server.votes, "unpaired.jsonl")[before:]] == [False])
    page.get_by_label("Bad answer").click()
    expect(page.locator("#toast")).to_contain_text("Vote taken back.")
    assert rows(chat_server.votes, "unpaired.jsonl")[before:] == []


def test_twenty_votes_train_a_reward_model(visit, chat_server, stories_model_dir, tmp_path):
    before = len(rows(chat_server.votes, "preferences.jsonl"))
    page = visit({"compare": True, "models": ["ppo", "sft"]})
    for i in range(20):
        page.keyboard.press("Alt+KeyN")
        send(page, f"Once upon a time there was {'a' * (i + 1)}")
        page.keyboard.press(f"Alt+Digit{1 + i % 2}")
        page.locator("[data-vote=undo]").wait_for()
    preferences = chat_server.votes.folder / "preferences.jsonl"
    assert len(rows(chat_server.votes, "preferences.jsonl")) - before >= 18, "answers are rarely equal"
    cli([
        "fit", "--config", f"{ROOT}/configs/reward/from_chat.yaml", "--data.train", str(preferences),
        "--model.pretrained", str(stories_model_dir), "--trainer.max_steps", "1", "--trainer.accelerator", "cpu",
        "--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false",
        "--trainer.enable_progress_bar", "false",
    ])  # fmt: skip
    assert list(tmp_path.rglob("config.json")), "no reward model was exported"


# ------------------------------------------------------------------------------------------------ attacks

ATTACKS = {
    "script": "<script>window.pwned = 1</script>",
    "handler": "<img src=x onerror='window.pwned = 1'> <svg onload='window.pwned = 1'>",
    "javascript link": "[click](javascript:window.pwned=1) [too](JaVaScRiPt&colon;window.pwned=1) "
    "<a href='data:text/html,x'>x</a>",
    "remote image": "![see](https://a.example/pixel.png?stolen) ![y][1]\n\n[1]: https://a.example/2.png",
    "frame": "<iframe src='https://a.example'></iframe><object data='/'></object><embed src='/'>",
    "form": "<form action='https://a.example'><input name=key><button>Log in</button></form>",
    "style": "<style>body{display:none}</style><p style='position:fixed;inset:0;background:url(//a.example/x)'>x</p>",
    "page's classes": "<div class='vote' id='prompt' data-vote='left'>x</div>\n\n"
    "```python onmouseover=window.pwned=1\n'<b class=vote>'\n```",
    "clobbering": "<a id=app name=api>x</a><form id=turns><input name=children></form><base href='https://a.example/'>",
    "mutation": "<math><mtext><table><mglyph><style><!--</style>"
    "<img title='--&gt;&lt;img src=1 onerror=window.pwned=1&gt;'>",
    "refresh": "<meta http-equiv=refresh content='0;url=https://a.example'><link rel=prefetch href=//a.example>",
    "code fence": '```"><img/src=x/onerror=window.pwned=1>\nx\n```\n`<img src=x onerror=window.pwned=1>`',
}


def test_attacks_in_answers_do_nothing(visit):
    page = visit()
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    answers(page, *ATTACKS.values())
    for i, (name, text) in enumerate(ATTACKS.items()):
        send(page, text)  # the user's own text is shown too, and becomes the title
        answer = page.locator(".answer .text").nth(i)
        assert answer.inner_text().strip(), name
        allowed = "p,br,strong,em,code,pre,span,a,ul,li,div:not([class]),div.code-head,div.code-head button,"
        allowed += "div.code-head svg,div.code-head use"
        assert answer.locator(f":scope *:not({allowed})").count() == 0, name
        for link in answer.locator("a").all():
            assert (link.get_attribute("href") or "https:").startswith(("http", "mailto:")), name
            assert link.get_attribute("rel") == "noopener noreferrer nofollow"
        inside = answer.locator(":scope [id], :scope [style], :scope [data-vote], :scope [name], :scope .vote")
        assert inside.count() == 0, name
    page.wait_for_timeout(300)
    assert page.evaluate("window.pwned") is None
    assert page.url.rstrip("/") + "/" == page.evaluate("location.origin + '/'")
    page.reload()
    page.locator(".turn").nth(len(ATTACKS) - 1).wait_for()
    assert page.locator(".turn").count() == len(ATTACKS) == 12 and page.evaluate("window.pwned") is None


def test_the_policy_stops_what_a_fault_would_let_through(visit):
    visit.allow("Content Security Policy")
    visit.allow("TrustedHTML")
    visit.allow("Trusted Type")
    page = visit()
    refused = page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; return false; } catch (e) { return e.name; } }"
    )
    assert refused == "TypeError"
    failed = page.evaluate("fetch('https://a.example').then(() => 'left', () => 'stopped')")
    assert failed == "stopped"
    image = "new Promise((r) => { const i = new Image(); i.onload = () => r('left'); i.onerror = () => r('stopped');"
    assert page.evaluate(image + " i.src = 'data:image/gif;base64,R0lGODlhAQABAAAAACw='; })") == "stopped"


def test_markdown_and_code_are_shown(visit):
    page = visit()
    answers(page, "A **bold** word.\n\n```python\nprint('你好')\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n- [x] done")
    send(page, "Show me")
    answer = page.locator(".answer .text")
    assert answer.locator("strong").inner_text() == "bold" and answer.locator("td").all_inner_texts() == ["1", "2"]
    assert answer.locator(".hljs-string").inner_text() == "'你好'" and "☑ done" in answer.inner_text()


# ------------------------------------------------------------------------------------------------ for everybody


def serious(page):
    """What axe-core finds that keeps people out."""
    page.evaluate((resources.files("axe_playwright_python") / "axe.min.js").read_text("utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    return [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, scheme):
    page = visit({"theme": scheme}, reduced_motion="reduce")
    assert serious(page) == []
    answers(
        page,
        *["A **word**, `code` and a [link](https://a.example).\n\n```python\ndef f(x):  # why\n    return 'a', 1\n```"]
        * 3,
        reward=1.0,
    )
    send(page, "One")
    page.click("#compare")
    send(page, "Two")
    assert serious(page) == []
    for name in ("settings", "results", "help"):
        page.click(f"#open-{name}")
        page.locator(f"#{name} .close").wait_for()
        assert serious(page) == [], name
        page.locator(f"#{name} .close").click()


def test_chinese_and_settings(visit):
    page = visit()
    page.click("#open-settings")
    page.fill("#set-system", "Be brief.")
    page.fill("#set-seed", "7")
    page.select_option("#set-language", "zh")
    expect(page.locator("#settings h2")).to_have_text("设置")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    page.locator("#settings .close").click()
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "你好")
    body = sent.value.post_data_json
    assert body["seed"] == 7 and body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["max_completion_tokens"] == 12 and body["truncation"] == "auto" and body["reward"] is True
    assert page.locator(".reward").inner_text().startswith("奖励")


def test_a_phone_needs_no_sideways_scrolling(visit):
    page = visit({"compare": True}, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    answers(
        page, "| a | b |\n|---|---|\n| " + "long " * 60 + "| 2 |", "`" + "x" * 300 + "`\n\n```\n" + "y" * 300 + "\n```"
    )
    send(page, "Compare " + "z" * 100)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
    assert page.evaluate("document.getElementById('scroller').scrollWidth") <= 360
    boxes = [page.locator(".answer").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[1]["y"] > boxes[0]["y"] + boxes[0]["height"] - 1, "answers are below each other"
    page.click("#menu")
    page.locator("#sidebar").get_by_text("New chat").click()
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#sidebar")).to_be_hidden()
