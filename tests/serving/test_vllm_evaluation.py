"""lm-eval through vLLM and through transformers: the same items right."""

import json
from pathlib import Path

import pytest
import torch

from checkpoints import add_tokenizer, packed_checkpoint

pytestmark = pytest.mark.vllm

ENGINE = "max_model_len=64,max_num_seqs=8,enforce_eager=True"


def items(file: Path) -> Path:
    """24 items of random words, of which the model knows nothing: some right, some wrong."""
    g = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(f"t{i}" for i in torch.randint(3, 128, (count,), generator=g).tolist())

    lines = [{"context": words(7), "endings": [words(3) for _ in range(4)], "label": i % 4} for i in range(24)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_same_accuracy_as_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bitsmoe_modifier.cli import main
    from bitsmoe_modifier.evaluation.accuracy import measure_tasks

    folder, task = packed_checkpoint("qwen3_moe", tmp_path / "model"), str(items(tmp_path / "words.jsonl"))
    add_tokenizer(folder)
    command = ["eval", str(folder), "--backend", "vllm", "--tasks", task, "--dtype", "float32", "--engine", ENGINE]
    assert main([*command, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["words"]
    assert f"| words | acc_mutual_info | {100 * found['acc']:.1f} % |" in capsys.readouterr().out

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = measure_tasks(model, AutoTokenizer.from_pretrained(folder), [task], 8, None)["words"]
    assert 0 < expected["acc"] < 1
    assert found == {key: value for key, value in expected.items() if key != "scores"}
