"""Two ranks on CPU, each with its part of every layer."""

from pathlib import Path

import pytest
from engines import run
from expected import check, expected

from checkpoints import packed_checkpoint

pytestmark = pytest.mark.vllm

LAYER = {"dense": (1, 2), "widths": (0, 2, 4, 6)}


@pytest.mark.parametrize("experts", [False, True], ids=["tensor parallel", "expert parallel"])
def test_two_ranks_equal_one(experts: bool, tmp_path: Path) -> None:
    folder = packed_checkpoint("qwen3_moe", tmp_path, **LAYER)
    found = run(folder, tensor_parallel_size=2, enable_expert_parallel=experts)
    check(found, expected(folder))
