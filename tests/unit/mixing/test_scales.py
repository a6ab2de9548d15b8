"""Scales from the words of the command line."""

import numpy as np
import pytest
import torch

from visionlora.errors import ConfigError
from visionlora.mixing.scales import Ramp, Scale, Window, as_scale, block_factors, scale_from


def test_words_are_blocks_and_moments() -> None:
    assert scale_from(0.5, {"up": 1.2, "mid": 0.0}) == Scale(0.5, {"up": 1.2, "mid": 0.0})
    assert scale_from(1.0, {"start": 0.3, "end": 0.9, "up": 2.0}) == Scale(1.0, {"up": 2.0}, Window(0.3, 0.9))
    assert scale_from(1.0, {"end": 0.4}).steps == Window(0.0, 0.4)
    assert scale_from(1.0, {"last": 0.0}).steps == Ramp(1.0, 0.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"start": 0.5, "last": 0.0}, "give one of both"),
        ({"start": 0.8, "end": 0.2}, "acts from 0.8 to 0.2"),
        ({"end": 1.5}, "both must be between 0 and 1"),
    ],
)
def test_moments_that_cannot_be(words: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        scale_from(1.0, words)


@pytest.mark.parametrize(("start", "end"), [(0.7, 0.3), (30, 60), (-0.1, 0.5), (float("nan"), 1.0)])
def test_a_window_that_never_opens(start: float, end: float) -> None:
    with pytest.raises(
        ConfigError, match=f"acts from {start:g} to {end:g} of the sampling; both must be between 0 and 1"
    ):
        Window(start, end)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Window("a", 1), "acts from 'a' to 1 of the sampling; both must be between 0 and 1"),
        (lambda: Window(0, None), "acts from 0 to None of the sampling; both must be between 0 and 1"),
        (lambda: Ramp("a", 1), "A ramp has first 'a'; it must be a finite number."),
        (lambda: Ramp(1, float("nan")), "A ramp has last nan; it must be a finite number."),
        (lambda: Scale(images=3), "images is 3; give one number per picture of the batch"),
        (lambda: Scale(blocks=3), "blocks is 3; give factors by the names of blocks"),
        (lambda: Scale(blocks="up"), "blocks is 'up'; give factors by the names of blocks"),
        (lambda: as_scale({3: 1.0}), "blocks is {3: 1.0}; give factors by the names of blocks"),
    ],
)
def test_what_is_of_another_kind_is_refused_at_once(made, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made()
    assert said in str(caught.value)


@pytest.mark.parametrize("steps", ["late", 3, {"start": 0.5}])
def test_steps_that_are_no_numbers(steps) -> None:
    with pytest.raises(ConfigError, match=r"^steps is .*; give Window\(0\.5, 1\.0\), Ramp"):
        Scale(steps=steps)
    with pytest.raises(ConfigError, match="A scale is 'late'; it must be a finite number"):
        Scale(steps=["late"])


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    assert Scale(np.float32(0.5)) == Scale(0.5) and as_scale(torch.tensor(0.5)) == Scale(0.5)
    assert Scale(images=np.array([1.0, 0.0])) == Scale(images=torch.tensor([1.0, 0.0])) == Scale(images=[1.0, 0.0])
    assert Scale(steps=np.array([1.0, 0.5])) == Scale(steps=(1.0, 0.5))
    assert as_scale({"up": np.float32(0.5)}) == Scale(blocks={"up": 0.5})
    assert as_scale(np.ones(26)) == Scale(blocks=(1.0,) * 26)
    for value in (np.bool_(True), torch.tensor([float("nan")]), 1e39, np.float32("inf")):
        with pytest.raises(ConfigError, match=r"must be a finite number|has 12, 17, 20 or 26"):
            as_scale(value)


@pytest.mark.parametrize("blocks", [{"up": 0.0}, {"unet": 0.5}, {"in": 0.0}, [1.0] * 26])
def test_words_of_a_unet_are_refused_where_there_is_none(blocks) -> None:
    with pytest.raises(ConfigError, match=r"No adapted layer is in block|A list of block weights is for the UNet"):
        block_factors(Scale(blocks=blocks), [("model", "blocks.0.attn.qkv")])
    assert block_factors(Scale(blocks=blocks), [("text_encoder", "layers.0.fc1")])


def test_block_lists_for_sdxl() -> None:
    """As A1111's extension has them: BASE, IN04, 05, 07, 08, M00 and OUT00 to 05, or all of IN00 to 08 and OUT00 to 08."""
    layers = {
        "conv_in": (0, 1), "down_blocks.0.resnets.0.conv1": (0, 2), "down_blocks.1.attentions.0.proj_in": (1, 5),
        "down_blocks.1.attentions.1.proj_in": (2, 6), "down_blocks.2.attentions.1.proj_in": (4, 9),
        "mid_block.attentions.0.proj_in": (5, 10), "up_blocks.0.attentions.0.proj_in": (6, 11),
        "up_blocks.1.attentions.2.proj_in": (11, 16), "up_blocks.2.resnets.2.conv1": (0, 19),
    }  # fmt: skip
    for position, count in enumerate((12, 20)):
        found = block_factors(Scale(blocks=tuple(range(count))), [("unet", layer) for layer in layers])
        assert {layer: found["unet", layer] for layer in layers} == {
            n: places[position] for n, places in layers.items()
        }
        assert block_factors(Scale(blocks=(0.5, *[1.0] * (count - 1))), [("text_encoder_2", "a.q_proj")]) == {
            ("text_encoder_2", "a.q_proj"): 0.5
        }


def test_a_block_list_of_the_other_family_is_refused() -> None:
    """Blocks that it lacks would get 0: of an adapter for Stable Diffusion 1.x a list of 12 leaves little."""
    sd = [("unet", f"{name}.attentions.0.proj_in") for name in ("down_blocks.0", "mid_block", "up_blocks.3")]
    sd += [("unet", "down_blocks.3.resnets.0.conv1"), ("text_encoder", "layers.0.fc1")]
    with pytest.raises(
        ConfigError, match=r"list of 12 block weights has no number for IN01, OUT09, .*Give 17 or 26 numbers"
    ):
        block_factors(Scale(blocks=(1.0,) * 12), sd)
    with pytest.raises(ConfigError, match=r"list of 20 block weights has no number for OUT09, .*Give 17 or 26 numbers"):
        block_factors(Scale(blocks=(1.0,) * 20), sd)
    assert block_factors(Scale(blocks=(1.0,) * 17), sd) == {layer: float("resnets" not in layer[1]) for layer in sd}
    xl = [("unet", f"{name}.attentions.0.proj_in") for name in ("down_blocks.2", "mid_block", "up_blocks.0")]
    with pytest.raises(ConfigError, match=r"list of 17 block weights has no number for OUT00, .*Give 12 or 20 or 26"):
        block_factors(Scale(blocks=(1.0,) * 17), xl)
    assert set(block_factors(Scale(blocks=(1.0,) * 12), xl).values()) == {1.0}


@pytest.mark.parametrize("given", [None, "much", float("nan"), True])
def test_a_function_of_the_steps_gives_numbers(given: object) -> None:
    with pytest.raises(
        ConfigError, match=rf"steps gives {given!r} at 50% of the sampling; it must give a finite number"
    ):
        Scale(steps=lambda progress: given).at(0.5)
    assert Scale(2.0, steps=lambda progress: torch.tensor(0.5)).at(0.5) == 1.0
