"""No password or token of a URL is shown, and nothing for this machine goes to a proxy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from autosft.profiles import masking
from autosft.profiles.masking import LOOPBACK, keep_loopback_direct, masked, masked_command, masked_webhook

CASES = {
    "postgresql://ada:s3cret@db:5432/studies": "postgresql://ada:***@db:5432/studies",
    "postgresql+psycopg://ada:s3cret@db/x?sslmode=require": "postgresql+psycopg://ada:***@db/x?sslmode=require",
    "see postgresql://ada:a@b@db/x, then": "see postgresql://ada:***@db/x, then",
    "'s3://key:s3cret@bucket/x' and http://u:p@h": "'s3://key:***@bucket/x' and http://u:***@h",
    "postgresql://db/x?user=ada&password=s3cret": "postgresql://db/x?user=ada&password=***",
    "https://h/x?token=s3cret&n=1": "https://h/x?token=***&n=1",
    "postgresql://:s3cret@db/x": "postgresql://:***@db/x",
    # what is no password stays
    "postgresql://ada@db/studies": "postgresql://ada@db/studies",
    "sqlite:////home/ada/a@b:c.db": "sqlite:////home/ada/a@b:c.db",
    "http://127.0.0.1:8080/x@y": "http://127.0.0.1:8080/x@y",
    "at 12:30 a@b.org": "at 12:30 a@b.org",
}


@pytest.mark.parametrize("text", CASES)
def test_passwords_are_masked_and_nothing_else(text: str) -> None:
    assert masked(text) == CASES[text]
    assert masked(masked(text)) == CASES[text]


def test_a_webhooks_path_is_its_secret() -> None:
    assert (
        masked_webhook("https://hooks.example.org/services/T0/B0/s3cret") == "https://hooks.example.org/***"
    )
    arguments = ["tune", "--notify", "https://h.org/s3cret", "--notify=https://h.org/s3cret", "--data", "a b"]
    assert (
        masked_command(arguments)
        == "tune --notify 'https://h.org/***' '--notify=https://h.org/***' --data 'a b'"
    )


def test_an_error_says_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    from autosft import cli

    assert cli.main(["studies", "list", "--storage", "nosuch://ada:s3cret@db/x"]) == 2
    assert cli.main(["studies", "list", "--storage", "//ada:s3cret@db"]) == 2
    shown = "".join(capsys.readouterr())
    assert "s3cret" not in shown


def test_a_log_of_a_bug_says_no_password(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autosft import cli

    monkeypatch.setattr(sys, "argv", ["autosft", "tune", "--storage", "postgresql://ada:s3cret@db/x"])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    try:
        raise RuntimeError("cannot reach postgresql://ada:s3cret@db/x")
    except RuntimeError as error:
        written = cli.write_traceback(error)
    text = Path(written).read_text(encoding="utf-8")
    assert "cannot reach postgresql://ada:***@db/x" in text
    assert "s3cret" not in text


@pytest.mark.parametrize("before", [None, "example.org", "localhost,example.org"])
def test_loopback_is_never_reached_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens there
    if before is not None:
        monkeypatch.setenv("NO_PROXY", before)
    keep_loopback_direct()
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import urllib.request as r; print([bool(r.proxy_bypass(h)) for h in ('127.0.0.1', '::1')])",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert told.strip() == "[True, True]"
    hosts = masking.os.environ["no_proxy"].split(",")
    assert set(LOOPBACK) <= set(hosts)
    assert before is None or "example.org" in hosts


def test_without_a_proxy_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(masking.os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    keep_loopback_direct()
    assert "no_proxy" not in masking.os.environ
