"""Charts: well-formed drawings with text alternatives, marks where the values are, images that decode to the widths."""

import base64
import doctest
import io
import itertools
import random
import re
import xml.etree.ElementTree as ET

import pytest
import torch

from bitsmoe_modifier.pages import svg
from bitsmoe_modifier.pages.charts import (
    Point,
    columns,
    loss_against_size,
    over_layers,
    pareto,
    spectrum,
    stacked_bars,
)
from bitsmoe_modifier.pages.heatmap import png, width_map
from bitsmoe_modifier.pages.style import METHODS, OTHER, WIDTHS, method_of
from bitsmoe_modifier.pages.svg import Scale, scale_for

SVG = "{http://www.w3.org/2000/svg}"
POINTS = [
    Point("gptq_w2", METHODS["GPTQModifier"], 2.13, 72.8),
    Point("gptq_w4", METHODS["GPTQModifier"], 4.13, 3.3),
    Point("a < b & c", METHODS["BitsMoEModifier"], 2.0, 44.9),
    Point("crowded", METHODS["BitsMoEModifier"], 2.001, 44.8),
    Point("x", OTHER, 3.0, 100.0),
]
DRAWINGS = {
    "loss": lambda: loss_against_size(POINTS, 0.5),
    "one-arm": lambda: loss_against_size(POINTS[:1], 60.0),
    "bars": lambda: stacked_bars("Bytes", {"a": {"codes": 3.0, "steps": 1.0}, "b": {"codes": 0.0}}, "MB"),
    "layers": lambda: over_layers("Bits", "bits", {"a": [1.0, 2.5, 0.0], "b": [2.0, 2.0, 2.0]}),
    "spectrum": lambda: spectrum("Energy", {"in": [5.0, 1.0, 0.0, 1e-9], "none": [0.0] * 4}),
    "columns": lambda: columns("Tokens", "tokens", [0, 10, 5], "expert"),
    "widths": lambda: width_map("Widths", torch.tensor([[[0, 8], [1, 2]]] * 3), torch.tensor([[3, 4]] * 3)),
}


def test_the_examples_of_the_docstrings():
    assert doctest.testmod(svg).failed == 0


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings_are_well_formed_and_say_what_they_show(name):
    root = ET.fromstring(DRAWINGS[name]())
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.find(f"{SVG}title").text
    assert len(root.find(f"{SVG}desc").text) > 10
    _, _, width, height = map(float, root.get("viewBox").split())
    for mark in root.iter():
        for key, limit in (("x", width), ("x1", width), ("x2", width), ("cx", width), ("y", height), ("cy", height)):
            if mark.get(key) is not None:
                assert -1 <= float(mark.get(key)) <= limit + 1, (mark.tag, key, mark.get(key))
        assert "nan" not in ET.tostring(mark, encoding="unicode").lower().replace("gourmand", "")


def test_points_lie_in_the_order_of_their_values():
    root = ET.fromstring(loss_against_size(POINTS, 0.0))
    marks = {m.find(f"{SVG}title").text.split(":")[0]: m for m in root.iter(f"{SVG}circle") if ":" in m[0].text}
    near, far = marks["a < b & c"], marks["crowded"]
    assert float(near.get("cx")) < float(far.get("cx"))
    assert float(near.get("cy")) < float(far.get("cy")), "a smaller loss is further down"


def test_labels_do_not_cover_each_other():
    root = ET.fromstring(loss_against_size(POINTS, 0.0))
    names = {p.name for p in POINTS}
    boxes = [
        (float(t.get("x")), float(t.get("y")), svg.text_width(t.text))
        for t in root.iter(f"{SVG}text")
        if t.text in names
    ]
    assert len(boxes) == len(POINTS)
    for (x, y, w), (x2, y2, w2) in itertools.combinations(boxes, 2):
        assert x + w <= x2 or x2 + w2 <= x or abs(y - y2) >= svg.FONT


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


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("high", [1e-7, 0.3, 1.0, 7.3, 90.0, 12345.0, 3e9])
def test_ticks_are_few_and_within(high, log):
    scale = scale_for([high / 37, high], 0, 500, log=log)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 10
    assert all(scale.low <= t <= scale.high for t in ticks)
    assert ticks == sorted(set(ticks))
    assert 0 < scale(high / 37) < scale(high) < 500


def test_a_scale_of_equal_values_is_not_empty():
    for scale in (scale_for([2.0, 2.0], 0, 10), scale_for([2.0], 0, 10, log=True), scale_for([0.0], 0, 10, zero=True)):
        assert scale.low < scale.high
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)


def test_bars_are_as_long_as_their_parts():
    root = ET.fromstring(stacked_bars("t", {"a": {"codes": 3.0, "steps": 1.0}, "b": {"codes": 2.0}}, "MB"))
    widths = [float(r.get("width")) for r in root.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    assert widths[0] / widths[1] == pytest.approx(3, rel=0.01)
    assert widths[0] / widths[2] == pytest.approx(1.5, rel=0.01)


def test_a_palette_image_decodes_to_its_pixels():
    from PIL import Image

    pixels = torch.randint(len(WIDTHS), (5, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    image = Image.open(io.BytesIO(png(pixels, list(WIDTHS.values())))).convert("RGB")
    assert image.size == (7, 5)
    colours = [tuple(bytes.fromhex(c[1:])) for c in WIDTHS.values()]
    for y, x in itertools.product(range(5), range(7)):
        assert image.getpixel((x, y)) == colours[pixels[y, x]]


def test_the_width_map_shows_gate_up_and_down():
    from PIL import Image

    widths_in = torch.tensor([[[0, 8], [1, 2]], [[3, 3], [6, 0]]], dtype=torch.uint8)
    widths_out = torch.tensor([[4, 1], [0, 0]], dtype=torch.uint8)
    drawing = width_map("w", widths_in, widths_out)
    panels = []
    for data in re.findall(r"base64,([^\"]+)", drawing):
        image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        known = {tuple(bytes.fromhex(c[1:])): bits for bits, c in WIDTHS.items()}
        panels.append([[known[image.getpixel((x, y))] for x in range(2)] for y in range(2)])
    assert panels == [[[0, 8], [3, 3]], [[1, 2], [6, 0]], [[4, 1], [0, 0]]]
    assert "gate: 25 % at 0 bits, 50 % at 3 bits, 25 % at 8 bits" in drawing


def test_an_arm_with_gptq_attention_is_drawn_as_bitsmoe():
    assert method_of(["GPTQModifier", "BitsMoEModifier"]).name == "BitsMoE"
    assert method_of(["Unheard"]) is OTHER
