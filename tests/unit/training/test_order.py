"""Order and noise depend on (seed, images seen) alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from visionlora.training.order import generator_at, indices_at


@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 3))
def test_every_pass_sees_every_picture_once(dataset: int, batch: int, seed: int) -> None:
    seen = torch.cat([indices_at(seed, n * batch, batch, dataset) for n in range(dataset)])
    for epoch in range(batch):
        assert sorted(seen[epoch * dataset : (epoch + 1) * dataset].tolist()) == list(range(dataset))


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 9))
def test_a_batch_does_not_depend_on_how_the_ones_before_were_cut(start: int, batch: int, dataset: int) -> None:
    whole = indices_at(0, start, batch, dataset)
    single = torch.cat([indices_at(0, start + i, 1, dataset) for i in range(batch)])
    assert torch.equal(whole, single)


def test_seeds_positions_and_purposes_differ() -> None:
    draws = [torch.randn(4, generator=generator_at(*a)) for a in ((0, 0), (1, 0), (0, 1), (0, 0, "order"))]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
