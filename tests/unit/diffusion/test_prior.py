"""Pictures of the class that a subject belongs to."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from visionlora.diffusion.prior import check_class_folder, class_pictures, draw_missing
from visionlora.diffusion.recipe import read_recipe
from visionlora.diffusion.sampling import SamplingConfig, draw
from visionlora.errors import DataError
from visionlora.models.base import open_base

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' schedulers


def test_a_folder_is_filled_and_what_is_there_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    base, folder, told = open_base(str(tiny_model)), tmp_path / "dogs", []
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "own.png")

    def fill(count: int) -> int:
        there = len(class_pictures(folder, "a dog", False, base)[0])
        return draw_missing(
            base, folder, "a dog", there, count, 32, 1.0, 7, lambda done, total: told.append((done, total))
        )

    assert fill(3) == 2 and told == [(2, 3), (3, 3)]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert fill(3) == 0 and fill(4) == 1
    assert all((folder / name).read_bytes() == data for name, data in before.items())
    drawn = [read_recipe(p) for p in sorted(folder.glob("a-dog-*.png"))]
    assert [(r.prompt, r.seed) for r in drawn] == [("a dog", seed) for seed in (7, 8, 9)]
    items, others = class_pictures(folder, "a dog", False, base)
    assert len(items) == 4 and not others and {item.caption for item in items} == {"a dog"}


def test_pictures_of_another_class_are_not_taken_for_this_one(tiny_model: Path, tmp_path: Path) -> None:
    """Red hearts would have been learned as dogs."""
    base = open_base(str(tiny_model))
    assert (
        class_pictures(tmp_path, "a dog", False, base) == class_pictures(tmp_path / "no", "a", False, base) == ((), 0)
    )
    assert draw_missing(base, tmp_path, "a red heart", 0, 2, 32, 1.0, 0) == 2
    assert class_pictures(tmp_path, "a dog", False, base) == ((), 2)
    assert draw_missing(base, tmp_path, "a dog", 0, 2, 32, 1.0, 0) == 2
    items, others = class_pictures(tmp_path, "a dog", False, base)
    assert others == 2 and all(item.path.name.startswith("a-dog-") for item in items) and len(items) == 2
    elsewhere = replace(base, id="other/one")
    assert class_pictures(tmp_path, "a dog", False, elsewhere) == ((), 4)
    assert class_pictures(tmp_path, "a dog", False, replace(base, id=f"./here/{tiny_model.name}"))[1] == 2


def test_a_drawn_picture_says_how_far_its_text_was_read(tiny_model: Path, tmp_path: Path) -> None:
    """Other pictures had the same name, and one was taken for the other."""
    base = open_base(str(tiny_model))
    for clip_skip in (1, 2):
        assert draw_missing(base.reading(clip_skip), tmp_path / str(clip_skip), "a dog", 0, 1, 32, 1.0, 0) == 1
    one, two = (next((tmp_path / name).iterdir()) for name in ("1", "2"))
    assert one.name != two.name and read_recipe(two).clip_skip == 2
    (again,) = draw(base.reading(2), ["a dog"], 32, SamplingConfig(read_recipe(two).steps, 1.0, 0))
    assert again.tobytes() == Image.open(two).tobytes()


def test_the_subject_is_not_its_own_class(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    dog = str(tmp_path / "dog")
    check_class_folder(tmp_path / "dogs", ["", dog])
    with pytest.raises(DataError, match="which is also the folder to learn from: what is learned would be held back"):
        check_class_folder(tmp_path / "x" / ".." / "dog", ["elsewhere", dog])
    with pytest.raises(DataError, match=r"which lies in .*dog, the folder to learn from"):
        check_class_folder(tmp_path / "dog" / "class", [dog])
    with pytest.raises(DataError, match=r"which lies around .*dog, the folder to learn from"):
        check_class_folder(tmp_path, [dog])
