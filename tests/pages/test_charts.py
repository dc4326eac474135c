"""Charts: well-formed drawings with text alternatives, marks where the values are, images that decode to the widths."""

import base64
import io
import itertools
import math
import random
import re
import xml.etree.ElementTree as ET

import pytest
import torch

from bitsmoe_modifier.pages.charts import Curve, Point, floor_is_near, loss_against_size, pareto, stacked_bars
from bitsmoe_modifier.pages.layers import (
    Series,
    amounts_over_layers,
    bars_over_layers,
    columns,
    spectrum,
    width_map,
    widths_over_layers,
)
from bitsmoe_modifier.pages.style import AMOUNTS, BYTES, INK, METHODS, NONE, OTHER, PHASES, WIDTHS, method_of

SVG = "{http://www.w3.org/2000/svg}"
POINTS = [
    Point("gptq_w2", METHODS["GPTQModifier"], 2.13, 72.8),
    Point("gptq_w4", METHODS["GPTQModifier"], 4.13, 3.3),
    Point("a < b & c", METHODS["BitsMoEModifier"], 2.0, 44.9),
    Point("crowded", METHODS["BitsMoEModifier"], 2.001, 44.8),
    Point("x", OTHER, 3.0, 100.0),
]
CURVE = Curve((1.0, 2.2, 3.0, 4.0, 5.0), (500.0, 60.0, 20.0, 6.0, 3.0))
ODD = "_a $x^$ \x01 <b> 漢"
WIDTHS_OF = {"gate": {0: 3, 8: 1}, "up": {"2": 4}, "down": {1: 1, 3: 1}}


def series(name: str, *values: float) -> Series:
    return Series(name, INK, values)


def bytes_of(rows: dict[str, dict[str, float]]) -> str:
    return stacked_bars("Bytes", "experts, MB", rows, "MB", BYTES)


DRAWINGS = {
    "loss": lambda: loss_against_size(POINTS, 0.5),
    "one-run": lambda: loss_against_size(POINTS[:1], 60.0),
    "odd-name": lambda: loss_against_size([Point(ODD, OTHER, 2.0, 1e-7), Point("y", OTHER, 2.0, 3e9)], 0.0),
    "expected": lambda: loss_against_size(POINTS, 0.5, [CURVE, Curve((9.0, 9.5), (1.0, 0.5))]),
    "errors": lambda: loss_against_size([Point("a", OTHER, 2.0, 5.0, 1.0), Point("b", OTHER, 3.0, 1e-3, 2.0)], 1e-3),
    "bars": lambda: bytes_of({"a": {"codes": 3.0, "scales": 1.0}, ODD: {"codes": 0.0}}),
    "no-bars": lambda: bytes_of({"a": {}}),
    "layers": lambda: bars_over_layers("Bits", "bits", [series("a", 1.0, 2.5, 0.0), series(ODD, 2.0, 2.0, 2.0)]),
    "one-layer": lambda: bars_over_layers("Bits", "bits", [series("a", 0.0)]),
    "many-layers": lambda: bars_over_layers("Errors", "%", [Series(c, INK, [1.0] * 94, [0.5] * 94) for c in "ab"], "x"),
    "widths-by-layer": lambda: widths_over_layers("Widths", [WIDTHS_OF] * 48),
    "amounts": lambda: amounts_over_layers("Tokens", "expert", "tokens", {"a": [[1, 0, 20], [5]], ODD: [[7]]}, "none"),
    "equal-amounts": lambda: amounts_over_layers("Tokens", "expert", "tokens", {"a": [[3, 3]]}),
    "no-amounts": lambda: amounts_over_layers("Tokens", "expert", "tokens", {"a": [[0, 0]]}, "none"),
    "spectrum": lambda: spectrum("Energy", {"in": [5.0, 1.0, 0.0, 1e-9], "none": [0.0] * 4}),
    "columns": lambda: columns("Tokens", "tokens", [0, 10, 5], "expert"),
    "zeros": lambda: columns("Tokens", "tokens", [0, 0], "expert"),
    "widths": lambda: width_map("Widths", torch.tensor([[[0, 8], [1, 2]]] * 3), torch.tensor([[3, 4]] * 3)),
}


def told(root: ET.Element) -> dict[str, ET.Element]:
    """What is drawn, by the text that it shows under the pointer."""
    titles = {element.findtext(f"{SVG}title"): element for element in root.iter() if element is not root}
    return {title: element for title, element in titles.items() if title}


def test_the_surveys_curve_is_drawn_between_the_points() -> None:
    marks = told(ET.fromstring(loss_against_size(POINTS, 0.5, [CURVE])))
    assert "expected by the survey: 60 at 2.20 bits to 6" in marks
    assert not any("expected" in text for text in told(ET.fromstring(loss_against_size(POINTS, 0.5))))


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
        if mark.get("transform"):  # in coordinates of its own
            continue
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
    assert INK not in text
    assert "currentColor" in text
    assert not re.search(r"#000000|#000\b", text), "black on black in dark mode"
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r"href=\"#([^\"]+)\"", text))
    assert set(re.findall(r"\bid=\"([^\"]+)\"", text)) == used, "no name twice on a page of several charts"


