"""The public names are there, sorted, and load on first use."""

import pytest

import visionlora


def test_every_public_name_exists() -> None:
    assert len(visionlora.__all__) >= 10
    assert sorted(visionlora.__all__[:-1]) == visionlora.__all__[:-1]
    assert all(getattr(visionlora, name) is not None for name in visionlora.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'injekt'"):
        visionlora.injekt  # noqa: B018
