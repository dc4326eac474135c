"""Whole pages: valid, complete, independent of anything outside the file, and fine with a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bitsmoe_modifier.checkpoints.describe import describe
from bitsmoe_modifier.cli import main
from bitsmoe_modifier.pages.checkpoint import checkpoint_page
from bitsmoe_modifier.pages.comparison import comparison_page
from entries import FAILED, GPTQ, REFERENCE, ours, report
from helpers import pack_randomly, save, tiny_model

_VOID = {"meta", "link", "br", "img", "hr"}


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
        "bitsmoe compare --model m",
        "t, %",
    ):
        assert said in text
    assert html.count("<svg") >= 5


def test_a_report_of_failures_only_is_a_page(tmp_path):
    assert "Failed runs" in check(comparison_page(report([FAILED]), tmp_path)).text


def test_the_checkpoint_page(packed, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["inspect", str(packed), "--html", str(out)]) == 0
    text = check(out.read_text(encoding="utf-8")).text
    for layer in describe(packed)["layers"]:
        assert f"{layer['bits']:.3f} bits" in text
    assert str(out) in capsys.readouterr().out


def test_a_checkpoint_without_packed_experts_is_a_page(dense_checkpoint):
    assert "not quantized" in check(checkpoint_page(dense_checkpoint("qwen3_moe"))).text


@pytest.mark.skipif(shutil.which("chromium-headless-shell") is None, reason="needs chromium-headless-shell")
def test_a_browser_has_nothing_to_say(made, packed, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(comparison_page(made, packed.parents[1]), encoding="utf-8")
    command = ["chromium-headless-shell", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    assert "How this was measured" in done.stdout
