"""Output folders appear whole or not at all, whatever kind of path they are, and nothing that was written is lost."""

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bitsmoe_modifier.errors import BitsMoEError
from bitsmoe_modifier.storage import folders
from bitsmoe_modifier.storage.folders import OutputFolder, check_file_place, check_outside, existing_parent


def write(out: Path) -> None:
    with written_whole(out) as folder:
        (folder / "model.safetensors").write_text("weights")
        (folder / "config.json").write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_written(out: Path) -> None:
    assert names(out) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_a_folder_appears_at_the_end(existing: bool, tmp_path: Path) -> None:
    out = tmp_path / "sub" / "out"
    if existing:
        out.mkdir(parents=True)
    with written_whole(out) as folder:
        (folder / "x").write_text("1")
        assert not (out / "x").exists()
    assert (out / "x").read_text() == "1"
    assert names(out.parent) == ["out"]
    assert names(out) == ["x"]


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A finished folder by way of `OutputFolder`, as every command makes one."""
    with OutputFolder(out) as output, output.written() as temporary:
        yield temporary


def test_out_is_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("."))
    assert_written(tmp_path)


def test_out_has_a_trailing_slash_and_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a/../b/"))
    assert_written(tmp_path / "b")


@pytest.mark.parametrize("there", [True, False], ids=["empty-folder", "dangling"])
def test_out_is_a_symbolic_link(there: bool, tmp_path: Path) -> None:
    target = tmp_path / "volume" / "target"
    target.parent.mkdir()
    if there:
        target.mkdir()
    link = tmp_path / "link"
    link.symlink_to(target)
    write(link)
    assert_written(target)
    assert link.is_symlink()
    assert names(target.parent) == ["target"]


def test_out_is_not_utf_8(tmp_path: Path) -> None:
    with pytest.raises(BitsMoEError, match=r"out\\xff' is not UTF-8; give another --out"):
        OutputFolder(Path(os.fsdecode(os.fsencode(tmp_path) + b"/out\xff")))


def test_out_is_a_link_to_itself(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(link)
    with pytest.raises(BitsMoEError, match="link"):
        write(link)


def test_out_is_a_link_to_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "x").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(BitsMoEError, match="not an empty folder"):
        write(tmp_path / "link")
    assert names(tmp_path / "target") == ["x"]


def test_out_is_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be renamed, deleted or replaced, and nothing can be renamed into it from outside; ext4 keeps a folder
    there."""
    out = tmp_path / "volume"
    (out / "lost+found").mkdir(parents=True)
    rename, rmdir = os.rename, os.rmdir

    def same_filesystem(source: object, target: object, **options: object) -> None:
        inside = [str(path).startswith(f"{out}/") for path in (source, target)]
        if inside[0] != inside[1] or Path(str(target)) == out:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target, **options)

    def not_the_mount(path: object, **options: object) -> None:
        if Path(str(path)) == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rmdir(path, **options)

    monkeypatch.setattr(os, "rename", same_filesystem)
    monkeypatch.setattr(os, "rmdir", not_the_mount)
    write(out)
    assert names(out) == ["config.json", "lost+found", "model.safetensors"]
    assert names(tmp_path) == ["volume"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_the_folder_above_out_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "above" / "out").mkdir(parents=True)
    (tmp_path / "above").chmod(0o555)
    try:
        write(tmp_path / "above" / "out")
        assert_written(tmp_path / "above" / "out")
        with pytest.raises(BitsMoEError, match=r"above cannot be written \(Permission denied\); give another --out"):
            write(tmp_path / "above" / "other")
    finally:
        (tmp_path / "above").chmod(0o755)


def test_a_file_is_above_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BitsMoEError, match=r"cannot be (read|written)"):
        write(tmp_path / "file" / "out")


