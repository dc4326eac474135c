"""What settings become for a layer of given sizes."""

import pytest

from bitsmoe_modifier.method.layer import AUTO_GROUP_SIZE, QuantizerSettings


@pytest.mark.parametrize(
    ("length", "expected"),
    [(768, 128), (2048, 128), (1408, 128), (2880, 64), (704, 64), (1440, 32), (1520, 16), (1400, 56), (1407, 128)],
)
def test_group_size_of_a_layer(length: int, expected: int) -> None:
    """2880 is gpt-oss, 704 gemma 4; nothing fits 1407, which is then refused by name."""
    assert QuantizerSettings().for_sizes(64, length).group_size == expected


def test_a_group_size_that_was_set_stays() -> None:
    assert QuantizerSettings(group_size=96).for_sizes(64, 2880).group_size == 96
    assert QuantizerSettings().group_size == AUTO_GROUP_SIZE


@pytest.mark.parametrize(
    ("hidden", "length", "expected"),
    [(2048, 768, "trellis"), (2880, 2880, "trellis"), (2048, 1400, "scalar"), (2056, 768, "scalar")],
)
def test_codes_of_a_layer(hidden: int, length: int, expected: str) -> None:
    """1400 has groups of 56, and 2056 blocks of 8: no whole number of the 16 weights that trellis codes come in."""
    assert QuantizerSettings().for_sizes(hidden, length).codes == expected
    assert QuantizerSettings(codes="scalar").for_sizes(hidden, length).codes == "scalar"
    assert QuantizerSettings(codes="trellis").for_sizes(hidden, length).codes == "trellis"
