"""The line that installs an extra works as it is printed: from a clone, a wheel, or an index."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitsmoe_modifier import extras
from bitsmoe_modifier.errors import BitsMoEError

ROOT = Path(__file__).parents[1]


def test_from_a_clone() -> None:
    assert extras.install_line("quantize") == f"pip install '{ROOT.resolve()}[quantize]'"


@pytest.mark.parametrize("kind", ["wheel", "wheel that is gone", "index", "nothing"])
def test_from_elsewhere(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "a b" / "bitsmoe_modifier-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    if kind == "wheel":
        wheel.write_bytes(b"")

    def read_text(name: str) -> str | None:
        assert name == "direct_url.json"
        return None if kind == "index" else json.dumps({"url": wheel.as_uri()})

    def distribution(name: str) -> SimpleNamespace:
        if kind == "nothing":
            raise extras.PackageNotFoundError(name)
        return SimpleNamespace(read_text=read_text)

    monkeypatch.setattr(extras, "__file__", str(tmp_path / "lib" / "site-packages" / "bitsmoe_modifier" / "extras.py"))
    monkeypatch.setattr(extras, "distribution", distribution)
    origin = {"wheel": str(wheel), "wheel that is gone": "."}.get(kind, "bitsmoe-modifier")
    assert extras.install_line("vllm") == f"pip install '{origin}[vllm]'"
    with pytest.raises(BitsMoEError, match=r"charts needs no_such_thing, which is not installed: pip install '"):
        extras.require("no_such_thing", "charts")
