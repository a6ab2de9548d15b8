"""What fits in memory at once."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from visionlora.training.memory import SPARE, at_once, bytes_kept, free_memory


def test_what_a_pass_keeps_is_counted_once_and_without_weights() -> None:
    layer = nn.Linear(8, 4)
    x = torch.randn(16, 8, requires_grad=True)
    assert bytes_kept(layer, lambda: layer(x)) == 16 * 8 * 4
    assert bytes_kept(layer, lambda: layer(x) + layer(x)) == 16 * 8 * 4
    with torch.no_grad():
        assert bytes_kept(layer, lambda: layer(x)) == 0


@given(st.integers(1, 64), st.integers(1, 10**6), st.integers(0, 10**8))
def test_the_largest_share_that_fits(together: int, per_picture: int, free: int) -> None:
    found = at_once(together, per_picture, free)
    assert together % found == 0
    assert found == 1 or found * per_picture <= SPARE * free
    larger = [n for n in range(found + 1, together + 1) if together % n == 0]
    assert all(n * per_picture > SPARE * free - per_picture for n in larger)


def test_free_memory_is_told_where_it_can_be() -> None:
    found = free_memory(torch.device("cpu"))
    assert found is None or found > 2**20
