"""A quantization that is killed and started again ends with the same bytes, or is refused by what differs."""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor import oneshot
from quantize_once import FIELDS, dying, quantize, quantize_until
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from bitsmoe_modifier import BitsMoEModifier, CheckpointError, RecipeError
from bitsmoe_modifier.calibration import modifier
from bitsmoe_modifier.comparison.processes import start_context
from helpers import calibration, load

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def source(dense_checkpoint: Checkpoint) -> Path:
    return dense_checkpoint("qwen3_moe")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What a run that nobody interrupts and that keeps nothing packs."""
    out = tmp_path_factory.mktemp("whole") / "packed.safetensors"
    quantize(source, out, None)
    return load_file(out)


@pytest.fixture(scope="module")
def started(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("started") / "resume"
    quantize(source, folder.parent / "packed.safetensors", folder)
    return folder


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.view(torch.uint8), two[name].view(torch.uint8)), name


def run(target: Callable[..., Any], *arguments: object, wait: float | None = None) -> int:
    """Run in a process of its own; SIGKILL it after ``wait`` seconds. Its exit code."""
    process = start_context("cpu").Process(target=target, args=arguments)
    process.start()
    process.join(wait)
    process.kill()
    process.join()
    return process.exitcode


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def layer_file(folder: Path, name: str) -> Path:
    """A layer's file in a folder of one budget."""
    (found,) = folder.glob(f"*-bits-*/{name}")
    return found


RECORD, SURVEY = "fingerprint.json", "survey.safetensors"
SETTINGS, FIRST, SECOND = ("settings.json", *(f"model.layers.{n}.mlp.experts.safetensors" for n in (0, 1)))


#: each run dies right before or after it puts a file in place, which leaves these files; the next one goes on
DEATHS = (
    ("before", []),
    ("after", [RECORD]),
    ("before", [RECORD]),
    ("after", [RECORD, SURVEY]),
    ("before", [RECORD, SURVEY]),
    ("after", [RECORD, SETTINGS, SURVEY]),
    ("before", [RECORD, SETTINGS, SURVEY]),
    ("after", [RECORD, FIRST, SETTINGS, SURVEY]),
    ("before", [RECORD, FIRST, SETTINGS, SURVEY]),
    ("after", [RECORD, FIRST, SECOND, SETTINGS, SURVEY]),
)


class Death(BaseException):
    """Nobody catches it."""


