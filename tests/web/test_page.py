"""The page as it is served, without a browser."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("gradio")


def test_the_page_answers_to_this_machines_own_names_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A website whose name leads here by now (DNS rebinding) would read and ask as the page does."""
    from contextlib import nullcontext

    from mifo.web.page import serving, site_in

    monkeypatch.setattr("mifo.web.page.working", lambda *folders: nullcontext())  # no jobs are done

    def status(path: str, host: str) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(address.rstrip("/") + path, headers={"Host": host})) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    with serving(site_in(tmp_path)) as address:
        port = address.rstrip("/").rsplit(":", 1)[1]
        for path in ("/", "/config"):
            assert [status(path, f"{host}:{port}") for host in ("127.0.0.1", "localhost", "evil.example")] == [200, 200, 400]
