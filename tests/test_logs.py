"""What reaches the terminal while a command works: what the user should know, once."""

from types import SimpleNamespace
from typing import Any

import pytest
from loguru import logger
from tqdm import tqdm

from bitsmoe_modifier.calibration.capture import log_layer
from bitsmoe_modifier.logs import set_up_logging


@pytest.mark.parametrize("verbose", [False, True])
def test_what_is_said(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    report: Any = SimpleNamespace(
        bits=2.0,
        input_basis_bits=0,
        output_basis_bits=0,
        relative_output_error=0.1,
        unseen_output_error=0.1,
        dense_experts=(),
        warnings=("said at the end",),
    )
    set_up_logging(verbose)
    logger.warning("a warning")
    logger.log("METRIC", "time 0.03s")
    logger.warning("block quantization strategy requires strict division of weight/activation size 576")
    chosen = logger.patch(lambda record: record.update(name="llmcompressor.pipelines.registry"))
    chosen.warning("Calibration pipeline is set to `datafree`")
    log_layer("layer 0", report)
    logger.remove()
    said = capsys.readouterr().err
    assert "a warning" in said
    assert verbose or said == "warning: a warning\n"
    assert ("strict division" in said, "Calibration pipeline" in said) == (verbose, verbose)
    assert ("time 0.03s" in said, "layer 0: said at the end" in said) == (verbose, verbose)


@pytest.mark.parametrize("value", ["1", "0"])
def test_bars_of_libraries_that_show_themselves(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --quiet or --log-json there is none: compressed-tensors, transformers and lm-eval say ``disable=False``."""
    begin = tqdm.__init__
    shown = begin.__wrapped__ if getattr(begin, "hides", False) else begin  # an earlier test may have hidden all bars
    monkeypatch.setattr(tqdm, "__init__", shown)
    monkeypatch.setenv("TQDM_DISABLE", value)
    for _ in range(2):
        set_up_logging(verbose=False)
    assert list(tqdm(range(3), desc="a bar", disable=False)) == [0, 1, 2]
    logger.remove()
    assert ("a bar" in capsys.readouterr().err) == (value == "0")
