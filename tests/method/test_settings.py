"""What settings become for a layer of given sizes."""

import pytest

from bitsmoe_modifier.method.layer import AUTO_GROUP_SIZE, QuantizerSettings


@pytest.mark.parametrize(
    ("length", "expected"),
    [(768, 128), (2048, 128), (1408, 128), (2880, 64), (704, 64), (1440, 32), (1520, 16), (1400, 56), (1407, 128)],
)
def test_group_size_of_a_layer(length: int, expected: int) -> None:
    """2880 is gpt-oss, 704 gemma 4; nothing fits 1407, which is then refused by name."""
    assert QuantizerSettings().for_length(length).group_size == expected


def test_a_group_size_that_was_set_stays() -> None:
    assert QuantizerSettings(group_size=96).for_length(2880).group_size == 96
    assert QuantizerSettings().group_size == AUTO_GROUP_SIZE
