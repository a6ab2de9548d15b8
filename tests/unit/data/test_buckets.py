"""Which size a picture is trained at."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionlora.data.buckets import LONGEST, Framing, bucket_of, check_step, described, framing
from visionlora.errors import ConfigError

SIDES = st.integers(1, 3000)


@given(SIDES, SIDES, st.sampled_from([(512, 64), (1024, 64), (64, 32), (32, 8)]), st.booleans())
def test_a_bucket_keeps_its_promises(h: int, w: int, grid: tuple[int, int], upscale: bool) -> None:
    resolution, step = grid
    bh, bw = bucket_of((h, w), resolution, step, upscale)
    assert bh % step == 0 and bw % step == 0
    assert bh * bw <= resolution**2 and max(bh, bw) <= LONGEST * resolution
    if not upscale:
        assert bh <= max(step, h) and bw <= max(step, w)


@given(SIDES, SIDES, st.booleans())
def test_a_turned_picture_has_the_turned_bucket(h: int, w: int, upscale: bool) -> None:
    one, two = bucket_of((h, w), 512, 64, upscale), bucket_of((w, h), 512, 64, upscale)
    assert one == two[::-1] or one[0] * one[1] == two[0] * two[1]


@given(SIDES, SIDES)
def test_what_is_cut_lies_within_the_picture(h: int, w: int) -> None:
    f = framing((h, w), bucket_of((h, w), 512, 64))
    assert all(0 <= c <= r - b for c, r, b in zip(f.corner, f.resized, f.bucket, strict=True))
    # One side is made to fit, to a pixel of rounding.
    assert min(r - b for r, b in zip(f.resized, f.bucket, strict=True)) <= 1


def test_known_shapes() -> None:
    assert bucket_of((2000, 2000), 512, 64) == (512, 512)
    assert bucket_of((1080, 1920), 1024, 64) == (768, 1344)  # a size that SDXL was trained at
    assert bucket_of((100, 5000), 512, 64) == (64, 1024)
    assert bucket_of((300, 400), 512, 64) == (256, 384)
    assert bucket_of((300, 400), 512, 64, upscale=True) == (448, 576)


def test_what_sdxl_is_told() -> None:
    f = framing((1080, 1920), (768, 1344))
    assert f == Framing((1080, 1920), (768, 1365), (768, 1344), (0, 10))
    assert f.conditions(f.corner) == (1080, 1920, 0, 10, 768, 1344)


def test_a_step_that_fits_neither_model_nor_resolution() -> None:
    for step in (8, 64, 512):
        check_step(step, 8, 512)
    for step, resolution, use in [(20, 512, "16 or 32"), (4, 512, "8"), (256, 64, "64"), (64, 1000, "40 or 200")]:
        with pytest.raises(ConfigError) as caught:
            check_step(step, 8, resolution)
        assert str(caught.value) == (
            f"bucket_step is {step}; it must be a multiple of 8 px for this model, and divide the resolution, {resolution} px. "
            f"Use {use}."
        )


def test_the_report_says_what_became_of_each() -> None:
    def at(w: int, h: int, bucket: tuple[int, int]) -> Framing:
        return framing((h, w), bucket)

    assert described([("a", at(512, 512, (512, 512)))]) == []
    lines = described(
        [("a", at(512, 512, (512, 512))), ("b", at(1000, 500, (512, 512))), ("c", at(600, 300, (64, 128)))]
    )
    assert lines == [
        "Sizes, width x height in px: 512x512: 2, 128x64: 1 (c).",
        "1 of 3 pictures lose more than a tenth at the edges, b most (50%).",
        "1 of 3 pictures are enlarged, the first b.",
    ]
