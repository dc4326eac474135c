"""Uploads, against a stub of the hub's client."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from bitsmoe_modifier import BitsMoEError
from bitsmoe_modifier.checkpoints.push import check_login, push


class Hub:
    """Remembers what it was asked for."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails = fails

    def whoami(self) -> dict[str, str]:
        if self.fails:
            raise self.fails
        return {"name": "me"}

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        self.calls.append(("create", {"repo_id": repo_id, **options}))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, **options: Any) -> str:
        if self.fails:
            raise self.fails
        self.calls.append(("upload", options))
        return f"https://hub/{options['repo_id']}"


def stubbed(monkeypatch: pytest.MonkeyPatch, fails: Exception | None = None) -> Hub:
    hub = Hub(fails)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


@pytest.mark.parametrize("private", [True, False])
def test_repository_is_made_and_filled(private: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = stubbed(monkeypatch)
    check_login("model-2bit")
    assert push(tmp_path, "model-2bit", private) == "https://hub/me/model-2bit"
    (made, created), (uploaded, options) = hub.calls
    assert (made, uploaded) == ("create", "upload")
    assert created == {"repo_id": "model-2bit", "private": private, "exist_ok": True}
    assert (options["folder_path"], options["repo_id"]) == (tmp_path, "me/model-2bit")


def test_who_is_not_logged_in_hears_it_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stubbed(monkeypatch, huggingface_hub.errors.LocalTokenNotFoundError("no token"))
    with pytest.raises(BitsMoEError, match=r"--push-to-hub me/x: no token; log in by `hf auth login`"):
        check_login("me/x")
    with pytest.raises(BitsMoEError, match="write NAME or OWNER/NAME"):
        check_login("a/b/c")


def test_failed_upload_leaves_the_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    stubbed(monkeypatch, OSError("connection lost\nmore"))
    with pytest.raises(BitsMoEError, match=r"could not be uploaded \(connection lost\); try again by `hf upload me/x"):
        push(tmp_path, "me/x", False)
    assert (tmp_path / "config.json").exists()
