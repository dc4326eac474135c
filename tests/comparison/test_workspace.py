"""When an output folder may be used, and what a rerun finds in it."""

import os
from pathlib import Path

import pytest
import torch

from bitsmoe_modifier.comparison.workspace import Workspace, write_text
from bitsmoe_modifier.errors import BitsMoEError

INPUTS = {"calibration": {"rows": 128, "sha256": "ab"}, "compute": {"dtype": "float32"}}


def test_a_new_folder_is_created_with_its_parents(tmp_path: Path):
    Workspace(tmp_path / "a" / "b").prepare(INPUTS, fresh=False)
    assert (tmp_path / "a" / "b" / "logs").is_dir()


def test_an_empty_folder_is_used(tmp_path: Path):
    Workspace(tmp_path).prepare(INPUTS, fresh=False)


def test_the_same_inputs_may_come_again(tmp_path: Path):
    for _ in range(2):
        Workspace(tmp_path).prepare(INPUTS, fresh=False)


def test_other_inputs_are_refused_with_what_differs(tmp_path: Path):
    Workspace(tmp_path).prepare(INPUTS, fresh=False)
    changed = {"calibration": {"rows": 64, "sha256": "ab"}, "compute": {"dtype": "bfloat16"}}
    expected = r"\(calibration\.rows: 128, now 64; compute\.dtype: float32, now bfloat16\)"
    with pytest.raises(BitsMoEError, match=expected):
        Workspace(tmp_path).prepare(changed, fresh=False)


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(BitsMoEError, match="is not empty and no earlier comparison"):
        Workspace(tmp_path).prepare(INPUTS, fresh=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_is_refused(tmp_path: Path):
    (tmp_path / "out").write_text("")
    with pytest.raises(BitsMoEError, match="is a file"):
        Workspace(tmp_path / "out").prepare(INPUTS, fresh=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(BitsMoEError, match="cannot be written"):
        Workspace(tmp_path / "out").prepare(INPUTS, fresh=False)


def test_a_folder_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BitsMoEError, match="cannot be written"):
        Workspace(tmp_path / "file" / "out").prepare(INPUTS, fresh=False)


def test_rows_come_back(tmp_path: Path):
    workspace = Workspace(tmp_path)
    workspace.prepare(INPUTS, fresh=False)
    calibration, evaluation = torch.arange(12).view(3, 4), torch.arange(40).view(4, 10)[:, :5]
    workspace.save_rows(calibration, evaluation)
    assert torch.equal(workspace.rows("calibration"), calibration)
    assert torch.equal(workspace.rows("evaluation"), evaluation)


def test_results_are_kept_for_the_same_key_only(tmp_path: Path):
    workspace = Workspace(tmp_path)
    workspace.prepare(INPUTS, fresh=False)
    assert workspace.finished("a", {"stage": "x"}) is None
    workspace.keep("a", {"stage": "x"}, {"kld_mean": 1.5})
    assert workspace.finished("a", {"stage": "x"}) == {"kld_mean": 1.5}
    assert workspace.finished("a", {"stage": "y"}) is None
    workspace.prepare(INPUTS, fresh=True)
    assert workspace.finished("a", {"stage": "x"}) is None


def test_write_text_replaces_whole_files(tmp_path: Path):
    path = tmp_path / "f.txt"
    for content in ("first", "second"):
        write_text(path, content)
        assert path.read_text() == content
    assert [p.name for p in tmp_path.iterdir()] == ["f.txt"]
