"""Charts: well-formed drawings with text alternatives, marks where the values are, images that decode to the widths."""

import base64
import io
import itertools
import random
import re
import xml.etree.ElementTree as ET

import pytest
import torch

from bitsmoe_modifier.pages import drawing
from bitsmoe_modifier.pages.charts import (
    Point,
    columns,
    loss_against_size,
    over_layers,
    pareto,
    spectrum,
    stacked_bars,
    width_map,
)
from bitsmoe_modifier.pages.style import METHODS, OTHER, WIDTHS, method_of

SVG = "{http://www.w3.org/2000/svg}"
POINTS = [
    Point("gptq_w2", METHODS["GPTQModifier"], 2.13, 72.8),
    Point("gptq_w4", METHODS["GPTQModifier"], 4.13, 3.3),
    Point("a < b & c", METHODS["BitsMoEModifier"], 2.0, 44.9),
    Point("crowded", METHODS["BitsMoEModifier"], 2.001, 44.8),
    Point("x", OTHER, 3.0, 100.0),
]
ODD = "_a $x^$ \x01 <b> 漢"
DRAWINGS = {
    "loss": lambda: loss_against_size(POINTS, 0.5),
    "one-run": lambda: loss_against_size(POINTS[:1], 60.0),
    "odd-name": lambda: loss_against_size([Point(ODD, OTHER, 2.0, 1e-7), Point("y", OTHER, 2.0, 3e9)], 0.0),
    "bars": lambda: stacked_bars("Bytes", {"a": {"codes": 3.0, "scales": 1.0}, ODD: {"codes": 0.0}}, "MB"),
    "no-bars": lambda: stacked_bars("Bytes", {"a": {}}, "MB"),
    "layers": lambda: over_layers("Bits", "bits", {"a": [1.0, 2.5, 0.0], ODD: [2.0, 2.0, 2.0]}),
    "one-layer": lambda: over_layers("Bits", "bits", {"a": [0.0]}),
    "spectrum": lambda: spectrum("Energy", {"in": [5.0, 1.0, 0.0, 1e-9], "none": [0.0] * 4}),
    "columns": lambda: columns("Tokens", "tokens", [0, 10, 5], "expert"),
    "zeros": lambda: columns("Tokens", "tokens", [0, 0], "expert"),
    "widths": lambda: width_map("Widths", torch.tensor([[[0, 8], [1, 2]]] * 3), torch.tensor([[3, 4]] * 3)),
}


def told(root: ET.Element) -> dict[str, ET.Element]:
    """What is drawn, by the text that it shows under the pointer."""
    titles = {element.findtext(f"{SVG}title"): element for element in root.iter() if element is not root}
    return {title: element for title, element in titles.items() if title}


def place(mark: ET.Element) -> tuple[float, float]:
    use = next(mark.iter(f"{SVG}use"))
    return float(use.get("x")), float(use.get("y"))


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings_are_well_formed_and_say_what_they_show(name):
    text = DRAWINGS[name]()
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert [child.tag for child in root[:2]] == [f"{SVG}title", f"{SVG}desc"]
    assert root[0].text
    assert len(root[1].text) > 10
    _, _, width, height = map(float, root.get("viewBox").split())
    assert (float(root.get("width")), float(root.get("height"))) == (width, height), "a point is a pixel"
    for mark in root.iter():
        for key, limit in (("x", width), ("y", height)):
            if mark.get(key) is not None:
                assert -1 <= float(mark.get(key)) <= limit + 1, (mark.tag, key, mark.get(key))
    assert not re.search(r"\bnan\b|\binf\b", text.lower())
    assert "mathdefault" not in text, "ticks are numbers"
    assert not re.findall(r"(?:href|src)=\"(?!#|data:)", text), "nothing outside the file"
    assert "DejaVu" not in text
    assert "<style" not in text, "it would change the page around it"


@pytest.mark.parametrize("name", DRAWINGS)
def test_ink_is_the_pages_and_names_are_those_of_definitions(name):
    text = DRAWINGS[name]()
    assert drawing.INK not in text
    assert "currentColor" in text
    assert not re.search(r"#000000|#000\b", text), "black on black in dark mode"
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r"href=\"#([^\"]+)\"", text))
    assert set(re.findall(r"\bid=\"([^\"]+)\"", text)) == used, "no name twice on a page of several charts"


def test_the_same_numbers_give_the_same_bytes():
    assert DRAWINGS["loss"]() == DRAWINGS["loss"]()