def test_ended_around_every_file(
    source: Path, whole: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an exception, which is quicker to test than a kill."""
    out, folder = tmp_path / "packed.safetensors", tmp_path / "resume"

    def die() -> None:
        raise Death

    for when, left in DEATHS:
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", dying(when, folder, die))
            with pytest.raises(Death):
                quantize(source, out, folder)
        assert files(folder) == left, when
        assert not out.exists()
    quantize(source, out, folder)
    assert_same(load_file(out), whole)


def test_killed_after_a_layer(source: Path, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    out, folder = tmp_path / "packed.safetensors", tmp_path / "resume"
    quantize(source, out, folder)
    layer_file(folder, SECOND).unlink()
    out.unlink()
    assert run(quantize_until, "before", source, out, folder) == -9
    assert files(folder) == [RECORD, FIRST, SETTINGS, SURVEY]
    assert not out.exists()
    quantize(source, out, folder)
    assert_same(load_file(out), whole)


@pytest.mark.slow
def test_killed_around_every_file(source: Path, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    out, folder = tmp_path / "packed.safetensors", tmp_path / "resume"
    for when, left in DEATHS:
        assert run(quantize_until, when, source, out, folder) == -9
        assert files(folder) == left, when
        assert not out.exists()
    assert run(quantize, source, out, folder) == 0
    assert_same(load_file(out), whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random(seed: int, source: Path, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    out, folder = tmp_path / "packed.safetensors", tmp_path / "resume"
    rng = random.Random(seed)
    started = time.monotonic()
    assert run(quantize, source, tmp_path / "timing.safetensors", tmp_path / "other") == 0
    seconds, deaths = time.monotonic() - started, 0
    while True:
        longest = 1.1 if deaths else 0.8
        if run(quantize, source, out, folder, wait=rng.uniform(0.2, longest) * seconds) != 0:
            assert not out.exists()
            deaths += 1
        elif deaths:
            break
        else:  # it was quicker than the one before: nothing was killed
            shutil.rmtree(folder)
            out.unlink()
    assert_same(load_file(out), whole)


@pytest.mark.parametrize(
    "changes",
    [{}, {"scope": "layer"}, {"pipeline": "basic"}, {"pipeline": "independent", "super_experts": "auto"}],
    ids=lambda c: ", ".join(map(str, c.values())) or "global",
)
def test_only_what_is_missing_is_made_again(
    changes: dict[str, str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, folder = tmp_path / "packed.safetensors", tmp_path / "resume"
    quantize(source, out, None, **changes)
    expected = load_file(out)
    quantize(source, out, folder, **changes)
    assert_same(load_file(out), expected)
    calls = {"survey_layers": 0, "quantize_layer": 0}
    for name, original in {name: getattr(modifier, name) for name in calls}.items():

        def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(modifier, name, counted)
    for lost in (FIRST, SECOND):
        layer_file(folder, lost).unlink()
        quantize(source, out, folder, **changes)
        assert_same(load_file(out), expected)
    assert calls == {"survey_layers": 0, "quantize_layer": 2}


@pytest.mark.parametrize("changes", [{"bits": 2.0}, {"bits": 4.0, "refine_passes": 0, "solver": "highs"}], ids=str)
def test_one_survey_serves_other_budgets(
    changes: dict[str, Any], source: Path, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a later budget packs by a kept survey is what it packs by a survey of its own, to the last bit."""
    quantize(source, tmp_path / "alone.safetensors", None, **changes)
    folder = shutil.copytree(started, tmp_path / "resume")
    monkeypatch.setattr(modifier, "survey_layers", lambda *_: pytest.fail("the model was surveyed again"))
    quantize(source, tmp_path / "together.safetensors", folder, **changes)
    assert_same(load_file(tmp_path / "together.safetensors"), load_file(tmp_path / "alone.safetensors"))
    assert len(list(folder.glob("*-bits-*"))) == 2, "the layers of both budgets are kept"


def test_one_calibration_serves_a_sweep(source: Path, tmp_path: Path) -> None:
    """The leading run makes the layers of all budgets; the others take them, without rows; a kill changes no byte."""
    folder, sweep = tmp_path / "resume", [2.0, 3.0, 4.0]
    with pytest.raises(RecipeError, match=r"sweep: the run at 3\.0 bits makes the layers of 2\.0; run that one first"):
        quantize(source, tmp_path / "too_early.safetensors", folder, sweep=sweep, bits=2.0, pipeline="datafree")

    def packed(bits: float, folder: Path, name: str, **changes: Any) -> dict[str, torch.Tensor]:
        quantize(source, tmp_path / name, folder, sweep=sweep, bits=bits, **changes)
        return load_file(tmp_path / name)

    lead = packed(3.0, folder, "lead.safetensors")
    quantize(source, tmp_path / "alone.safetensors", None)
    assert_same(lead, load_file(tmp_path / "alone.safetensors"))
    followers = {bits: packed(bits, folder, f"{bits}.safetensors", pipeline="datafree") for bits in (2.0, 4.0)}
    assert sum(t.numel() for t in followers[2.0].values()) < sum(t.numel() for t in followers[4.0].values())
    # one of another budget's layers is missing: its neighbours' inputs are what they were
    next(iter(sorted(folder.glob("2-bits-*"))[-1].glob("*.1.*.safetensors"))).unlink()
    assert_same(packed(3.0, folder, "again.safetensors"), lead)
    assert_same(packed(2.0, folder, "2again.safetensors", pipeline="datafree"), followers[2.0])


def test_a_sweep_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="needs resume_dir, and bits among it"):
        BitsMoEModifier(bits=2.0, sweep=[2.0, 3.0])
    with pytest.raises(ValueError, match="needs resume_dir, and bits among it"):
        BitsMoEModifier(bits=2.5, sweep=[2.0, 3.0], resume_dir="kept")


def test_reports_are_kept(source: Path, tmp_path: Path) -> None:
    reports = []
    for _ in range(2):
        model = load(source)
        oneshot(model=model, dataset=calibration(), recipe=[BitsMoEModifier(**FIELDS, resume_dir=str(tmp_path))])
        reports.append([model.get_submodule(f"model.layers.{n}.mlp.experts").report for n in (0, 1)])
    assert reports[0] == reports[1]
    assert str(tmp_path) not in BitsMoEModifier(resume_dir=str(tmp_path)).model_dump_json(), "no path in the recipe"


# -------------------------------------------------------------------------------------------------- what is refused


