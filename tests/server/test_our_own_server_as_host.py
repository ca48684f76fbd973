"""Our own server is a hosted provider: ask it, be tuned by it, ask the result, bring the rows home."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from live_command import running

from hosted_journey import hosted_journey


def test_everything_that_is_done_with_a_hosted_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tmp_path / "ours"
    monkeypatch.setenv("TAILOR_HOME", str(ours))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    rows = tmp_path / "rows.jsonl"
    told = [{"prompt": f"Colour of thing {k}?", "completion": "blue" if k % 2 else "red"} for k in range(24)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in told))
    with running(tmp_path / "theirs", "--job-threads", str(os.cpu_count() or 1)) as server:
        journey = hosted_journey(server.url, "tailor-nano", rows, tmp_path, n_epochs=6)
        tuned = str(journey.artifact.manifest["model"])
        assert tuned.startswith("ft:tailor-nano:")
        assert tuned in [model.id for model in server.client.models.list()]
    before, after = (done.metrics["accuracy"].mean for done in (journey.before, journey.after))
    assert before == 0.0
    assert after > 0.3
    assert (ours / "artifacts" / "journey" / "tailor.json").is_file()
    assert any("succeeded" in line or "completed" in line for line in journey.said)
