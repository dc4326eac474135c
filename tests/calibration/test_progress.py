"""Where a run stands: layer, phase, time taken and time left."""

import json
from collections.abc import Iterator

import pytest

from bitsmoe_modifier import messages
from bitsmoe_modifier.calibration import progress
from bitsmoe_modifier.calibration.progress import Progress, duration


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield
    messages.configure("text")


def test_lines_and_events(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 0.0, 30.0, 60.0, 0.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown = Progress(4)
    shown.begin("layers.0", "survey")
    shown.begin("layers.1", "survey")
    shown.begin("layers.0", "rounding")
    assert capsys.readouterr().err.splitlines() == [
        "1/4 survey: layers.0, 0 s",
        "2/4 survey: layers.1, 30 s, about 90 s left",
        "3/4 rounding: layers.0, 60 s, about 60 s left",
    ]
    messages.configure("json")
    shown = Progress(2)
    shown.begin("layers.0", "rounding")
    entry = json.loads(capsys.readouterr().err)
    assert entry["event"] == "progress"
    expected = {"layer": "layers.0", "phase": "rounding", "step": 1, "steps": 2, "elapsed": 10.0, "remaining": None}
    assert {key: entry[key] for key in expected} == expected


def test_silent_beside_bars_and_when_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    messages.configure("quiet")
    Progress(1).begin("layers.0", "rounding")
    messages.configure("text")
    monkeypatch.delenv("TQDM_DISABLE")
    Progress(1).begin("layers.0", "rounding")
    assert capsys.readouterr().err == ""


def test_durations() -> None:
    assert [duration(s) for s in (5, 99, 100, 5999, 6000)] == ["5 s", "99 s", "2 min", "100 min", "1.7 h"]
