"""``bitsmoe inspect``, ``export`` and ``import``: one checkpoint, looked at or written in another form."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import BitsMoEError
from . import options as o
from .app import command


@command(
    "inspect",
    "Show sizes, bit-widths and bases of a checkpoint.",
    "bitsmoe inspect qwen3-2bit",
    "bitsmoe inspect qwen3-2bit --html qwen3-2bit.html                the same, drawn",
)
def inspect(
    checkpoint: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw it as a page of its own, and print where it is.")
    ] = None,
) -> None:
    """What a checkpoint stores, from its headers: sizes per layer, bit-widths, bases, tokens per expert."""
    from ..checkpoints.describe import describe, render
    from ..sources.model import find_model
    from ..storage.folders import check_file_place

    if html and as_json:
        raise BitsMoEError("--json and --html exclude each other; give one of them")
    if html:
        check_file_place(html, "--html")
    folder = find_model(checkpoint)
    if html:
        from ..pages.checkpoint import checkpoint_page
        from ..storage.records import write_text

        write_text(Path(html), checkpoint_page(folder))
        print(html)
        return
    found = describe(folder)
    print(json.dumps(found, indent=2) if as_json else render(found))


@command(
    "export",
    "Write a checkpoint's dense weights for other tools.",
    "bitsmoe export qwen3-2bit --out qwen3-2bit-dense                 for tools that know nothing of us",
)
def export(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder with packed experts.")],
    out: o.NewFolder,
    to: Annotated[Literal["dense", "w4"], typer.Option(help="What to write.")] = "dense",
    dtype: Annotated[o.Dtype, typer.Option(help="Of dense weights.")] = "bfloat16",
    group_size: Annotated[
        int | None, typer.Option(metavar="N", help="Weights per scale of w4.", show_default="128")
    ] = None,
    *,
    verbose: bool,
) -> None:
    """Decode the experts and write an ordinary checkpoint, under the architecture's own tensor names.

    dense: as they are. w4: the experts as packed 4-bit Linears of compressed-tensors, rounded to nearest (RTN) from
    the decoded weights. Needs memory for the whole dense model.
    """
    if group_size is not None and to != "w4":
        raise BitsMoEError("--group-size is of w4; give --to w4 too, or leave it out")
    from ..comparison.single import export_one

    export_one(checkpoint, Path(out), to, dtype, 128 if group_size is None else group_size, verbose)
    print(out)


@command(
    "import",
    "Decode a checkpoint of the BitsMoE authors' runtime.",
    "bitsmoe import zjiayu064/Qwen3-30B-A3B-Base-BitsMoE-2bit --out theirs",
)
def import_(
    checkpoint: Annotated[str, typer.Argument(metavar="DIR|ID", help="Folder or hub name.")],
    out: o.NewFolder,
    dtype: Annotated[o.Dtype, typer.Option(help="Of decoded weights.")] = "bfloat16",
) -> None:
    """Decode a checkpoint that the BitsMoE authors published for their own runtime to a dense one.

    Every tool loads the result, and `eval` measures it. Their grids hold zero and ours do not, so packed weights
    cannot be taken over exactly; docs/comparison.md says more.
    """
    from ..checkpoints.authors import import_authors
    from ..comparison.runner import DTYPES
    from ..sources.model import find_model

    import_authors(find_model(checkpoint), Path(out), DTYPES[dtype])
    print(out)
