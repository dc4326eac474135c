"""docs/fields.md is what `python tests/calibration/fields_page.py` writes, and says something of every field."""

from fields_page import PAGE, documented, own_fields, page


def test_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_field_is_documented() -> None:
    assert own_fields().keys() <= documented().keys()
    assert documented().keys() <= own_fields().keys() | {"widths"}
    assert {"bits", "max_kld", "scope", "resume_dir", "ignore"} <= own_fields().keys()