def test_a_failure_while_writing_keeps_what_was_written_and_names_it(tmp_path: Path) -> None:
    def fail() -> None:
        with written_whole(tmp_path / "out") as folder:
            (folder / "x").write_text("the work of days")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(BitsMoEError, match=r"No space left on device.*; what was written is in ") as caught:
        fail()
    kept = Path(str(caught.value).rpartition(" is in ")[2])
    assert (kept / "x").read_text() == "the work of days"
    assert not (tmp_path / "out").exists()
    write(tmp_path / "out")  # the same command again
    assert_written(tmp_path / "out")
    assert (kept / "x").exists()


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_a_failure_at_the_last_rename_keeps_the_result_and_names_it(
    existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    rename = os.rename

    def fill(output: OutputFolder) -> None:
        with output.written() as folder:
            for name in ("config.json", "a.json", "model.safetensors"):
                (folder / name).write_text("the work of days")

    def refuse(source: object, target: object, **options: object) -> None:
        if Path(str(target)).name in ("out", "model.safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target, **options)

    with OutputFolder(out) as output, monkeypatch.context() as patched:
        patched.setattr(os, "rename", refuse)
        patched.setattr(Path, "rename", lambda source, target: refuse(source, target))
        with pytest.raises(BitsMoEError, match="Permission denied") as caught:
            fill(output)
    kept = Path(str(caught.value).rpartition(" is in ")[2])
    assert names(kept) == ["a.json", "config.json", "model.safetensors"]
    assert existing == out.exists()


def test_a_failure_before_anything_was_written_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with written_whole(tmp_path / "out"):
            raise ZeroDivisionError

    with pytest.raises(BitsMoEError, match="ZeroDivisionError"):
        fail()
    assert names(tmp_path) == []


def test_an_interruption_says_where_the_partial_result_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        with written_whole(tmp_path / "out") as folder:
            (folder / "x").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert "what was written is in" in capsys.readouterr().err


def test_an_occupied_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(BitsMoEError, match="not an empty folder"), written_whole(tmp_path):
        pass


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_a_second_run_with_the_same_out_is_refused_at_its_start(existing: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    (tmp_path / "link").symlink_to(out)
    with OutputFolder(out) as output:
        for same in (out, tmp_path / "link", tmp_path / "." / "out"):
            with pytest.raises(BitsMoEError, match="another run is writing"), OutputFolder(same):
                pass
        with output.written() as folder:
            (folder / "x").write_text("1")
    assert names(out) == ["x"]
    assert names(tmp_path) == ["link", "out"]


def _hold(out: Path, ready: object) -> None:
    with OutputFolder(out) as output, output.written() as folder:
        (folder / "x").write_text("half")
        ready.set()
        time.sleep(60)


def test_a_run_that_was_killed_does_not_block_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "out", ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(BitsMoEError, match="another run is writing"):
        write(tmp_path / "out")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    write(tmp_path / "out")
    assert_written(tmp_path / "out")
    assert "an earlier run for" in capsys.readouterr().err
    assert len(folders.leftovers(tmp_path / "out")) == 1


def test_a_run_for_a_longer_name_is_no_leftover(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its temporary folder, empty until it saves, begins with the same letters."""
    with OutputFolder(tmp_path / "qwen-2.5bit") as other, OutputFolder(tmp_path / "qwen-2"), other.written() as folder:
        assert folder.is_dir()
        (folder / "x").write_text("1")
    assert "an earlier run for" not in capsys.readouterr().err


def test_the_filesystem_of_a_link_is_that_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "volume" / "new")
    assert existing_parent(tmp_path / "link") == tmp_path / "volume"
    assert existing_parent(tmp_path / "a" / "b") == tmp_path


@pytest.mark.parametrize("inside", [".", "kept", "a/b"])
def test_a_folder_of_the_run_inside_of_out(inside: str, tmp_path: Path) -> None:
    """It would be in the way at the end, when the result is there."""
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(out)
    for folder in (out / inside, tmp_path / "link" / inside):
        with pytest.raises(
            BitsMoEError, match=f"--resume-dir {folder} is in {out}, which holds nothing but the result"
        ):
            check_outside([tmp_path / "other", out], offload_dir=None, resume_dir=str(folder))
    check_outside([out], resume_dir=str(tmp_path / "outside"), offload_dir=str(tmp_path))


def test_a_file_to_write_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(BitsMoEError, match=r"--html .*: there is no folder .*nowhere; create it first"):
        check_file_place(tmp_path / "nowhere" / "page.html", "--html")
    with pytest.raises(BitsMoEError, match="is a folder; give a file name"):
        check_file_place(tmp_path, "--json")
    check_file_place(tmp_path / "page.html", "--html")
