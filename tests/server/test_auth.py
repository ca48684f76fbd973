"""Keys, scopes, addresses and rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tailor.errors import ConfigError, DataError, NotFoundError
from tailor.server.auth import KeyRing, RateLimiter, check_address, duration, scope_of
from tailor.server.errors import ApiError, as_api_error, without_paths
from tailor.server.settings import ServerSettings, is_loopback


def test_a_key_is_kept_as_a_hash_and_found_by_itself(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.json", ["given"])
    text, key = ring.create("me", ["inference", "files"])
    assert text not in (tmp_path / "keys.json").read_text()
    assert (tmp_path / "keys.json").stat().st_mode & 0o077 == 0
    mine = ring.find(text)
    assert mine is not None
    assert mine.may("files")
    assert not mine.may("training")
    everything = ring.find("given")
    assert everything is not None
    assert everything.may("training")
    assert ring.find(text + "x") is None
    assert ring.find("\ud800") is None
    other = KeyRing(tmp_path / "keys.json")
    other.revoke(key.key_id)
    assert ring.find(text) is None
    with pytest.raises(NotFoundError):
        ring.revoke(key.key_id)
    with pytest.raises(ConfigError, match="no scope 'inferenc'"):
        ring.create("me", ["inferenc"])


def test_a_damaged_list_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [{"name": "me"}]}))
    with pytest.raises(DataError, match="no list of API keys"):
        KeyRing(tmp_path / "keys.json").find("x")


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/health", None),
        ("GET", "/v1/models", "inference"),
        ("DELETE", "/v1/models/x", "admin"),
        ("POST", "/v1/files", "files"),
        ("POST", "/v1/fine_tuning/jobs", "training"),
        ("POST", "/v1/load_lora_adapter", "admin"),
        ("POST", "/anything", "inference"),
    ],
)
def test_routes_have_scopes(method: str, path: str, scope: str | None) -> None:
    assert scope_of(method, path) == scope


def test_other_machines_need_a_key(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"):
        assert is_loopback(host)
        check_address(ServerSettings(host=host), KeyRing(None))
    for host in ("0.0.0.0", "::", "10.0.0.7", "box.lan"):
        with pytest.raises(ConfigError, match="no API key"):
            check_address(ServerSettings(host=host), KeyRing(tmp_path / "keys.json"))
        check_address(ServerSettings(host=host), KeyRing(None, ["key"]))
    assert "key" not in repr(ServerSettings(api_keys=("key",))).replace("keys", "")


def test_a_bucket_fills_evenly() -> None:
    now = [100.0]
    limiter = RateLimiter(60, clock=lambda: now[0])
    left = [limiter.take("a")["x-ratelimit-remaining-requests"] for _ in range(60)]
    assert left == [str(n) for n in range(59, -1, -1)]
    with pytest.raises(ApiError) as refused:
        limiter.take("a")
    assert refused.value.status == 429
    assert refused.value.headers["retry-after"] == "1"
    assert refused.value.headers["x-ratelimit-reset-requests"] == "1m0s"
    assert limiter.take("b")["x-ratelimit-remaining-requests"] == "59"
    now[0] += 2.5
    assert [limiter.take("a")["x-ratelimit-remaining-requests"] for _ in range(2)] == ["1", "0"]
    with pytest.raises(ApiError):
        limiter.take("a")


@pytest.mark.parametrize(("seconds", "text"), [(0.02, "20ms"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s"), (61, "1m1s")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("there is no folder /srv/home/me/x.json now", "there is no folder …/x.json now"),
        ("'/a/b c'", "'…/b c'"),
        ("(~/models/base)", "(…/base)"),
        ("C:\\Users\\me\\x", "…/x"),
        ("org/name and 3/4 of https://host/v1/models", "org/name and 3/4 of https://host/v1/models"),
    ],
)
def test_paths_stay_at_home(text: str, shown: str) -> None:
    assert without_paths(text) == shown
    assert as_api_error(DataError(text)).message == shown


def test_unknown_errors_say_nothing() -> None:
    answer = as_api_error(KeyError("password"))
    assert answer.status == 500
    assert "password" not in str(answer.envelope())
