"""What is finished stays, whatever fails after it: the rest of the checkpoint, its card, its figures, the next size.

Failures are made where they happen: a file of that name cannot be written, because the disk is full.
"""

import builtins
import errno
import gc
import io
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitsmoe_modifier.calibration import modifier
from bitsmoe_modifier.calibration.recipe import one_stage
from bitsmoe_modifier.checkpoints import card
from bitsmoe_modifier.cli import main
from bitsmoe_modifier.comparison import runs, single
from bitsmoe_modifier.comparison.runs import Job, run_reference, run_stage
from bitsmoe_modifier.comparison.workspace import Workspace

QUICK = "group_size: 32, block_size: 16, refine_passes: 0, solver: lagrangian, codes: scalar"
RECIPE = f"a_stage: {{q_modifiers: {{BitsMoEModifier: {{bits: 4.5, scope: layer, {QUICK}}}}}}}"
OTHER = RECIPE.replace("4.5", "3.5")


def _failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """`open` on a disk that is full as soon as a file of this name, or its temporary one, is written."""

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if any(letter in mode for letter in "wxa+") and name in str(file).rpartition("/")[2]:
            real(file, mode, *args, **kwargs).close()  # it is made, and nothing fits into it
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return real(file, mode, *args, **kwargs)

    return opened


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Fills the disk for files of a name, until the test ends or `monkeypatch.undo`."""

    def fill(name: str) -> None:
        opened = _failing(name, builtins.open)
        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)

    return fill


@pytest.fixture(scope="module")
def inputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, texts and ``recipe.yaml``."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny / "model", folder / "model")
    for name in ("calibration.txt", "held_out.txt"):
        shutil.copy(tiny / name, folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def command(inputs: Path, out: Path, *more: str) -> list[str]:
    return [
        *("quantize", "--model", str(inputs / "model"), "--recipe", str(inputs / "recipe.yaml")),
        *("--calibration", str(inputs / "calibration.txt"), "--samples", "8", "--seq-len", "32", "--device", "cpu"),
        *("--out", str(out), *more),
    ]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run that nothing happens to."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert main(command(inputs, out)) == 0
    return out


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that are rounded from here on."""
    done: list[str] = []
    real = modifier.BitsMoEModifier._quantize

    def counting(self: modifier.BitsMoEModifier, module: Any, name: str, given: Any) -> Any:
        done.append(name)
        return real(self, module, name, given)

    monkeypatch.setattr(modifier.BitsMoEModifier, "_quantize", counting)
    return done


# ------------------------------------------------------------------------------- the rest of the checkpoint, the card


@pytest.mark.parametrize("name", ["tokenizer.json", "recipe.yaml", "bitsmoe_report.json"])
def test_the_disk_is_full_after_the_weights(
    name: str,
    inputs: Path,
    made: Path,
    tmp_path: Path,
    full_disk: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = command(inputs, tmp_path / "out", "--resume-dir", str(tmp_path / "kept"))
    full_disk(name)
    assert main(run) == 2
    monkeypatch.undo()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{tmp_path / 'out'} could not be written" in said
    assert "No space left on device" in said
    assert f"the same command finishes from {tmp_path / 'kept'}" in said
    assert not (tmp_path / "out").exists(), "no checkpoint that lacks a file"
    (left,) = tmp_path.glob(".out.*.partial")
    assert str(left) in said
    assert weights(left) == weights(made), "the weights are there"
    assert main(run) == 0
    assert left.exists(), "never deleted for the user"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in made.iterdir())


