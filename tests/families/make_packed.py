"""Packed checkpoints of every family, with the logits that they give, for another version of transformers to load.

    python tests/families/make_packed.py FOLDER

Run where llm-compressor is, which writes them as it does after a quantization. What is packed is random: how the
weights were found is no matter of loading. `test_newest.py` reads FOLDER.
"""

import shutil
import sys
import warnings
from pathlib import Path

from safetensors.torch import save_file

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]
from building import model_of
from models_page import FAMILIES

from bitsmoe_modifier.sources.companions import let_save
from helpers import load, logits, pack_randomly, save


def main(folder: Path) -> None:
    """Make them all, and ``ready`` when all are there."""
    shutil.rmtree(folder, ignore_errors=True)
    for family in FAMILIES:
        if family.refusal:
            continue
        model = model_of(family)
        pack_randomly(model)
        let_save(model)
        out = save(model, folder / family.model_type)
        save_file({"logits": logits(load(out)).contiguous()}, folder / f"{family.model_type}.logits")
    (folder / "ready").touch()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
