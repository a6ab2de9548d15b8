"""Random changes of pictures: each by its own seed, and mixed in known shares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionlora.data.preprocess import Preprocessing
from visionlora.vision.augment import Augmentation, beta, mixed

PREPROCESSING = Preprocessing(16, crop_pct=0.8)


def pictures(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["none", "light", "affine", "trivial", "rand"])
def test_a_picture_depends_on_its_own_seed_alone(kind: str) -> None:
    augment, x = Augmentation(PREPROCESSING, kind, flip=True, erasing=0.5), pictures(4)
    whole = augment(x, [5, 6, 7, 8])
    assert whole.shape == (4, 3, 16, 16) and whole.dtype == torch.float32
    torch.rand(3)
    assert torch.equal(augment(x[2:3], [7])[0], whole[2])
    assert not torch.equal(augment(x[2:3], [9])[0], whole[2])


def test_without_any_change_it_is_the_evaluation() -> None:
    x = pictures(2)
    plain = Augmentation(PREPROCESSING, "none", flip=False)(x, [0, 1])
    assert torch.equal(plain, PREPROCESSING.normalised(PREPROCESSING.cropped(x)))


def test_half_of_the_pictures_are_mirrored_and_the_global_generator_is_left_alone() -> None:
    x = pictures(1).expand(200, -1, -1, -1)
    before = torch.get_rng_state()
    flipped = Augmentation(PREPROCESSING, "none", flip=True)(x, range(200))
    assert torch.equal(torch.get_rng_state(), before)
    plain = PREPROCESSING.normalised(PREPROCESSING.cropped(x))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, plain, strict=True)]
    assert 70 < sum(mirrored) < 130
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, plain, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 6), st.sampled_from([(0.3, 0.0), (0.0, 1.0), (0.4, 1.0)]))
def test_targets_are_mixed_as_the_pixels_are(seed: int, n: int, strengths: tuple[float, float]) -> None:
    # Each picture is filled with its own number, so the mean of its pixels tells the share of every picture in it.
    x = torch.arange(n).float()[:, None, None, None].expand(n, 3, 8, 8)
    got, targets = mixed(x, torch.eye(n), *strengths, torch.Generator().manual_seed(seed))
    assert torch.allclose(got.mean((1, 2, 3)), targets @ torch.arange(n).float(), atol=1e-5)
    assert torch.allclose(targets.sum(1), torch.ones(n))


def test_one_picture_has_nothing_to_be_mixed_with() -> None:
    x, targets = torch.rand(1, 3, 4, 4), torch.eye(1)
    got, kept = mixed(x, targets, 1.0, 1.0, torch.Generator())
    assert got is x and kept is targets


def test_beta_has_its_mean_and_spread() -> None:
    generator = torch.Generator().manual_seed(1)
    draws = torch.tensor([beta(0.5, generator) for _ in range(4000)])
    assert draws.mean().item() == pytest.approx(0.5, abs=0.02)
    assert draws.var().item() == pytest.approx(0.125, abs=0.01)  # 1 / (4 (2a + 1))


def test_affine_keeps_a_plain_picture_and_puts_its_ground_around_a_shape() -> None:
    plain = torch.full((1, 3, 20, 20), 200, dtype=torch.uint8)
    shape = plain.clone()
    shape[..., 5:15, 5:15] = 10
    augment = Augmentation(PREPROCESSING, "affine", flip=False)
    for seed in range(20):
        torch.manual_seed(seed)
        assert torch.equal(augment.moved(plain[0]), plain[0])
        moved = augment.moved(shape[0])
        assert (moved[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 200).all() and moved.min() < 30