def _loads(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()


def test_the_disk_is_full_for_the_card(
    inputs: Path,
    made: Path,
    tmp_path: Path,
    full_disk: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full_disk("README.md")
    assert main(command(inputs, tmp_path / "out")) == 0
    monkeypatch.undo()
    said = capsys.readouterr()
    assert "is written, but its README.md could not be ([Errno 28] No space left on device" in said.err
    assert said.out.startswith(f"{tmp_path / 'out'}: 4.")
    assert weights(tmp_path / "out") == weights(made)
    assert not list((tmp_path / "out").glob("*README*")), "and no half of it"
    _loads(tmp_path / "out")


def test_the_cards_texts_fail(
    inputs: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str, **values: object) -> str:
        raise KeyError(name)

    monkeypatch.setattr(card, "render", broken)
    assert main(command(inputs, tmp_path / "out")) == 0
    assert "is written, but its README.md could not be (KeyError: 'quality.md')" in capsys.readouterr().err
    assert weights(tmp_path / "out") == weights(made)


# ------------------------------------------------------------------------------------------------- several sizes


def test_a_later_size_cannot_be_written(
    inputs: Path,
    tmp_path: Path,
    full_disk: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """The size that was written stays, the layers of the others too, and the same command makes the rest of them."""
    sizes = ("3.5", "4.5", "5.5")
    run = command(inputs, tmp_path / "out", "--bits", ",".join(sizes))
    assert main(command(inputs, tmp_path / "undisturbed", "--bits", ",".join(sizes))) == 0
    real = single.quantize

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        if (tmp_path / "out" / "4.5-bits").exists():
            full_disk("bitsmoe_report.json")
        return real(*args, **kwargs)

    capsys.readouterr()
    monkeypatch.setattr(single, "quantize", second_fails)
    assert main(run) == 2
    monkeypatch.undo()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3.5-bits could not be written" in said
    (kept,) = (tmp_path / "out").glob(".kept-*")
    assert f"the same command with --resume-dir {kept} goes on from there" in said
    first = weights(tmp_path / "out" / "4.5-bits")
    layers = request.getfixturevalue("layers")
    checked: list[str] = []
    check = single.check_machine
    monkeypatch.setattr(
        single,
        "check_machine",
        lambda stages, *rest: (checked.extend(one.name for one in stages), check(stages, *rest)),
    )
    assert main([*run, "--resume-dir", str(kept)]) == 0
    assert layers == [], "every layer was kept"
    assert len(checked) == 2, "the size that is there needs no room on the disk any more"
    told = capsys.readouterr()
    assert f"{tmp_path / 'out' / '4.5-bits'} was finished by an earlier run of this command" in told.err
    assert [line.partition(":")[0] for line in told.out.splitlines()] == [
        str(tmp_path / "out" / f"{bits}-bits") for bits in ("3.5", "5.5")
    ]
    for bits in sizes:
        assert weights(tmp_path / "out" / f"{bits}-bits") == weights(tmp_path / "undisturbed" / f"{bits}-bits"), bits
    assert weights(tmp_path / "out" / "4.5-bits") == first
    assert main([*run, "--resume-dir", str(kept), "--dtype", "bfloat16"]) == 2, "another command"
    assert "finished by an earlier run" not in capsys.readouterr().err


def test_a_size_of_another_run_is_refused(
    inputs: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made, tmp_path / "out" / "4.5-bits")
    run = command(inputs, tmp_path / "out", "--bits", "3.5,4.5", "--resume-dir", str(tmp_path / "kept"))
    assert main(run) == 2
    assert f"{tmp_path / 'out' / '4.5-bits'} exists and is not an empty folder" in capsys.readouterr().err


def test_nothing_is_left_of_sizes_that_were_all_written(inputs: Path, tmp_path: Path) -> None:
    assert main(command(inputs, tmp_path / "out", "--bits", "3.5,4.5")) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["3.5-bits", "4.5-bits"]


# ------------------------------------------------------------------------------------------------------ figures


def evaluate(checkpoint: Path, inputs: Path, *more: str) -> list[str]:
    texts = ["--model", str(inputs / "model"), "--eval-text", str(inputs / "held_out.txt"), "--eval-rows", "4"]
    return ["eval", str(checkpoint), *texts, "--seq-len", "32", "--device", "cpu", *more]


def test_figures_are_shown_where_they_cannot_be_kept(
    inputs: Path,
    made: Path,
    tmp_path: Path,
    full_disk: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(made, tmp_path / "out")
    full_disk("bitsmoe_quality.json")
    assert main(evaluate(folder, inputs, "--json", str(tmp_path / "figures.json"))) == 1
    monkeypatch.undo()
    said = capsys.readouterr()
    assert "| out |" in said.out
    assert f"the figures could not be written into {folder} ([Errno 28]" in said.err
    assert json.loads((tmp_path / "figures.json").read_text())["checkpoint"]["kld_mean"] > 0
    assert weights(folder) == weights(made)


def test_a_card_that_somebody_saved_in_latin_1(
    inputs: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(made, tmp_path / "out")
    mine = "## Quality\n\nschön\n\n## Mine\n".encode("latin-1")
    (folder / "README.md").write_bytes(mine)
    assert main(evaluate(folder, inputs)) == 1
    said = capsys.readouterr()
    assert "| out |" in said.out
    assert "could not be written into" in said.err
    assert (folder / "README.md").read_bytes() == mine


def test_figures_are_kept_where_the_models_write_no_texts(
    inputs: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_text(*_: Any) -> Any:
        raise ValueError("this tokenizer continues nothing")

    folder = shutil.copytree(made, tmp_path / "out")
    monkeypatch.setattr(single, "write", no_text)
    assert main(evaluate(folder, inputs)) == 1
    assert "texts could not be written (ValueError: this tokenizer continues nothing)" in capsys.readouterr().err
    assert json.loads((folder / "bitsmoe_quality.json").read_text())["run"]["kld_mean"] > 0
    assert "tokens of held_out.txt, computed in float32." in (folder / "README.md").read_text()


# --------------------------------------------------------------------------------------------------- comparisons


@pytest.fixture
def job(inputs: Path, tmp_path: Path) -> Job:
    """A comparison's folder with the unquantized model's predictions."""
    workspace = Workspace(tmp_path / "report")
    workspace.prepare({}, fresh=False)
    rows = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0))
    workspace.save_rows(rows, rows[:2].clone())
    job = Job(inputs / "model", "tiny", workspace.folder, "cpu", torch.float32, 4, "independent", False, 0)
    run_reference(job)
    return job


def stage_of(recipe: str, tmp_path: Path) -> Any:
    (tmp_path / "recipe.yaml").write_text(recipe)
    return one_stage(str(tmp_path / "recipe.yaml"), None)


def test_what_could_not_be_measured_is_not_quantized_again(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise MemoryError("while measuring")

    stage = stage_of(RECIPE, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(runs, "evaluate", out_of_memory)
        with pytest.raises(MemoryError):
            run_stage(job, stage)
    before = weights(job.out / "arms" / "a")
    layers = request.getfixturevalue("layers")
    entry = run_stage(job, stage)
    assert layers == []
    assert entry["kld_mean"] > 0
    assert entry["quantize_seconds"] > 0
    assert weights(job.out / "arms" / "a") == before


def test_the_unquantized_model_is_in_memory_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it is measured in its storage dtype after the dtype that is computed in."""
    load, held = runs.load_model, []

    def load_model(*args: Any) -> Any:
        gc.collect()
        assert all(model() is None for model in held)
        loaded = load(*args)
        held.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(runs, "load_model", load_model)
    run_reference(job)  # in float32, and stored in bfloat16
    assert len(held) == 2


def test_another_recipes_result_stays_until_the_new_one_is_there(
    job: Job, tmp_path: Path, full_disk: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage(job, stage_of(RECIPE, tmp_path))
    before = weights(job.out / "arms" / "a")
    full_disk("bitsmoe_report.json")
    with pytest.raises(ValueError, match="could not be written"):
        run_stage(job, stage_of(OTHER, tmp_path))
    monkeypatch.undo()
    assert weights(job.out / "arms" / "a") == before
    run_stage(job, stage_of(OTHER, tmp_path))
    assert len(weights(job.out / "arms" / "a")) < len(before)
