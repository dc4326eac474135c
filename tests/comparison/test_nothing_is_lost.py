"""A run's result is never thrown away: what the model's folder has, what --out is, and what happens while saving."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from safetensors.torch import save_file

from bitsmoe_modifier.calibration.modifier import BitsMoEModifier
from bitsmoe_modifier.cli import main
from bitsmoe_modifier.comparison.workspace import Workspace
from bitsmoe_modifier.storage.folders import OutputFolder
from bitsmoe_modifier.storage.locks import locked

RECIPE = (
    "a_stage: {q_modifiers: {BitsMoEModifier: {bits: 4.5, group_size: 32, block_size: 16, scope: layer, "
    "refine_passes: 0, solver: lagrangian}}}"
)


@pytest.fixture(scope="module")
def inputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, ``calibration.txt`` and ``recipe.yaml``; only the model may be changed, in a copy."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny / "model", folder / "model")
    shutil.copy(tiny / "calibration.txt", folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def command(inputs: Path, out: object, *more: str, model: Path | None = None) -> list[str]:
    return [
        *("quantize", "--model", str(model or inputs / "model"), "--recipe", str(inputs / "recipe.yaml")),
        *("--calibration", str(inputs / "calibration.txt"), "--samples", "8", "--seq-len", "32", "--device", "cpu"),
        *("--out", str(out), *more),
    ]


@pytest.fixture(scope="module")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that a run gives that nothing happens to."""
    out = tmp_path_factory.mktemp("expected") / "out"
    assert main(command(inputs, out)) == 0
    return (out / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------ what the model's folder has


@pytest.fixture
def model(inputs: Path, tmp_path: Path) -> Path:
    """A copy of the model to add to."""
    return shutil.copytree(inputs / "model", tmp_path / "model")


def test_generation_config_with_do_sample_false_and_a_temperature(inputs: Path, model: Path, tmp_path: Path) -> None:
    text = '{"do_sample": false, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [2, 3]}'
    (model / "generation_config.json").write_text(text)
    assert main(command(inputs, tmp_path / "out", model=model)) == 0
    assert (tmp_path / "out" / "generation_config.json").read_text() == text
    assert main(["export", str(tmp_path / "out"), "--out", str(tmp_path / "dense")]) == 0
    assert (tmp_path / "dense" / "generation_config.json").read_text() == text


def test_a_model_without_generation_config_gets_none(inputs: Path, model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").unlink(missing_ok=True)
    assert main(command(inputs, tmp_path / "out", model=model)) == 0
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_generation_parameters_in_config_json(inputs: Path, model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "temperature": 0.6, "do_sample": False}))
    assert main(command(inputs, tmp_path / "out", model=model)) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["temperature"] == 0.6


def test_tokenizer_and_chat_template_are_taken_along_as_they_are(inputs: Path, model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "of_the_user": [1]}, indent=7))
    assert main(command(inputs, tmp_path / "out", model=model)) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes(), name
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").exists()


def test_an_adapter_beside_the_model_is_no_part_of_it(
    inputs: Path, model: Path, expected: bytes, tmp_path: Path
) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4, 64)}, model / "adapter_model.safetensors")
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    assert main(command(inputs, tmp_path / "out", model=model)) == 0
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


# -------------------------------------------------------------------------------------------------- what --out is


