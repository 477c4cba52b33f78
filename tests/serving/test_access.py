"""Who may ask."""

import pytest
from in_loop import in_loop

from lightning_rlhf.cli import main
from lightning_rlhf.serving.guard import Access

BODY = {"prompt": "Ben", "max_tokens": 1}
KEY = {"authorization": "Bearer secret"}


@in_loop
async def test_a_key_is_needed_on_every_route_but_health(running):
    async with running(access=Access(api_key="secret")) as app:
        routes = [("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions"), ("POST", "/generate"),
                  ("POST", "/v1/rewards"), ("GET", "/nothing")]  # fmt: skip
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"},
                        {"authorization": "Bearer sécret".encode()}):  # fmt: skip
            for method, path in routes:
                found = await app.client.request(method, path, headers=headers)
                assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key"), (method, path)
        assert (await app.client.get("/health")).status_code == 200
        assert (await app.client.get("/v1/models", headers=KEY)).status_code == 200
        assert (await app.client.post("/v1/completions", json=BODY, headers=KEY)).status_code == 200
    async with running(access=Access(api_key="sécret")) as app:
        key = {"authorization": "Bearer sécret".encode()}
        assert (await app.client.get("/v1/models", headers=key)).status_code == 200


@pytest.mark.parametrize(
    "host, allowed",
    [
        ("localhost:8000", True),
        ("127.0.0.1", True),
        ("[::1]:8000", True),
        ("192.168.1.2:8000", True),
        ("box.lan:8000", True),
        ("BOX.lan", True),
        ("evil.example", False),
        ("localhost.evil.example:8000", False),
        ("", False),
    ],
)
@in_loop
async def test_names_of_the_server(running, host, allowed):
    async with running(access=Access(hosts=["box.lan"])) as app:
        found = await app.client.get("/health", headers={"host": host})
        assert found.status_code == (200 if allowed else 403)
        assert allowed or "--allowed-host" in found.json()["error"]["message"]


@in_loop
async def test_writes_from_other_pages_and_in_other_types(running):
    async with running(access=Access(origins=["https://mine.example"])) as app:
        for origin, status in (("http://localhost", 200), ("https://mine.example", 200), ("http://evil.example", 403),
                               ("null", 403), ("http://localhost:1", 403)):  # fmt: skip
            found = await app.client.post("/v1/completions", json=BODY, headers={"origin": origin})
            assert found.status_code == status, origin
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""):
            found = await app.client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind})
            assert found.status_code == 415, kind
        asked = {"origin": "https://mine.example", "access-control-request-method": "POST"}
        assert (await app.client.options("/v1/completions", headers=asked)).status_code == 200


@in_loop
async def test_cors_is_off_unless_named(running):
    async with running() as app:
        found = await app.client.get("/v1/models", headers={"origin": "http://evil.example"})
        assert not [name for name in found.headers if name.startswith("access-control")]


@in_loop
async def test_logs_hold_no_prompts_unless_asked(running, caplog):
    caplog.set_level("DEBUG")
    for log_prompts in (False, True):
        async with running(log_prompts=log_prompts) as app:
            await app.client.post("/v1/completions", json={"prompt": "Secret words", "max_tokens": 2})
            await app.client.post("/v1/completions", json={"prompt": "Secret words", "max_tokens": "many"})
            await app.client.get("/Secret words")
        ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("lightning"))
        assert "POST /v1/completions 200" in ours
        assert ("Secret words" in ours) is log_prompts


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--max-rows", "0"], "--max-rows must be above 0"),
        (["--reward", "nowhere"], "nowhere"),
        (["--chat-template", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_one_line(stories_model_dir, arguments, says, monkeypatch):
    monkeypatch.delenv("LIGHTNING_RLHF_API_KEY", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(stories_model_dir), *arguments])
    assert says in str(stop.value) and "\n" not in str(stop.value)


def test_a_run_that_is_not_there(tmp_path):
    for run, says in ((tmp_path / "nothing", "no directory"), (tmp_path, "no model")):
        with pytest.raises(SystemExit, match=says):
            main(["serve", str(run)])
