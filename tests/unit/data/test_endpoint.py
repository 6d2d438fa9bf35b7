"""What an endpoint's answers mean for a stage, and who is asked on the way."""

from __future__ import annotations

import pytest
from fake_openai import FakeOpenAI, Reply, said, serving

from opd.endpoint import Endpoint, Failed, Unavailable

PROXIES = "http_proxy", "https_proxy", "all_proxy", "no_proxy"


def ask(url: str, retries: int = 1) -> str:
    endpoint = Endpoint(url=url, model="m", retries=retries, timeout_s=5)
    messages = [{"role": "user", "content": "hello"}]
    return endpoint.ask(lambda c: c.chat.completions.create(model="m", messages=messages).choices[0].message.content)


@pytest.mark.parametrize("status", [401, 403, 404, 408, 409, 429, 500, 503])
def test_what_says_that_the_endpoint_is_at_fault(status: int) -> None:
    busy = Reply({"error": {"message": "not now"}}, status, {"retry-after-ms": "10"})
    with serving(FakeOpenAI(lambda call: busy)) as fake:
        with pytest.raises(Unavailable, match=f"HTTP {status}: .*not now"):
            ask(fake.url)
        assert len(fake.calls) == (1 if status in (401, 403, 404) else 2)  # as often as Endpoint.retries says


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_says_that_the_request_is_at_fault(status: int) -> None:
    with (
        serving(FakeOpenAI(lambda call: Reply({"error": {"message": "no"}}, status))) as fake,
        pytest.raises(Failed, match=f"^refused: .*HTTP {status}: "),
    ):
        ask(fake.url)


def test_a_proxy_is_not_asked_for_what_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with serving(FakeOpenAI(lambda c: said("here"))) as own, serving(FakeOpenAI(lambda c: said("proxy"))) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        assert ask(own.url) == "here" and proxy.calls == []
        assert ask("http://models.invalid/v1") == "proxy"
        assert [call.path for call in proxy.calls] == ["http://models.invalid/v1/chat/completions"]