def test_long_legends_are_read_to_their_end():
    """A line of eight names is wider than the chart."""
    every = [Point(name, method, 2.0 + place, 3.0) for place, (name, method) in enumerate(METHODS.items())]
    curve = Curve((1.0, 3.0, 5.0, 9.0), (4.0, 3.0, 2.0, 1.0))
    loss, stored = loss_against_size(every, 0.1, [curve]), bytes_of({"a": dict.fromkeys(BYTES, 1.0)})
    for drawn, names in ((loss, [*(m.name for m in METHODS.values()), "expected by the survey"]), (stored, [*BYTES])):
        for name in names:
            (at,) = re.findall(rf'<text [^>]*x="([0-9.]+)"[^>]*>{re.escape(name)}</text>', drawn)
            assert float(at) + 6.5 * len(name) < 720, name


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


def test_the_standard_error_is_a_bar_through_the_point():
    point = Point("a", METHODS["GPTQModifier"], 2.0, 4.0, 1.0)
    root = ET.fromstring(loss_against_size([point, Point("b", OTHER, 3.0, 1.0)], 0.0))
    assert "a: 2.000 bits, 4 ± 1" in told(root)
    lines = [p.get("d") for p in root.iter(f"{SVG}path") if METHODS["GPTQModifier"].colour in (p.get("style") or "")]
    bars = [[float(n) for ends in re.findall(r"[ML] (\S+) (\S+)", d) for n in ends] for d in lines]
    x, low, x2, high = next(b for b in bars if len(b) == 4 and b[0] == b[2] and b[1] != b[3])
    at = place(told(root)["a: 2.000 bits, 4 ± 1"])
    assert x == x2 == pytest.approx(at[0], abs=0.5)
    assert (low - at[1]) / (at[1] - high) == pytest.approx(math.log(4 / 3) / math.log(5 / 4), rel=0.02)


def test_a_floor_far_below_is_not_drawn():
    assert floor_is_near(POINTS, 0.5)
    assert "noise floor" in loss_against_size(POINTS, 0.5)
    assert not floor_is_near(POINTS, 0.05)
    assert "noise floor" not in loss_against_size(POINTS, 0.05)


@pytest.mark.parametrize("floor", [0.3, 60.0])
def test_a_floor_above_every_point_is_in_the_chart(floor):
    """A run that loses less than the floor: the axis ended below it, and its name took the room of the chart."""
    drawn = loss_against_size([Point("a", METHODS["BitsMoEModifier"], 5.0, 0.05, 0.001)], floor)
    (words,) = re.findall(r'<text [^>]*y="([0-9.]+)"[^>]*>noise floor</text>', drawn)
    ((top, height),) = re.findall(r'<clipPath[^>]*>\s*<rect [^>]*y="([0-9.]+)"[^>]*height="([0-9.]+)"', drawn)
    assert float(top) < float(words) < float(top) + float(height)
    assert float(height) > 300


def test_a_bar_per_layer_and_nothing_between_them():
    drawn = bars_over_layers("Errors", "%", [Series("a", "#123456", [1.0, 2.0], [0.5, 1.5])], "on the calibration text")
    root = ET.fromstring(drawn)
    assert {"a, layer 0: 1", "a, layer 1: 2"} <= told(root).keys()
    assert "on the calibration text" in drawn
    heights = []
    for layer, value in enumerate((1, 2)):
        (path,) = told(root)[f"a, layer {layer}: {value}"].iter(f"{SVG}path")
        up = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path.get("d"))]
        heights.append(max(up) - min(up))
    assert heights[1] / heights[0] == pytest.approx(2, rel=0.01)


def test_charts_over_all_layers_do_not_grow_with_them():
    """A 94-layer model's charts are as many and as wide as a 2-layer model's can be."""
    for layers in (2, 94):
        root = ET.fromstring(bars_over_layers("Bits", "bits", [series("a", *[1.0] * layers)]))
        assert float(root.get("width")) <= 720
        root = ET.fromstring(amounts_over_layers("Tokens", "expert", "tokens", {"a": [[1.0] * 512] * layers}))
        assert float(root.get("height")) <= 560


def test_no_colour_means_two_things():
    palettes = {
        "methods": [m.colour for m in METHODS.values()],
        "widths": WIDTHS.values(),
        "bytes": BYTES.values(),
        "phases": PHASES.values(),
        "amounts": [*AMOUNTS, NONE],
    }
    used = [(colour, what) for what, colours in palettes.items() for colour in colours]
    for (one, what), (other, what2) in itertools.combinations(used, 2):
        if what != what2:
            assert _apart(one, other) > 12, (one, what, other, what2)


def _apart(one: str, other: str) -> float:
    """Distance in CIELAB (D65); below some 2.3 nobody sees a difference, and some 10 is one at a glance."""

    def lab(colour: str) -> tuple[float, float, float]:
        c = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in c)
        x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047
        y = 0.2126 * r + 0.7152 * g + 0.0722 * b
        z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883
        fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
        return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)

    return math.dist(lab(one), lab(other))


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
    root = ET.fromstring(bytes_of({"a": {"codes": 3.0, "scales": 1.0}, "b": {"codes": 2.0}}))

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
