"""Pictures kept apart: which, what they say, and what a run does with it."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from visionlora.pipelines import sd_learning, sd_ready
from visionlora.pipelines.train_sd import train_sd

import visionlora as vl
from visionlora.data.cache import TensorCache
from visionlora.data.folder import ImageFolder, ImageItem, read_image_folder
from visionlora.diffusion import validation
from visionlora.diffusion.encode import Plan, encode_dataset
from visionlora.diffusion.objective import fixed_losses
from visionlora.diffusion.validation import (
    LEVELS,
    MOST,
    Evaluation,
    Validation,
    hold_out,
    judges,
    losses_at,
    verdict,
)
from visionlora.errors import ConfigError, DataError
from visionlora.loaders import load_adapter
from visionlora.models.base import open_base

from ...doubles import Ears

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' schedulers


def folder_of(count: int) -> ImageFolder:
    items = tuple(ImageItem(Path(f"{i}.png"), "a", f"{i * 7919 % 1009:04d}") for i in range(count))
    return ImageFolder(Path(), items, (), "")


@given(st.integers(2, 60), st.floats(0.01, 0.9), st.integers(0, 100))
def test_every_picture_is_on_one_side_whatever_the_order(count: int, share: float, seed: int) -> None:
    whole = folder_of(count)
    if max(1, round(share * count)) >= count:
        with pytest.raises(DataError, match="leaves none to train on"):
            hold_out(whole, share, seed)
        return
    kept, apart = hold_out(whole, share, seed)
    assert len(apart) == max(1, round(share * count))
    assert set(kept.items) | set(apart) == set(whole.items) and not set(kept.items) & set(apart)
    shuffled = list(whole.items)
    random.Random(seed).shuffle(shuffled)
    assert set(hold_out(ImageFolder(Path(), tuple(shuffled), (), ""), share, seed)[1]) == set(apart)


def test_some_are_never_kept_apart() -> None:
    whole = folder_of(10)
    usual = hold_out(whole, 0.4, 0)[1]
    never = [whole.items.index(item) for item in usual[:2]]
    kept, apart = hold_out(whole, 0.4, 0, never)
    assert len(apart) == 4 and not {whole.items[i] for i in never} & set(apart)
    assert set(usual[2:]) < set(apart) and len(kept.items) == 6
    assert len(hold_out(whole, 0.4, 0, range(9))[1]) == 1


@given(st.integers(4, 40), st.floats(0.05, 0.6), st.integers(0, 20), st.data())
def test_pictures_that_look_alike_stay_together(count: int, share: float, seed: int, data: st.DataObject) -> None:
    """As far as they fit, the others are those that would be kept apart anyway."""
    size = data.draw(st.integers(2, count - 1))
    whole = dataclasses.replace(folder_of(count), alike=(tuple(range(size)),))
    if max(1, round(share * count)) >= count:
        return
    kept, apart = hold_out(whole, share, seed)
    sides = {item in apart for item in whole.items[:size]}
    assert len(sides) == 1 and 1 <= len(apart) <= max(1, round(share * count)) and not kept.alike
    usual = set(hold_out(folder_of(count), share, seed)[1])
    if not usual & set(whole.items[:size]):
        assert set(apart) == usual


def test_pictures_like_those_that_were_learned_are_not_kept_apart() -> None:
    whole = dataclasses.replace(folder_of(6), alike=((0, 3), (1, 2)))
    assert {whole.items.index(item) for item in hold_out(whole, 0.5, 0, never=[0, 2])[1]} == {4, 5}
    with pytest.raises(DataError, match=r"val_share 0\.5: too many of the 6 pictures look alike.*validation=FOLDER"):
        hold_out(whole, 0.5, 0, never=[0, 1, 4, 5])


def test_sets_that_are_larger_than_the_share() -> None:
    """The smallest is kept apart, unless nothing would be left."""
    whole = dataclasses.replace(folder_of(10), alike=(tuple(range(6)), tuple(range(6, 10))))
    assert set(hold_out(whole, 0.2, 0)[1]) == set(whole.items[6:])
    with pytest.raises(DataError, match="look alike"):
        hold_out(dataclasses.replace(whole, alike=(tuple(range(10)),)), 0.2, 0)


def test_no_more_are_kept_apart_than_judge() -> None:
    kept, apart = hold_out(folder_of(400), 0.5, 0)
    assert len(apart) == MOST and len(kept.items) == 400 - MOST


@given(st.integers(1, 200), st.integers(0, 20))
def test_those_that_judge_are_chosen_by_content(count: int, seed: int) -> None:
    whole = folder_of(count).items
    found = judges(whole)
    assert len(found) == min(count, MOST) and list(found) == [item for item in whole if item in set(found)]
    names = list(range(count))
    random.Random(seed).shuffle(names)
    renamed = sorted(
        (dataclasses.replace(item, path=Path(f"{n:03d}.png")) for n, item in zip(names, whole, strict=True)),
        key=lambda item: item.path,
    )
    assert {item.sha256 for item in judges(renamed)} == {item.sha256 for item in found}


def test_the_verdict_names_what_happened() -> None:
    def said(*losses: float) -> str:
        return verdict([Evaluation(10 * i, loss, {}) for i, loss in enumerate(losses)])

    assert said(1.0, 0.8, 0.6).endswith("0.6000 at the end.")
    assert "by heart" in said(1.0, 0.6, 0.9) and "step 10" in said(1.0, 0.6, 0.9)
    assert "never got better" in said(1.0, 1.1, 1.2)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten plain pictures of different colours, which a model can learn in common."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for i in range(10):
        Image.fromarray(np.full((32, 32, 3), (25 * i, 90, 255 - 25 * i), np.uint8)).save(folder / f"{i}.png")
    return folder


def run(tiny_model: Path, images: Path, output: Path, **settings: object) -> tuple[list[str], Path]:
    fixed = {"rank": 2, "steps": 20, "batch_size": 4, "sample_columns": 1, "sample_steps": 1, "learning_rate": 0.01}
    config = vl.TrainSDConfig(images=str(images), model=str(tiny_model), output=str(output), **{**fixed, **settings})
    ears = Ears()
    return ears.lines, train_sd(config, ears).folder


def test_a_run_looks_at_them_and_keeps_the_best(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    lines, folder = run(tiny_model, pictures, tmp_path / "run", val_share=0.2, checkpoints=4)
    assert "8 pictures to train on, 2 apart to see whether it learned." in lines
    found = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [e["step"] for e in found] == [0, 5, 10, 15, 20]
    assert list(found[0]["by_level"]) == ["100", "300", "500", "700", "900"]
    best = min(found, key=lambda e: e["loss"])
    assert best["step"] > 0, "it learned something that holds for pictures it never saw"
    assert load_adapter(folder / "checkpoints" / "best.safetensors").info["training"]["steps"] == best["step"]
    assert any(line.startswith("Validation loss:") for line in lines)
    _, other = run(tiny_model, pictures, tmp_path / "other", val_share=0.2, checkpoints=4, rank=1)
    again = [json.loads(line) for line in (other / "validation.jsonl").read_text().splitlines()]
    assert again[0] == found[0], "before training, all runs see the same loss"


def test_a_run_that_learns_some_noise_levels_is_judged_by_them(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    _, folder = run(tiny_model, pictures, tmp_path / "run", val_share=0.2, steps=1, timestep_range=(0, 400))
    found = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert all(list(e["by_level"]) == ["100", "300"] for e in found) and len(found) == 2
    assert found[0]["loss"] == pytest.approx(sum(found[0]["by_level"].values()) / 2)


def test_patience_ends_a_run_that_gets_no_better(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    lines, folder = run(
        tiny_model, pictures, tmp_path / "run", val_share=0.2, checkpoints=20, learning_rate=1e-20, patience=3
    )
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) < 20 and any("no better on the validation pictures since step" in line for line in lines)
    assert (folder / "adapter.safetensors").exists() and (folder / "grid.png").exists()


def test_a_folder_of_its_own_must_not_hold_what_is_trained_on(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (32, 32), "red").save(other / "a.png")
    lines, _ = run(tiny_model, pictures, tmp_path / "run", validation=str(other), steps=2)
    assert "10 pictures to train on, 1 apart to see whether it learned." in lines
    (other / "b.png").write_bytes((pictures / "3.png").read_bytes())
    with pytest.raises(DataError, match=r"1 pictures of .* are also among those to train on \(first b.png\)"):
        run(tiny_model, pictures, tmp_path / "run2", validation=str(other), steps=2)
    assert not (tmp_path / "run2").exists()


def test_what_is_masked_counts_as_in_training(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for i in range(3):
        mask = Image.new("L", (32, 32), 0)
        mask.paste(255, (0, 0, 32, 4))
        mask.save(tmp_path / "masks" / f"{i}.png")
    base, cache = open_base(str(tiny_model)), TensorCache(tmp_path / "c")

    def loss(masks: str | None, unmasked_weight: float) -> float:
        data = encode_dataset(base, read_image_folder(dogs, masks=masks).items, 32, cache)
        found = Validation(data, base.noise_scheduler, 0, unmasked_weight=unmasked_weight)
        return found.evaluate(base.pipe.unet, 0).loss

    whole, masks = loss(None, 0.0), str(tmp_path / "masks")
    assert loss(masks, 1.0) == pytest.approx(whole, rel=1e-5)
    assert len({round(loss(masks, weight), 4) for weight in (0.0, 0.1, 1.0)}) == 3


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_share_the_pictures(tiny_model: Path, dogs: Path, tmp_path: Path, processes: int) -> None:
    """Of each size; together they find what one alone would."""
    Image.effect_noise((64, 32), 40).convert("RGB").save(dogs / "wide.png")
    base = open_base(str(tiny_model))
    data = encode_dataset(base, read_image_folder(dogs).items, Plan(32, 8), TensorCache(tmp_path / "c"))
    assert len({f.bucket for f in data.framings}) == 2

    def losses(**share: int) -> torch.Tensor:
        with torch.no_grad():
            return losses_at(base.pipe.unet, base.noise_scheduler, data, (100, 900), 0, **share)

    shares = torch.stack([losses(first=k, every=processes) for k in range(processes)])
    assert ((shares != 0).sum(0) == 1).all()
    torch.testing.assert_close(shares.sum(0), losses(), rtol=1e-5, atol=0)


def test_judging_needs_no_more_memory_than_learning(
    tiny_model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pictures went through the model at once, where there was memory to learn from one."""
    sizes: list[int] = []

    def counted(unet: torch.nn.Module, noise_scheduler: object, latents: torch.Tensor, *more: object) -> torch.Tensor:
        hook = unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        found = fixed_losses(unet, noise_scheduler, latents, *more)
        hook.remove()
        return found

    monkeypatch.setattr(validation, "fixed_losses", counted)
    run(tiny_model, pictures, tmp_path / "run", val_share=0.5, steps=1, batch_size=1, checkpoints=1)
    assert sizes == [4, 1] * len(LEVELS) * 2, "5 pictures, before and after"


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> list[Validation]:
    """What the runs judge by."""
    seen: list[Validation] = []
    monkeypatch.setattr(sd_learning, "Validation", lambda *more: seen.append(Validation(*more)) or seen[-1])
    return seen


