"""What `oneshot` is going to refuse, or fail at, when it saves: found before calibration, which may take hours."""

import tempfile
from pathlib import Path

from ..errors import RecipeError
from ..storage.folders import existing_parent


def check_saving(output_dir: str | Path | None, save_compressed: bool, source: str = "") -> None:
    """Refuse runs of a BitsMoEModifier whose result could not be saved as `oneshot` was told to.

    Args:
        output_dir, save_compressed: as `oneshot` takes them.
        source: the folder or the hub's name that the model was loaded from.

    Raises:
        RecipeError: naming the argument, and what to do.
    """
    if output_dir is None:
        return
    if not save_compressed:
        raise RecipeError(
            "save_compressed=False: experts are packed when they are quantized, and are saved packed; leave it out "
            "(`bitsmoe export` writes dense weights of what was saved)"
        )
    if source and Path(source).is_dir() and Path(source).resolve() == Path(output_dir).resolve():
        raise RecipeError(
            f"output_dir={output_dir} is the folder that the model comes from; give another, which keeps it"
        )
    parent = existing_parent(Path(output_dir))
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise RecipeError(f"output_dir={output_dir}: {parent} cannot be written ({error.strerror})") from None