def test_points_lie_in_the_order_of_their_values():
    marks = {text.split(":")[0]: mark for text, mark in told(ET.fromstring(loss_against_size(POINTS, 0.0))).items()}
    (x, y), (x2, y2) = place(marks["a < b & c"]), place(marks["crowded"])
    assert 0 < x2 - x < 1
    assert 0 < y2 - y < 1, "a smaller loss is further down"
    assert place(marks["gptq_w4"])[0] > place(marks["x"])[0] > x2


def test_labels_do_not_cover_each_other():
    root = ET.fromstring(loss_against_size(POINTS, 0.0))
    names = {p.name for p in POINTS}
    labels = [t for t in root.iter(f"{SVG}text") if t.text in names]
    assert len(labels) == len(POINTS)
    size = 12
    boxes = [(float(t.get("x")), float(t.get("y")), 0.56 * size * len(t.text)) for t in labels]
    for (x, y, w), (x2, y2, w2) in itertools.combinations(boxes, 2):
        assert x + w <= x2 or x2 + w2 <= x or abs(y - y2) >= size


@pytest.mark.parametrize("seed", range(20))
def test_the_pareto_front_against_all_pairs(seed):
    draw = random.Random(seed)
    points = [Point(str(i), OTHER, draw.randint(1, 6), draw.randint(1, 6)) for i in range(12)]
    front = {(p.size, p.loss) for p in pareto(points)}
    beaten = {
        (p.size, p.loss)
        for p in points
        if any(q.size <= p.size and q.loss <= p.loss and (q.size, q.loss) != (p.size, p.loss) for q in points)
    }
    assert front == {(p.size, p.loss) for p in points} - beaten


@pytest.mark.parametrize(("low", "high"), [(1e-7, 3e-7), (0.3, 7.0), (57.0, 74.0), (1.0, 12345.0), (1e-9, 3e9)])
def test_the_loss_has_two_to_ten_numbers_on_its_axis(low, high):
    root = ET.fromstring(loss_against_size([Point("a", OTHER, 2.0, low), Point("b", OTHER, 3.0, high)], 0.0))
    numbers = [t for t in root.iter(f"{SVG}text") if re.fullmatch(r"[\d.e+−]+", t.text or "")]
    left = min(float(t.get("x")) for t in numbers)
    assert 2 <= sum(float(t.get("x")) == left for t in numbers) <= 12


def test_bars_are_as_long_as_their_parts():
    root = ET.fromstring(stacked_bars("t", {"a": {"codes": 3.0, "scales": 1.0}, "b": {"codes": 2.0}}, "MB"))

    def length(text: str) -> float:
        (path,) = told(root)[text].iter(f"{SVG}path")
        across = [float(x) for x in re.findall(r"[ML] (\S+) ", path.get("d"))]
        return max(across) - min(across)

    assert length("codes: 3.00 MB") / length("scales: 1.00 MB") == pytest.approx(3, rel=0.01)
    assert length("codes: 3.00 MB") / length("codes: 2.00 MB") == pytest.approx(1.5, rel=0.01)


def test_the_width_map_shows_gate_up_and_down():
    from PIL import Image

    widths_in = torch.tensor([[[0, 8], [1, 2]], [[3, 3], [6, 0]]], dtype=torch.uint8)
    widths_out = torch.tensor([[4, 1], [0, 0]], dtype=torch.uint8)
    drawn = width_map("w", widths_in, widths_out)
    panels = []
    for data in re.findall(r"base64,([^\"]+)", drawn):
        image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        assert image.size == (2, 2), "a pixel per unit; the browser enlarges them"
        known = {tuple(bytes.fromhex(c[1:])): bits for bits, c in WIDTHS.items()}
        panels.append([[known[image.getpixel((x, y))] for x in range(2)] for y in range(2)])
    assert panels == [[[0, 8], [3, 3]], [[1, 2], [6, 0]], [[4, 1], [0, 0]]]
    assert drawn.count("image-rendering:crisp-edges;image-rendering:pixelated") == 3
    assert "gate: 25 % at 0 bits, 50 % at 3 bits, 25 % at 8 bits" in drawn


def test_a_run_with_gptq_attention_is_drawn_as_bitsmoe():
    assert method_of(["GPTQModifier", "BitsMoEModifier"]).name == "BitsMoE"
    assert method_of(["Unheard"]) is OTHER
