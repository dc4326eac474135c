"""Output folders appear whole or not at all."""

import pytest

from bitsmoe_modifier.errors import BitsMoEError
from bitsmoe_modifier.storage.folders import written_whole


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_a_folder_appears_at_the_end(existing, tmp_path):
    out = tmp_path / "sub" / "out"
    if existing:
        out.mkdir(parents=True)
    with written_whole(out) as folder:
        (folder / "x").write_text("1")
        assert not (out / "x").exists()
    assert (out / "x").read_text() == "1"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path):
    def fail() -> None:
        with written_whole(tmp_path / "out") as folder:
            (folder / "x").write_text("1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(BitsMoEError, match="not an empty folder"), written_whole(tmp_path):
        pass
