"""Pictures of the class that a subject belongs to."""

from pathlib import Path

import pytest
from PIL import Image

from visionlora.diffusion.prior import check_class_folder, class_pictures, draw_missing
from visionlora.diffusion.recipe import read_recipe
from visionlora.errors import DataError
from visionlora.models.base import open_base

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' schedulers


def test_a_folder_is_filled_and_what_is_there_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    base, folder, told = open_base(str(tiny_model)), tmp_path / "dogs", []
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "own.png")

    def fill(count: int) -> int:
        return draw_missing(base, folder, "a dog", count, 32, 1.0, 7, lambda done, total: told.append((done, total)))

    assert fill(3) == 2 and told == [(2, 3), (3, 3)]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert fill(3) == 0 and fill(4) == 1
    assert all((folder / name).read_bytes() == data for name, data in before.items())
    drawn = [read_recipe(p) for p in sorted(folder.glob("a-dog-*.png"))]
    assert [(r.prompt, r.seed) for r in drawn] == [("a dog", seed) for seed in (7, 8, 9)]
    items = class_pictures(folder, "a dog", skip_broken=False)
    assert len(items) == 4 and {item.caption for item in items} == {"a dog"}


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
