"""What dry runs measure of a step, and what they compute."""

import pytest
from visionlora.pipelines.timing import FEW, MOST, cost_of_step

from visionlora.training.memory import SPARE, Room

KEPT = 1000


@pytest.mark.parametrize(
    ("batch", "free", "measured", "fitting"),
    [
        (MOST, None, MOST, None),
        (3, 4 * KEPT / SPARE, 3, None),
        (10 * MOST, None, MOST, None),
        (100_000, 20 * KEPT / SPARE, FEW, 20),
        (100_000, 2 * KEPT / SPARE, 2, 2),
        (2, 0, 1, 1),
    ],
)
def test_a_batch_that_does_not_fit_is_never_tried(
    batch: int, free: float | None, measured: int, fitting: int | None
) -> None:
    tried: list[int] = []

    def seconds_with(count: int) -> float:
        tried.append(count)
        return 0.5 * count

    cost = cost_of_step(batch, Room(KEPT, None if free is None else round(free)), seconds_with)
    assert tried == [measured]
    assert (cost.seconds, cost.more_bytes, cost.fitting) == (0.5 * batch, (batch - measured) * KEPT, fitting)
    assert (f"batch_size={fitting} or none" in cost.note(" or none")) == (fitting is not None)
