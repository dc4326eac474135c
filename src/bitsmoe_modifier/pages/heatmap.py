"""The widths of a layer as a picture: a row per expert, a column per unit of gate, up and down.

A 128-expert layer has some 25,000 units, too many for a rectangle each: the cells are the pixels of a small palette PNG
that the drawing scales up.
"""

import base64
import struct
import zlib

import torch

from .style import WIDTHS
from .svg import element, label, picture


def png(pixels: torch.Tensor, palette: list[str]) -> bytes:
    """A palette image.

    Args:
        pixels: uint8 ``[height, width]``, places in the palette.
        palette: colours as ``#rrggbb``.
    """
    height, width = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels], 1)  # filter 0 before every row
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    colours = b"".join(bytes.fromhex(colour[1:]) for colour in palette)
    body = zlib.compress(rows.contiguous().numpy().tobytes(), 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"PLTE", colours)
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


def width_map(title: str, widths_in: torch.Tensor, widths_out: torch.Tensor, width: float = 340) -> str:
    """Widths of a layer's units, one panel for each of gate, up and down.

    Args:
        title: names the layer.
        widths_in: uint8 ``[E, 2, units]``; gate, up.
        widths_out: uint8 ``[E, units]``.
    """
    known = list(WIDTHS)
    places = torch.zeros(max(known) + 1, dtype=torch.uint8)
    places[known] = torch.arange(len(known), dtype=torch.uint8)
    experts = len(widths_out)
    panels = {"gate": widths_in[:, 0], "up": widths_in[:, 1], "down": widths_out}
    left, top, gap = 52, 46, 8
    each = (width - left - 10 - 2 * gap) / 3
    height = min(max(4 * experts, 60), 200)
    parts, at = [], float(left)
    used = sorted({int(w) for panel in panels.values() for w in panel.unique()})
    for place, bits in enumerate(used):
        where = left + 38 * place
        parts.append(element("rect", x=where, y=4, width=12, height=12, fill=WIDTHS[bits], stroke="#999"))
        parts.append(label(str(bits), where + 17, 14))
    parts.append(label("bits", left - 6, 14, "end"))
    for name, panel in panels.items():
        data = base64.b64encode(png(places[panel.long()], list(WIDTHS.values()))).decode()
        parts.append(label(name, at + each / 2, top - 8, "middle"))
        parts.append(
            element(
                "image",
                href=f"data:image/png;base64,{data}",
                x=at,
                y=top,
                width=each,
                height=height,
                preserveAspectRatio="none",
                style="image-rendering: pixelated",
            )
        )
        parts.append(element("rect", x=at, y=top, width=each, height=height, fill="none", stroke="#999"))
        at += each + gap
    parts.append(label("0", left - 6, top + 10, "end") + label(str(experts - 1), left - 6, top + height, "end"))
    parts.append(label("expert", left - 6, top + height / 2 + 4, "end"))
    parts.append(label("directions, strongest first", left + (width - left - 10) / 2, top + height + 18, "middle"))
    told = "; ".join(
        f"{name}: "
        + ", ".join(f"{100 * (panel == b).float().mean():.0f} % at {b} bits" for b in used if (panel == b).any())
        for name, panel in panels.items()
    )
    return picture(width, top + height + 26, title, f"{told}.", *parts)
