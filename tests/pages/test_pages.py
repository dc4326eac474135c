"""Whole pages: valid, complete, independent of anything outside the file, and fine with a browser."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bitsmoe_modifier.checkpoints.describe import describe
from bitsmoe_modifier.checkpoints.quality import keep_quality
from bitsmoe_modifier.cli import main
from bitsmoe_modifier.pages.checkpoint import checkpoint_page
from bitsmoe_modifier.pages.comparison import comparison_page
from bitsmoe_modifier.pages.samples import sample_views
from entries import FAILED, GPTQ, REFERENCE, ours, report
from helpers import pack_randomly, save, tiny_model

_VOID = {"meta", "link", "br", "img", "hr", "wbr"}


class _Checker(HTMLParser):
    """Fails on unbalanced tags; collects text, attributes and the number of drawings."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in _VOID:
            self.open.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(html: str) -> _Checker:
    """Parse a page and check what holds for all of them."""
    checker = _Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert html.startswith("<!DOCTYPE html>")
    assert all(link.startswith("data:") for link in checker.links), "nothing outside the file"
    assert "<script" not in html
    assert html.count("<svg") == html.count("<desc>")
    assert not re.search(r"\b(nan|None|inf)\b", checker.text)
    return checker


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c") / "arms" / "bitsmoe_2_0"
    model = tiny_model("qwen3_moe")
    pack_randomly(model)
    return save(model, folder)


@pytest.fixture(scope="module")
def made(packed) -> dict:
    accuracy = {"metric": "acc", "acc": 0.5, "stderr": 0.05, "items": 100, "others": {}}
    paired = {"difference": -0.1, "stderr": 0.02, "only_model": 3, "only_reference": 13, "p_value": 0.021}
    first = ours("bitsmoe_2_0", 2.0, 0.004, checkpoint="arms/bitsmoe_2_0", evaluate_seconds=3.0)
    first["accuracy"] = {"t": {**accuracy, "acc": 0.4, "paired": paired}}
    texts = {
        "prompt": "She opened the door and",
        "unquantized": [["\n left", 0.001], [" <b>", 0.3]],
        "quantized": " ran",
    }
    first["samples"] = [texts]
    second = GPTQ[1] | {"checkpoint": "arms/gone", "warnings": ["<b>&"]}
    whole = report([first, second, FAILED])
    whole["reference"] = REFERENCE | {"accuracy": {"t": accuracy}}
    return whole


def test_the_report_page_holds_everything(made, packed):
    html = comparison_page(made, packed.parents[1])
    text = check(html).text
    for said in (
        "bitsmoe_2_0 (2.00 bits per expert weight) has a KL divergence 60 % lower than gptq_w3",
        "t: bitsmoe_2_0 40.0 ± 5.0 %, a difference of -10.0 ± 2.0 points (3 items won, 13 lost; McNemar's p = 0.021)",
        "broken: ValueError: no",
        "gptq_w3: <b>&",
        "model.layers.1.mlp.experts",
        "Layers of bitsmoe_2_0",
        "What the models write",
        "noise floor",
        "nats per token; 0 is no difference",
        "She opened the door and …",
        "bitsmoe compare --model m",
        "t, %",
    ):
        assert said in text
    assert html.count("<svg") >= 5
    assert html.index("KL divergence: how far") < html.index("<table"), "terms are explained where they first occur"
    assert '<span class="far" title="0.300 nats"> &lt;b&gt;</span>' in html


def test_equal_texts_read_the_same():
    """Token by token as in one piece: line breaks in two tokens are one break to a reader."""
    tokens = [["a. ", 0.0], ["\n", 0.3], ["\n", 0.0], ["  ", 0.0], ["\tb", 0.0], ["\n\nc", 0.0]]
    written = {"prompt": "p", "unquantized": tokens, "quantized": "".join(text for text, _ in tokens)}
    (view,) = sample_views({"run": [written]})
    assert "".join(piece.text for piece in view.pieces).replace(" ⏎", "⏎") == view.runs[0].text == "a.⏎\nb⏎\nc"


def test_a_report_of_failures_only_is_a_page(tmp_path):
    assert "Failed runs" in check(comparison_page(report([FAILED]), tmp_path)).text


def test_the_checkpoint_page(packed, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["inspect", str(packed), "--html", str(out)]) == 0
    text = check(out.read_text(encoding="utf-8")).text
    for layer in describe(packed)["layers"]:
        assert f"{layer['bits']:.3f} bits" in text
    assert str(out) in capsys.readouterr().out
    assert "Not measured yet" in text
    html = out.read_text(encoding="utf-8")
    assert html.count("<figure>") == html.count("<figcaption>") == html.count("<svg"), "every chart has its sentence"


def test_the_checkpoint_page_says_what_it_is_and_how_good(packed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(packed, folder)
    noted = {layer["name"]: {} for layer in describe(packed)["layers"]}
    made_of = {"versions": {"torch": "2.13"}, "machine": {"system": "Linux"}, "seed": 3, "calibration": {"tokens": 99}}
    record = {"source": {"name": "org/base", "weights": "0"}, "layers": noted, "made_of": made_of}
    (folder / "bitsmoe_report.json").write_text(json.dumps(record))
    samples = [{"prompt": "Once", "unquantized": [[" upon", 0.0]], "quantized": " more"}]
    run = ours("mine", 2.0, 0.004)
    keep_quality(folder, {"reference": REFERENCE, "run": run, "how": "On /home/me/t.txt.", "samples": samples})
    text = check(checkpoint_page(folder)).text
    for said in (
        "org/base",
        "torch 2.13",
        "99 tokens, seed 3",
        "4.00 ± 0.01",
        "Once …",
        " more",
        "On t.txt. Measured on 20",
    ):
        assert said in text
    assert re.search(r"Date\s+20\d\d-\d\d-\d\d", text)
    assert "/home" not in text


def test_a_model_of_many_layers_has_few_charts(tmp_path):
    """Over all layers, and of the worst three: not three per layer."""
    model = tiny_model("qwen3_moe", num_hidden_layers=12)
    pack_randomly(model)
    folder = save(model, tmp_path / "deep")
    layers = describe(folder)["layers"]
    noted = {
        layer["name"]: {
            "relative_output_error": 0.01 * i,
            "unseen_output_error": 0.02 * i,
            "tokens_per_expert": [i] * layer["experts"],
            "energy": {"in": [2.0, 1.0], "out": [1.0, 1.0]},
        }
        for i, layer in enumerate(layers)
    }
    (folder / "bitsmoe_report.json").write_text(json.dumps({"layers": noted}))
    html = checkpoint_page(folder)
    text = check(html).text
    assert html.count("<svg") <= 15
    assert re.findall(r"<h3>(\S+)</h3>", html) == [layer["name"] for layer in layers[-3:]]
    assert "The 3 of 12 layers with the largest output error" in text
    assert "no tokens" in html


def test_a_checkpoint_without_packed_experts_is_a_page(dense_checkpoint):
    assert "not quantized" in check(checkpoint_page(dense_checkpoint("qwen3_moe"))).text
