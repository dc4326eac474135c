"""Every row of `rows.py` in float32: what vLLM makes of a family's packed checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import cpu_stand_ins
import pytest
from engines import check_equal, run
from expected import check, expected
from packed_families import packed_family
from rows import ROWS, Row
from serving_page import CLASSES, current_table, table

pytestmark = pytest.mark.vllm

#: those that show most of what differs between families: biases, one expert per token, no gate, towers, images' rope
_FAST = ("gpt_oss", "llama4_text", "nemotron_h", "qwen3_vl_moe")


@pytest.fixture(autouse=True)
def _stand_ins() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        cpu_stand_ins.install(patch)
        yield


def rows(*, served: bool) -> list[object]:
    # in bfloat16 rounding turns over what random experts make likely: `test_vllm_published.py` has those rows
    chosen = [row for row in ROWS if (row.dtype == "float32" if served else True) and served != bool(row.error)]
    return [
        pytest.param(row, id=row.model_type, marks=() if row.model_type in _FAST else pytest.mark.slow)
        for row in chosen
    ]


@pytest.mark.parametrize("row", rows(served=True))
def test_family_is_served(row: Row, tmp_path: Path) -> None:
    settings = {"skip_tokenizer_init": not row.has_tower, **row.settings}
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    packed_family(row, packed, dense if row.like == "dense" else None)
    if row.like == "dense":
        check_equal(run(packed, **settings), run(dense, **settings))
    else:
        wanted = expected(packed)
        check(run(packed, **settings), wanted)


@pytest.mark.parametrize("row", rows(served=False))
def test_family_that_vllm_cannot_run_here(row: Row, tmp_path: Path) -> None:
    packed_family(row, tmp_path)
    with pytest.raises(Exception, match=row.error):
        run(tmp_path, dtype=row.dtype, skip_tokenizer_init=not row.has_tower, **row.settings)


def test_every_family_that_vllm_knows_has_a_row() -> None:
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    named = {model_type for model_type, name in CLASSES.items() if name in known}
    assert named == {row.model_type for row in ROWS}


def test_page_is_current() -> None:
    assert current_table() == table(), "run: .venv-vllm/bin/python tests/serving/serving_page.py"
