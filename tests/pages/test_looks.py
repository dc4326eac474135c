"""Pages as a person sees them: in a real browser, narrow, wide, dark and on paper, nothing is cut, covered or pale.

Needs a Chromium (`browser.chromium`) and skips without one. `make look` also leaves the pictures in look/.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Page, chromium, opened

from bitsmoe_modifier.checkpoints.describe import describe
from bitsmoe_modifier.checkpoints.quality import keep_quality
from bitsmoe_modifier.pages.checkpoint import checkpoint_page
from bitsmoe_modifier.pages.comparison import comparison_page
from entries import FAILED, GPTQ, REFERENCE, arm, ours, report
from helpers import pack_randomly, save, tiny_model

LOOK = (Path(__file__).parent / "look.js").read_text(encoding="utf-8")
#: pixels; print is scaled to the paper, where 7.5 px are 6 points
SMALLEST = {"screen": 10, "print": 7.5}
TEXT = ["\n\n", " and", " the", " <door>", " was", " open,", " as", " if", " somebody", " had", " left."]
SAMPLES = [
    {"prompt": prompt, "unquantized": [[t, 0.03 * i] for i, t in enumerate(TEXT)], "quantized": "".join(TEXT[1:])}
    for prompt in ("The history of the city begins", "Three things to remember:", "She opened the door and")
]
KINDS = ("report", "odd-report", "checkpoint")
SIGHTS = [("screen", width, dark) for width in (390, 768, 1440) for dark in (False, True)] + [
    ("print", 700, False),
    ("print", 700, True),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a comparison, of one with odd names and figures, and of a checkpoint of many layers."""
    folder = tmp_path_factory.mktemp("pages")
    model = tiny_model("qwen3_moe", num_hidden_layers=30)
    pack_randomly(model)
    deep = save(model, folder / "arms" / "bitsmoe_2_0")
    noted = {
        layer["name"]: {
            "relative_output_error": 0.001 * (1 + i % 7),
            "unseen_output_error": 0.0015 * (1 + i % 7),
            "tokens_per_expert": [i * e * e for e in range(layer["experts"])],
            "energy": {"in": [2.0**-k for k in range(16)], "out": [1.0] * 16},
        }
        for i, layer in enumerate(describe(deep)["layers"])
    }
    made_of = {"versions": {"torch": "2.13", "transformers": "5.17"}, "machine": {"system": "Linux"}, "seed": 0}
    record = {"source": {"name": "org/base", "weights": "0"}, "layers": noted, "made_of": made_of}
    (deep / "bitsmoe_report.json").write_text(json.dumps(record))
    timed = {"load_seconds": 2.0, "save_seconds": 3.0, "evaluate_seconds": 9.0, "top1_stderr": 0.001}
    sizes = [1 + i / 32 for i in range(140)]  # what a survey expects, close to what is measured
    curve = {"bits": sizes, "kld": [0.0068 * 2.2 ** (2 * (1.6 - bits)) for bits in sizes]}
    runs = [one | timed | {"samples": SAMPLES} for one in (*GPTQ, ours("bitsmoe_1_6", 1.6, 0.0055, kld_stderr=5e-4))]
    for bits, kld in ((1.25, 0.0098), (2.125, 0.0024), (3.0, 0.0007)):
        runs.append(ours(f"bitsmoe_{str(bits).replace('.', '_')}", bits, kld, prediction=curve) | timed)
    first = ours("bitsmoe_2_0", 2.0, 0.004, checkpoint="arms/bitsmoe_2_0", samples=SAMPLES, **timed)
    long = (
        "model.layers.17.mlp.experts: 12 experts got no calibration tokens and use the layer's average (0, 17, 18, …)"
    )
    first["warnings"] = [long]
    keep_quality(deep, {"reference": REFERENCE, "run": first, "how": "Measured here.", "samples": SAMPLES})
    odd = [
        arm("a_run_with_a_name_that_is_longer_than_any_phone_is_wide_and_then_some", 2.0001, 0.0041),
        ours("x", 2.0, 0.004),
        ours("y", 2.0002, 0.00402, kld_stderr=2e-3),
        arm("z $x^$ 漢", 3.0, 9.0, kind="Unheard"),
        FAILED,
    ]
    html = {
        "report": comparison_page(report([*runs, first, FAILED]) | {"date": "2026-01-31"}, folder),
        "odd-report": comparison_page(report(odd), folder),
        "checkpoint": checkpoint_page(deep),
    }
    for name, text in html.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in html}


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    executable = chromium()
    if executable is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or name one by BITSMOE_BROWSER")
    with opened(executable) as page:
        yield page


@pytest.fixture(scope="module")
def keep() -> Callable[[str, bytes], None]:
    """Keeps pictures in the folder that BITSMOE_LOOK names."""
    folder = os.environ.get("BITSMOE_LOOK")

    def kept(name: str, content: bytes) -> None:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).write_bytes(content)

    return kept


