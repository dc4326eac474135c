"""lm-eval tasks: the embedded items, files of items, refusals, and the figures against a plain computation."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitsmoe_modifier.errors import BitsMoEError
from bitsmoe_modifier.evaluation.accuracy import _load, check_tasks, compare_accuracy, label, measure_tasks
from bitsmoe_modifier.evaluation.evaluate import load_model
from bitsmoe_modifier.evaluation.tasks import FOLDER
from bitsmoe_modifier.evaluation.tasks.items import EMBEDDED, read
from bitsmoe_modifier.evaluation.tasks.items import load as load_items
from bitsmoe_modifier.sources.model import load_tokenizer
from helpers import load, pack_randomly, save
from tiny_text import save_tiny


def test_the_embedded_items_are_items():
    assert len(read(EMBEDDED)) == 400
    assert load_items()["test"][0]["label"] in range(4)


def test_lm_eval_finds_the_shipped_task():
    check_tasks(["continuations"])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ('{"context": "a"}', "an item is"),
        ('{"context": "a", "endings": ["b"], "label": 0}', "an item is"),
        ('{"context": "a", "endings": ["b", "c"], "label": 2}', "an item is"),
        ('{"context": "a", "endings": ["b", ""], "label": 0}', "an item is"),
    ],
    ids=["broken", "no-endings", "one-ending", "label-out-of-range", "empty-ending"],
)
def test_a_wrong_line_is_named(line, problem, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"context": "a", "endings": ["b", "c"], "label": 1}\n' + line)
    with pytest.raises(BitsMoEError, match=rf"x\.jsonl, line 2: .*{problem}"):
        check_tasks([str(path)])


@pytest.mark.parametrize(("task", "problem"), [("/no/items.jsonl", "no such file"), ("/no/t.yaml", "cannot be loaded")])
def test_missing_files_are_refused(task, problem):
    with pytest.raises(BitsMoEError, match=problem):
        check_tasks([task])


def test_two_tasks_of_one_name_are_refused(tmp_path):
    """One would take the other's place in the report."""
    for name in ("a/items.jsonl", "b/items.jsonl", "continuations.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"context": "a", "endings": ["b", "c"], "label": 1}')
    one, two, ours = (str(tmp_path / name) for name in ("a/items.jsonl", "b/items.jsonl", "continuations.jsonl"))
    with pytest.raises(BitsMoEError, match=r"a/items\.jsonl and .*b/items\.jsonl would both be called items; rename"):
        check_tasks([one, two])
    with pytest.raises(BitsMoEError, match=r"continuations and .*\.jsonl would both be called continuations"):
        check_tasks(["continuations", ours])


@pytest.mark.parametrize("name", ["my items: part 1 #2", "2024", "no", 'it\'s "quoted"'])
def test_any_name_of_a_file_of_items(name, tmp_path):
    path = tmp_path / f"{name}.jsonl"
    path.write_text('{"context": "a", "endings": ["b", "c"], "label": 1}')
    (members,) = _load([str(path)]).values()
    assert [member.config.task for member in members] == [name]


def test_labels():
    assert [label(t) for t in ("continuations", "/a/b.jsonl", "c.yaml")] == ["continuations", "b", "c"]


def test_scores_are_those_of_a_plain_computation(tiny, items):
    folder = tiny / "model"
    model, tokenizer = load_model(str(folder), torch.float32, torch.device("cpu")), load_tokenizer(folder)

    def logp(context: list[int], ending: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([context + ending])).logits[0].log_softmax(-1)
        return sum(logits[len(context) - 1 + i, token].item() for i, token in enumerate(ending))

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    mutual, normed = [], []
    for item in read(items):
        endings = [encode(" " + ending) for ending in item["endings"]]
        given = [logp(encode(item["context"]), ending) for ending in endings]
        alone = [logp([tokenizer.eos_token_id], ending) for ending in endings]
        gains = [a - b for a, b in zip(given, alone, strict=True)]
        rates = [a / len(ending) for a, ending in zip(given, item["endings"], strict=True)]
        mutual.append(float(gains.index(max(gains)) == item["label"]))
        normed.append(float(rates.index(max(rates)) == item["label"]))
    assert 0 < sum(mutual) < 24, "a test that could not tell"

    found = measure_tasks(model, tokenizer, [str(items)], 7, None)["letters"]
    assert found["metric"] == "acc_mutual_info"
    assert found["scores"] == mutual
    assert found["acc"] == pytest.approx(sum(mutual) / 24)
    assert found["others"] == {"acc_norm": pytest.approx(sum(normed) / 24)}
    assert measure_tasks(model, tokenizer, [str(items)], 7, 5)["letters"]["scores"] == mutual[:5]


def test_a_difference_is_taken_item_by_item():
    own = {"t": {"acc": 0.5, "scores": [1.0, 0.0]}, "u": {"acc": 1.0, "scores": [1.0]}}
    compared = compare_accuracy(own, {"t": {"acc": 1.0, "scores": [1.0, 1.0]}})
    assert compared["t"]["paired"]["difference"] == -0.5
    assert compared["t"]["paired"]["only_reference"] == 1
    assert "paired" not in compared["u"]
    assert all("scores" not in entry for entry in compared.values())


@pytest.mark.slow
def test_lm_eval_reads_packed_checkpoints_by_the_documented_line(tmp_path, items):
    """The line of docs/evaluation.md, on our own task."""
    documented = "import bitsmoe_modifier, runpy; runpy.run_module('lm_eval', run_name='__main__')"
    assert documented in (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    model = load(save_tiny(tmp_path / "model"))
    pack_randomly(model)
    folder = save(model, tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "model" / name, folder)
    (tmp_path / "letters.yaml").write_text(
        f"include: {FOLDER}/continuations.yaml\ntask: letters\ndataset_kwargs: {{file: {items}}}\n"
    )
    options = ["--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu"]
    options += ["--include_path", str(tmp_path), "--tasks", "letters", "--output_path", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", documented, "run", *options], check=True, capture_output=True)
    (written,) = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(written.read_text())["results"]["letters"]
    loaded = load_model(str(folder), torch.float32, torch.device("cpu"))
    ours = measure_tasks(loaded, load_tokenizer(folder), [str(items)], 4, None)["letters"]
    assert theirs["acc_mutual_info,none"] == pytest.approx(ours["acc"])
    assert theirs["acc_norm,none"] == pytest.approx(ours["others"]["acc_norm"])