@pytest.mark.parametrize("kind", ["link", "current", "existing"])
def test_out_is(kind: str, inputs: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    monkeypatch.chdir(target)
    out = {"link": tmp_path / "link", "current": ".", "existing": f"{target}/"}[kind]
    assert main(command(inputs, out)) == 0
    assert (target / "model.safetensors").read_bytes() == expected
    assert (target / "README.md").exists()
    assert [name for name in os.listdir(target) if name.startswith(".")] == []


def test_the_disk_check_looks_at_the_filesystem_that_is_written_to(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The link is on a full disk, its target is not; and the other way round."""
    usage = shutil.disk_usage(tmp_path)
    full, roomy = tmp_path / "full", tmp_path / "roomy"
    full.mkdir()
    roomy.mkdir()
    (full / "link").symlink_to(roomy / "new")
    (roomy / "link").symlink_to(full / "new")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=0) if Path(path).is_relative_to(full) else usage
    )
    assert main(command(inputs, roomy / "link")) == 2
    assert f"of disk, {full} has 0.0 GB; give another --out" in capsys.readouterr().err
    assert main(command(inputs, full / "link")) == 0


def test_a_second_run_with_the_same_out_is_refused_at_its_start(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with OutputFolder(tmp_path / "out"):
        # no such model: what is said first is said before anything is read
        assert main(command(inputs, tmp_path / "out", model=tmp_path / "nowhere")) == 2
    assert f"another run is writing {tmp_path / 'out'}" in capsys.readouterr().err


def test_a_second_comparison_in_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Workspace(tmp_path / "out").alone():
        assert main(["compare", "--out", str(tmp_path / "out"), "--model", str(tmp_path / "nowhere")]) == 2
    assert "another comparison is running in" in capsys.readouterr().err


def test_a_second_run_with_the_same_resume_dir_is_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    with locked(kept / ".lock", "taken"):
        # no such model: it is said before one is loaded
        run = command(inputs, tmp_path / "out", "--resume-dir", str(kept), model=tmp_path / "nowhere")
        assert main(run) == 2
    assert f"resume_dir: another run is using {kept}; give another folder" in capsys.readouterr().err


def test_a_resume_dir_that_cannot_be_is_refused_before_a_model_is_loaded(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    run = command(inputs, tmp_path / "out", "--resume-dir", str(tmp_path / "file"), model=tmp_path / "nowhere")
    assert main(run) == 2
    assert f"resume_dir: {tmp_path / 'file'} cannot be written" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ what happens while saving


def _after_half_a_file(act: Callable[[], None]) -> Callable[..., None]:
    """What transformers writes files by, which writes a part and then acts."""

    def write(tensors: object, path: str, **options: object) -> None:
        Path(path).write_bytes(b"half of it")
        act()

    return write


def _disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _permission_lost() -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def _count_layers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    quantize = BitsMoEModifier._quantize

    def counting(self: BitsMoEModifier, module: Any, name: str, inputs: Any) -> Any:
        made.append(name)
        return quantize(self, module, name, inputs)

    monkeypatch.setattr(BitsMoEModifier, "_quantize", counting)
    return made


@pytest.mark.parametrize("failure", [_disk_full, _permission_lost])
def test_resume_dir_finishes_after_a_failure_while_saving(
    failure: Callable[[], None],
    inputs: Path,
    expected: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = command(inputs, tmp_path / "out", "--resume-dir", str(tmp_path / "kept"))
    with monkeypatch.context() as patched:
        patched.setattr(transformers.modeling_utils, "safe_save_file", _after_half_a_file(failure))
        assert main(run) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "could not be written" in said
    assert "what was written is in" in said
    assert f"the same command finishes from {tmp_path / 'kept'}" in said
    assert not (tmp_path / "out").exists()
    made = _count_layers(monkeypatch)
    assert main(run) == 0
    assert made == []
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def _die_while_saving(run: list[str]) -> int:
    """Run in a forked process (its libraries are imported already), which dies while it saves. How it ended."""
    process = os.fork()
    if not process:
        die = _after_half_a_file(lambda: os.kill(os.getpid(), signal.SIGKILL))
        transformers.modeling_utils.safe_save_file = die
        try:
            main(run)
        finally:
            os._exit(3)  # never back into the tests
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_resume_dir_finishes_after_a_kill_while_saving(
    inputs: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = command(inputs, tmp_path / "out", "--resume-dir", str(tmp_path / "kept"))
    assert _die_while_saving(run) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    made = _count_layers(monkeypatch)
    assert main(run) == 0
    assert made == []
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_the_disk_is_full_while_a_layer_is_kept(
    inputs: Path,
    expected: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = command(inputs, tmp_path / "out", "--resume-dir", str(tmp_path / "kept"))
    with monkeypatch.context() as patched:
        patched.setattr("bitsmoe_modifier.storage.records.save_file", _after_half_a_file(_disk_full))
        assert main(run) == 2
    said = capsys.readouterr().err
    assert "could not be written ([Errno 28] No space left on device); what was finished before is kept" in said
    assert list((tmp_path / "kept").glob("*.partial")) == []
    assert main(run) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