@pytest.mark.parametrize(("medium", "width", "dark"), SIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_cut_covered_or_pale(pages, browser, keep, kind, medium, width, dark):
    browser.open(pages[kind], width, dark=dark, paper=medium == "print")
    seen = browser.run(LOOK.replace("SMALLEST", str(SMALLEST[medium])))
    keep(f"{kind}-{medium}-{width}-{'dark' if dark else 'light'}.png", browser.picture())
    assert seen["texts"] > 50
    assert seen["checked"] > 30
    assert seen["pictures"] >= 1
    assert seen["found"] == []
    assert browser.said == [], "the browser has nothing to say"


@pytest.mark.parametrize("kind", KINDS)
def test_dark_is_dark_and_paper_is_white(pages, browser, kind):
    ground = "getComputedStyle(document.body).backgroundColor"
    for dark, paper, expected in ((False, False, 255), (True, False, 22), (True, True, 255)):
        browser.open(pages[kind], 768, dark=dark, paper=paper)
        assert browser.run(ground).startswith(f"rgb({expected}, ")


def test_names_stay_while_figures_scroll(pages, browser):
    browser.open(pages["report"], 390)
    place = "document.querySelector('tbody th').getBoundingClientRect().left"
    before = browser.run(place)
    assert browser.run(
        "(() => { const w = document.querySelector('.wide'); w.scrollLeft = 200; return w.scrollLeft })()"
    )
    assert browser.run(place) == before
    browser.open(pages["report"], 390)
    heads = "[...document.querySelectorAll('thead th')].slice(0, 3)"
    ends = browser.run(f"{heads}.map(e => [e.innerText, e.getBoundingClientRect().right])")
    assert [name for name, _ in ends] == ["model", "bits per expert weight", "KLD × 1000"]
    assert ends[2][1] <= 390, "loss beside size on a phone"


@pytest.mark.parametrize(("medium", "width"), [("screen", 390), ("print", 700)])
@pytest.mark.parametrize("kind", KINDS)
def test_names_are_read_as_names(pages, browser, kind, medium, width):
    """Not letter by letter, and beside at least half a screen of figures."""
    browser.open(pages[kind], width, paper=medium == "print")
    cells = "[...document.querySelectorAll('tbody th')].map(e => [e.innerText, e.clientWidth, e.clientHeight])"
    for name, wide, high in browser.run(cells):
        assert wide <= width / 2, name
        assert wide >= 5 * min(len(name), 10), name
        assert high <= 60 or len(name) > 30, name


def test_the_look_finds_what_it_looks_for(browser, tmp_path):
    """Each fault, made on purpose, is found."""
    faults = {
        "overflow": "<p style='width:900px'>wide</p>",
        "contrast": "<p style='color:#999'>pale</p>",
        "overlap": "<p>one</p><p style='margin-top:-2.5em'>two</p>",
        "small": "<p style='font-size:7px'>tiny</p>",
        "crossed": "<svg width='200' height='40'><text x='20' y='25' font-size='14' fill='#000'>name</text>"
        "<path d='M0 20 H200' stroke='#000' stroke-dasharray='4 4'/></svg>",
        "cut": "<svg width='40' height='20'><text x='30' y='15' font-size='12' fill='#000'>out of it</text></svg>",
    }
    for fault, body in faults.items():
        page = tmp_path / f"{fault}.html"
        page.write_text(f"<!DOCTYPE html><title>x</title><body style='background:#fff;color:#222'>{body}")
        browser.open(page, 390)
        found = browser.run(LOOK.replace("SMALLEST", "10"))["found"]
        assert fault in {kind for kind, _, _ in found}, found


@pytest.mark.parametrize("kind", KINDS)
def test_no_heading_ends_a_sheet(pages, browser, keep, tmp_path, kind):
    browser.open(pages[kind], 700, paper=True)
    avoided = "[...document.querySelectorAll('h1,h2,h3')].every(e => getComputedStyle(e).breakAfter === 'avoid')"
    headings = browser.run("[...document.querySelectorAll('h2,h3')].map(e => e.innerText.replace(/\\s+/g, ' ').trim())")
    assert browser.run(avoided)
    assert len(headings) > 3
    sheet = tmp_path / "page.pdf"
    sheet.write_bytes(browser.pdf())
    keep(f"{kind}.pdf", sheet.read_bytes())
    if shutil.which("pdftotext") is None:
        pytest.skip("the sheets cannot be read: apt-get install poppler-utils")
    text = subprocess.run(["pdftotext", "-layout", sheet, "-"], capture_output=True, text=True, check=True).stdout
    sheets = [re.sub(r"\s+", " ", page).strip() for page in text.split("\f") if page.strip()]
    assert len(sheets) > 1
    assert not [heading for page in sheets[:-1] for heading in headings if page.endswith(heading)]