def test_more_pictures_than_judge_are_said(
    tiny_model: Path, pictures: Path, tmp_path: Path, apart: list[Validation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were first by name may be of one kind alone."""
    monkeypatch.setattr(validation, "MOST", 2)
    monkeypatch.setattr(sd_ready, "MOST", 2)
    lines, _ = run(tiny_model, pictures, tmp_path / "run", val_share=0.5, steps=1)
    assert "val_share 0.5 of 10 pictures would be 5: 2 tell as much, so the others are trained on." in lines
    assert "8 pictures to train on, 2 apart to see whether it learned." in lines
    other = tmp_path / "other"
    other.mkdir()
    for i in range(5):
        Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(other / f"{i}.png")
    lines, _ = run(tiny_model, pictures, tmp_path / "run2", validation=str(other), steps=1)
    assert f"2 of the 5 pictures of {other} judge the run, chosen by their contents." in lines
    every = read_image_folder(other).items
    least = sorted(item.sha256 for item in every)[:2]
    assert sorted(item.sha256 for item in apart[1].data.items) == least


def test_captions_are_those_of_training(
    tiny_model: Path, pictures: Path, tmp_path: Path, apart: list[Validation]
) -> None:
    said, _ = run(
        tiny_model, pictures, tmp_path / "run", val_share=0.2, steps=1, prompt="a {b|c} d e f g h i j k l m n"
    )
    assert not any("longer than the model reads" in line for line in said)
    assert set(apart[0].data.captions) < {"", "a b d e f g h i j k l m n", "a c d e f g h i j k l m n"}


def test_masks_of_a_folder_of_its_own(
    tiny_model: Path, pictures: Path, tmp_path: Path, apart: list[Validation]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for folder in (pictures, other):
        for i in range(10 if folder == pictures else 1):
            picture = Image.new("RGBA", (32, 32), (20 * i, 0, folder == other, 255))
            picture.paste((0, 0, 0, 0), (0, 0, 32, 8))
            picture.save(folder / f"{i}.png")
    run(tiny_model, pictures, tmp_path / "run", validation=str(other), steps=1, masks="alpha", unmasked_weight=0.5)
    assert apart[0].data.mask(0, 0).min() == 0 and apart[0].unmasked_weight == 0.5
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(10):
        Image.new("L", (32, 32), 255).save(masks / f"{i}.png")
    said, _ = run(tiny_model, pictures, tmp_path / "run2", validation=str(other), steps=1, masks=str(masks))
    assert apart[1].data.mask(0, 0) is None
    assert any("are judged whole" in line for line in said)


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="it needs pictures that are not trained on"):
        vl.TrainSDConfig(images="x", patience=2)
    with pytest.raises(ConfigError, match="a validation folder is given"):
        vl.TrainSDConfig(images="x", val_share=0.1, validation="y")
