"""When samples are drawn."""

from hypothesis import given
from hypothesis import strategies as st

from visionlora.report.samples import sample_moments


@given(st.integers(1, 1000), st.integers(1, 12))
def test_moments_rise_to_the_last_step(steps: int, columns: int) -> None:
    moments = sample_moments(steps, columns)
    assert moments[-1] == steps
    assert moments[0] >= 1
    assert moments == sorted(set(moments))
    assert len(moments) == min(steps, columns)
