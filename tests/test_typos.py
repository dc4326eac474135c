"""Options that nothing can be done with end in one line that names them, before any work; exit code 2."""

from pathlib import Path

import pytest

from bitsmoe_modifier.cli import main
from bitsmoe_modifier.sources.demo import demo_asset

DEMO = demo_asset("docmoe")


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The last line on stderr of a command that is refused."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    assert output.out == ""
    return output.err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", 0], "--batch-size 0 must be 1 or more"),
        (["--batch-size", -3], "--batch-size -3 must be 1 or more"),
        (["--samples", 0], "--samples 0 must be 1 or more"),
        (["--seq-len", 1], "--seq-len 1 must be 2 or more"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["quantize", "compare", "eval"])
def test_numbers_that_are_too_small(
    command: str, options: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "eval" and options[0] == "--samples":
        pytest.skip("eval has no --samples")
    where = [tmp_path] if command == "eval" else ["--out", tmp_path / "out"]
    assert said(capsys, command, *where, *options) == f"bitsmoe {command}: {message}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", ".", "--eval-rows", -1], "--eval-rows -1 must be 0 or more"),
        (["eval", ".", "--task-items", -1], "--task-items -1 must be 0 or more"),
        (["export", ".", "--out", "o", "--to", "w4", "--group-size", 0], "--group-size 0 must be 1 or more"),
        (["export", ".", "--out", "o", "--group-size", 64], "--group-size is of w4; give --to w4 too, or leave it out"),
        (["inspect", ".", "--json", "--html", "x.html"], "--json and --html exclude each other; give one of them"),
        (["plan", "--model", ".", "--samples", -4], "--samples -4 must be 1 or more"),
        (["plan", "--model", DEMO, "--bits", "nan"], "bits: Input should be"),
        (["plan", "--model", DEMO, "--bits", "-2"], "bits: Input should be greater than 0"),
        (["plan", "--model", DEMO, "--bits", "99"], "bits: Input should be less than or equal to 8"),
        (["plan", "--model", DEMO, "--json", "x.json"], "--json keeps what --survey finds; give --survey too"),
        (["plan", "--model", DEMO, "--resume-dir", "x"], "--resume-dir keeps what --survey finds; give --survey too"),
        (["quantize", "--out", "o", "--bits", ","], "--bits ',' is no number"),
        (["quantize", "--out", "o", "--bits", "2, 2.0"], "--bits 2,2.0 has a size twice; give each once"),
        (["quantize", "--out", "o", "--bits", "2", "--max-kld", "0.1"], "--bits and --max-kld exclude each other"),
        (["quantize", "--out", "o", "--context", "32k"], "--context and --batch say what --fit shall hold; give --fit"),
        (["quantize", "--out", "o", "--fit", "24GB", "--batch", "0"], "--batch 0 must be 1 or more"),
        (
            ["quantize", "--out", "o", "--size", "0.1MB"],
            "100.00 KB is less than what is not a quantized expert, 743.79 KB",
        ),
        (["quantize", "--out", "o", "--private"], "--private says how to upload; give --push-to-hub too"),
        (["eval", ".", "--engine", "x=1"], "--engine says how vLLM runs it; give --backend vllm too"),
        (["plan", "--model", ".", "--device", "cudaa"], "--device cudaa is unknown"),
    ],
    ids=str,
)
def test_other_numbers_and_devices(
    arguments: list[object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in said(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "x", "--html", "nowhere/page.html"],
        ["eval", "x", "--json", "nowhere/figures.json"],
        ["plan", "--survey", "--json", "nowhere/x.json"],
    ],
)
def test_a_missing_folder_for_a_file(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = f"bitsmoe {arguments[0]}: {arguments[-2]} {arguments[-1]}: there is no folder nowhere; create it first"
    assert said(capsys, *arguments) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "NOWHERE"],
        ["export", "NOWHERE", "--out", "out"],
        ["eval", "NOWHERE"],
        ["import", "NOWHERE", "--out", "out"],
        ["quantize", "--model", "NOWHERE", "--out", "out"],
        ["plan", "--model", "NOWHERE"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_that_is_not_there_does_not_ask_the_hub(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "NOWHERE2").mkdir()
    assert "NOWHERE: no such model folder; did you mean NOWHERE2?; a model of the hub is named ORG/NAME" in said(
        capsys, *arguments
    )


def test_a_file_in_place_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file; give the folder of a saved model" in said(capsys, "inspect", tmp_path / "model.safetensors")


def test_a_model_without_calibration_says_that_the_demos_text_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    expected = f"no --calibration: the demo's text is used, which is hardly what {tmp_path} will see"
    assert expected in capsys.readouterr().err
    assert main(["quantize", "--model", str(tmp_path), "--calibration", "x.txt", "--out", str(tmp_path / "out")]) == 2
    assert "the demo's text is used" not in capsys.readouterr().err
    assert main(["compare", "--model", str(tmp_path), "--calibration", "x.txt", "--out", str(tmp_path / "out")]) == 2
    assert "no --eval-text: the demo's text is used" in capsys.readouterr().err
    assert main(["plan", "--survey", "--model", str(tmp_path)]) == 2
    assert "no --calibration: the demo's text is used" in capsys.readouterr().err
    datafree = ["--recipe", "experts_w4", "--pipeline", "datafree"]
    assert main(["quantize", "--model", str(tmp_path), *datafree, "--out", str(tmp_path / "out")]) == 2
    assert "the demo's text is used" not in capsys.readouterr().err


def test_a_typo_in_a_recipe_says_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("quant_stage:\n  quant_modifiers:\n    BitsMoEModifier:\n      bitz: 2\n")
    for command in (["quantize", "--out", "out"], ["compare", "--out", "out"], ["plan", "--model", "x"]):
        expected = f"{recipe}:4: BitsMoEModifier has no field 'bitz'; did you mean 'bits'?"
        assert said(capsys, *command, "--recipe", recipe).endswith(expected)
