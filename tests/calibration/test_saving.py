"""What `oneshot` could not save is refused before calibration, and what it says meanwhile fits on a screen."""

from collections.abc import Callable
from pathlib import Path

import pytest
from llmcompressor import oneshot
from loguru import logger

from bitsmoe_modifier import BitsMoEModifier, RecipeError
from helpers import calibration, load

FIELDS = {"bits": 3.0, "group_size": 16, "block_size": 16}
YAML = "a_stage: {q_modifiers: {BitsMoEModifier: {bits: 3.0}}}"


@pytest.mark.parametrize("recipe", ["modifier", "text"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"save_compressed": False}, "save_compressed=False: experts are packed when they are quantized"),
        ({"output_dir": "FILE/out"}, "output_dir=FILE/out: FILE cannot be written (Not a directory)"),
    ],
    ids=["not-compressed", "no-folder"],
)
def test_saving_that_would_fail_is_refused(
    dense_checkpoint: Callable[..., Path], tmp_path: Path, options: dict[str, object], said: str, recipe: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    given = {"output_dir": str(tmp_path / "out"), **options}
    given["output_dir"] = str(given["output_dir"]).replace("FILE", str(file))
    model = load(dense_checkpoint("qwen3_moe"))
    model.register_forward_pre_hook(lambda *_: pytest.fail("calibration started"))
    with pytest.raises(RecipeError) as caught:
        oneshot(
            model=model,
            recipe=YAML if recipe == "text" else [BitsMoEModifier(**FIELDS)],
            dataset=calibration(),
            **given,
        )
    assert str(caught.value).startswith(said.replace("FILE", str(file)))
    assert not (tmp_path / "out").exists()


def test_warnings_do_not_grow_with_the_rows(dense_checkpoint: Callable[..., Path]) -> None:
    """llm-compressor warns whenever it is asked for an accelerator and there is none; it is asked once or twice."""
    warned: list[str] = []
    handle = logger.add(warned.append, level="WARNING", format="{message}")
    try:
        model = load(dense_checkpoint("qwen3_moe"))
        oneshot(model=model, recipe=[BitsMoEModifier(**FIELDS)], dataset=calibration(rows=24))
    finally:
        logger.remove(handle)
    assert len(warned) < 10, warned[:20]