def refused(model: Any, folder: Path, rows: int = 6, others: tuple[Any, ...] = (), **changes: object) -> str:
    recipe = [BitsMoEModifier(**{**FIELDS, **changes}, resume_dir=str(folder)), *others]
    with pytest.raises(RecipeError) as caught:
        oneshot(model=model, dataset=calibration(rows=rows), recipe=recipe, pipeline="sequential")
    return str(caught.value)


def test_other_inputs_are_named(
    source: Path, started: Path, dense_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier

    from bitsmoe_modifier.calibration import fingerprint

    assert "recipe.0 BitsMoEModifier.basis_bits: 4, now 8" in refused(load(source), started, basis_bits=8)
    assert "calibration.batches: 6, now 5" in refused(load(source), started, rows=5)
    changed = load(source)
    with torch.no_grad():
        changed.model.layers[1].mlp.experts.down_proj[3, 2, 1] += 1e-3
    said = refused(changed, started)
    assert "model.weights.model.layers.1: " in said
    assert "model.layers.0" not in said
    other = refused(load(dense_checkpoint("qwen3_moe", num_hidden_layers=3)), started)
    assert "model.config.num_hidden_layers: 2, now 3" in other
    gptq = GPTQModifier(targets=["re:.*q_proj"], scheme="W8A8", ignore=["re:.*experts.*"])
    assert "recipe.1 GPTQModifier" in refused(load(source), started, others=(gptq,))
    monkeypatch.setattr(fingerprint, "versions", lambda: {"torch": "1.0"})
    assert "versions.torch: 2" in refused(load(source), started)


def test_other_folders_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert "is not empty and holds no earlier run" in refused(load(source), tmp_path)
    assert files(tmp_path) == ["precious.txt"]
    assert "cannot be written" in refused(load(source), tmp_path / "precious.txt")


def test_damaged_layers_are_refused(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resume"
    quantize(source, tmp_path / "packed.safetensors", folder)
    data = bytearray(layer_file(folder, SECOND).read_bytes())
    data[len(data) // 2] ^= 1
    layer_file(folder, SECOND).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp.*checksum"):
        quantize(source, tmp_path / "again.safetensors", folder)
    layer_file(folder, SECOND).write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp.*is damaged .* delete it to compute it again"):
        quantize(source, tmp_path / "again.safetensors", folder)


def test_rows_that_change_with_every_reading(source: Path, tmp_path: Path) -> None:
    """llm-compressor shuffles datasets anew each time, by default: no later run could go on from there."""
    rows = DataLoader(list(calibration()), batch_size=None, shuffle=True)
    with pytest.raises(RecipeError, match=r"^resume_dir: .* each time .*shuffle_calibration_samples=False"):
        oneshot(model=load(source), recipe=[BitsMoEModifier(**FIELDS, resume_dir=str(tmp_path / "kept"))], dataset=rows)
    assert not (tmp_path / "kept").exists()


def rewrite(file: Path, entry: str, change: Callable[[Any], None]) -> None:
    """Change what a safetensors file says in an entry of its metadata, which is JSON."""
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    content = json.loads(metadata[entry])
    change(content)
    save_file(load_file(file), file, {**metadata, entry: json.dumps(content)})


@pytest.mark.parametrize("change", ["one factor", "no tuple", "another field"])
def test_a_survey_of_earlier_code_is_refused(change: str, source: Path, started: Path, tmp_path: Path) -> None:
    """Code of one version may keep other plans before it is released."""
    folder = shutil.copytree(started, tmp_path / "resume")

    def earlier(kept: list[list[Any]]) -> None:
        side = kept[0][2]["items"]["inputs"][0]["items"]
        if change == "another field":
            side["factor"] = side.pop("times")
        else:
            side["times"] = [1.5] if change == "one factor" else 1.5

    rewrite(folder / SURVEY, "notes", earlier)
    said = refused(load(source), folder)
    assert "survey.safetensors was written by another state of this package; delete " in said


def test_a_layer_of_earlier_code_is_refused(source: Path, started: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(started, tmp_path / "resume")
    rewrite(layer_file(folder, FIRST), "report", lambda report: report.pop("unseen_output_error"))
    assert f"{FIRST} was written by another state of this package" in refused(load(source), folder)


def test_a_folder_of_the_users_home(
    source: Path, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe is no shell, which would put the home in the place of a tilde."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(started)
    shutil.copytree(started, tmp_path / "kept")
    assert "basis_bits: 4, now 8" in refused(load(source), Path("~/kept"), basis_bits=8)
    assert not (started / "~").exists()
