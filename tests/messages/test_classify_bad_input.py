"""Bad input to classify, predict and export: what a person reads, and that nothing was written."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from visionlora.pipelines.classify_dry_run import classify_dry_run
from visionlora.pipelines.export import export
from visionlora.pipelines.predict import predict

import visionlora as vl
from visionlora.config import ClassifyConfig
from visionlora.errors import VisionLoRAError

from ..doubles import Ears


def check_refused(call, folder: Path, *words: str) -> None:
    """One message for a wrong use with all the words, and the folder is as before."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(VisionLoRAError) as caught:
        call()
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in:\n{caught.value}"
    assert sorted(folder.rglob("*")) == before


@pytest.fixture
def own(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the shapes that a test may spoil."""
    return Path(shutil.copytree(shapes, tmp_path / "own"))


@pytest.fixture
def classify(own: Path, tiny_vit: Path, tmp_path: Path):
    """Runs it on the copy; keyword arguments become settings."""

    def run(**settings: object) -> None:
        vl.classify(
            ClassifyConfig(
                **{"images": str(own), "model": str(tiny_vit), "steps": 1, "output": str(tmp_path / "run"), **settings}
            )
        )

    return run


def one_class(own: Path) -> None:
    shutil.rmtree(own / "cross"), shutil.rmtree(own / "square")


def empty_class(own: Path) -> None:
    (own / "triangle").mkdir()


def broken_picture(own: Path) -> None:
    (own / "cross" / "00.png").write_bytes(b"no picture")


def in_two_classes(own: Path) -> None:
    shutil.copy(own / "cross" / "00.png", own / "square" / "copy.png")


def names_alike(own: Path) -> None:
    (own / "Cross").mkdir()
    Image.new("RGB", (8, 8)).save(own / "Cross" / "a.png")


def not_utf8(own: Path) -> None:
    (own / "cross").rename(own / os.fsdecode(b"cr\xf6ss"))


def no_pictures(own: Path) -> None:
    shutil.rmtree(own)
    own.mkdir()


def no_classes(own: Path) -> None:
    for picture in list(own.glob("*/*.png")):
        picture.rename(own / f"{picture.parent.name}-{picture.name}")
    for folder in list(own.iterdir()):
        if folder.is_dir():
            folder.rmdir()


SPOILED = {
    one_class: ["one class", "circle"],
    empty_class: ["triangle"],
    broken_picture: ["cross/00.png", "is not a picture", "--skip-broken"],
    in_two_classes: ["cross/00.png", "square/copy.png"],
    names_alike: ["cross", "Cross"],
    not_utf8: ["cr\\udcf6ss", "not UTF-8", "rename"],
    no_pictures: ["no pictures"],
    no_classes: ["class"],
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_pictures_that_cannot_be_used(spoil, classify, own: Path, tmp_path: Path) -> None:
    spoil(own)
    check_refused(classify, tmp_path, *SPOILED[spoil])


SETTINGS = {
    "no images": ({"images": ""}, ["images is ''"]),
    "no such folder": ({"images": "nowhere"}, ["nowhere"]),
    "no such model": ({"model": "vit_smal_patch16_224"}, ["Did you mean 'vit_small_patch16_224'?"]),
    "steps and epochs": ({"epochs": 2.0}, ["give epochs or steps, not both"]),
    "shares": ({"val_share": 0.7, "test_share": 0.5}, ["with val_share it must stay below 1"]),
    "no validation": ({"val_share": 0.0}, ["no validation pictures"]),
    "augment": ({"augment": "trivail"}, ["Did you mean 'trivial'?"]),
    "select": ({"select_by": "top2"}, ["Did you mean 'top1'?"]),
    "select for several labels": ({"select_by": "map"}, ["'map' does not apply to pictures with one label each"]),
    "baseline": ({"baselines": ("prob",)}, ["Did you mean 'probe'?"]),
    "weights of a class": ({"class_weights": {"circel": 2.0}}, ["no class", "Did you mean 'circle'?"]),
    "weight": ({"class_weights": {"circle": -1.0}}, ["it must be positive"]),
    "weights": ({"class_weights": "atuo"}, ["write auto, or a mapping"]),
    "targets": ({"targets": "atn.q"}, ["Did you mean 'attn.q'?"]),
    "the head": ({"targets": "head"}, ["Targets head reach no layer that can be adapted: head (it trains in full)"]),
    "rank": ({"rank": 500}, ["Rank 500 is larger than layer"]),
    "two rates": ({"find_rate": True, "learning_rate": 1.0}, ["leave one of them out"]),
    "a rate for the head": ({"find_rate": True, "head_learning_rate": 1.0}, ["find_rate finds one for the head too"]),
    "adalora averaged": ({"method": "adalora", "ema_decay": 0.9}, ["adalora prunes what it averages"]),
    "adalora stopped": ({"method": "adalora", "patience": 2}, ["adalora reaches its budget in the end alone"]),
    "start": ({"start_from": "nowhere.safetensors"}, ["There is no adapter file at nowhere.safetensors"]),
    "no such table": ({"table": "nowhere.csv"}, ["nowhere.csv"]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be(case: str, classify, tmp_path: Path) -> None:
    settings, words = SETTINGS[case]
    check_refused(lambda: classify(**settings), tmp_path, *words)


def test_pictures_that_all_look_alike(classify, own: Path, tmp_path: Path) -> None:
    """Parts before one camera: they are tied to each other, and there is a way to say that they are not the same."""
    for k, path in enumerate(sorted(own.glob("*/*.png"))):
        pixels = np.full((32, 32, 3), 128, np.uint8)
        pixels[:, :16] = 200  # what stands behind them all
        pixels[k % 30, k // 30] = 0
        Image.fromarray(pixels).save(path)
    check_refused(classify, tmp_path, "60 of 60 pictures are tied to each other", "near_duplicates=false")
    classify(near_duplicates=False, baselines=("none",))
    assert (tmp_path / "run" / "adapter.safetensors").exists()


def test_broken_pictures_are_left_out_on_request(classify, own: Path, tmp_path: Path) -> None:
    broken_picture(own)
    classify(skip_broken=True, baselines=("none",))
    assert "cross/00.png" in (tmp_path / "run" / "report.html").read_text()


def test_a_picture_saved_again_in_another_class_is_named(own: Path, tiny_vit: Path) -> None:
    Image.open(own / "cross" / "00.png").save(own / "square" / "copy.jpg", quality=90)
    ears = Ears()
    classify_dry_run(ClassifyConfig(images=str(own), model=str(tiny_vit), steps=1), ears)
    assert (
        "1 picture looks like one of another class, so that one of the labels may be wrong: cross/00.png (cross) and "
        "square/copy.jpg (square)"
    ) in ears.lines


def test_what_the_data_tears_apart_is_not_said_to_stay_together(own: Path, tiny_vit: Path, tmp_path: Path) -> None:
    for side in ("train", "test"):
        shutil.copytree(own, tmp_path / "named" / side)
    ears = Ears()
    classify_dry_run(ClassifyConfig(images=str(tmp_path / "named"), model=str(tiny_vit), steps=1), ears)
    said = "\n".join(ears.lines)
    assert "60 pictures are linked with one of another split" in said and "stay with others on one side" not in said


def test_a_used_output_folder_is_refused(classify, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    check_refused(classify, tmp_path, "is not empty", "run-2")


@pytest.fixture(scope="module")
def finished(shapes: Path, tiny_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, on a copy of the backbone that can go away."""
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_vit, root / "vit")
    vl.classify(
        ClassifyConfig(
            images=str(shapes), model=str(root / "vit"), steps=1, output=str(root / "run"), baselines=("none",)
        )
    )
    return root


def test_predict_explains_what_it_cannot_do(finished: Path, shapes: Path, tmp_path: Path) -> None:
    run = finished / "run"
    (tmp_path / "none").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "there.csv").write_text("mine")
    good = shapes / "cross" / "00.png"
    check_refused(lambda: predict(run, []), tmp_path, "no pictures")
    check_refused(lambda: predict(run, [tmp_path / "none"]), tmp_path, "no pictures")
    check_refused(lambda: predict(run, [shapes / "cros"]), tmp_path, "There is nothing at", "Did you mean 'cross'?")
    check_refused(lambda: predict(run, [tmp_path / "there.csv"]), tmp_path, "has no column of picture paths")
    check_refused(lambda: predict(run, [good], tmp_path / "p.txt"), tmp_path, ".csv, .json, .parquet")
    check_refused(lambda: predict(run, [good], tmp_path / "there.csv"), tmp_path, "exists already", "--overwrite")
    check_refused(lambda: predict(run, [good], tmp_path / "bad.png" / "p.csv"), tmp_path, "bad.png is a file")
    check_refused(lambda: predict(run, [good], tmp_path / "none", overwrite=True), tmp_path, "none/predictions.csv")
    check_refused(
        lambda: predict(run, [good, tmp_path / "bad.png"], tmp_path / "p.csv"),
        tmp_path,
        "1 of 2 pictures",
        "--skip-broken",
    )
    check_refused(lambda: predict(run / "nowhere", [good]), tmp_path, "nowhere")
    left = predict(run, [good, tmp_path / "bad.png"], tmp_path / "p.csv", skip_broken=True)
    assert len(left) == 1 and (tmp_path / "p.csv").exists()
    predict(run, [good], tmp_path / "new" / "folder" / "p.csv")
    assert (tmp_path / "new" / "folder" / "p.csv").exists()


def test_predict_leaves_nothing_out_in_silence(
    finished: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return opened(path)

    shutil.move(own / "square", own / "cross" / "locked")
    (own / "cross" / "circles").symlink_to(own / "circle")
    (own / "cross" / "phone.heic").touch()
    opened, run, told = os.scandir, finished / "run", Ears()
    monkeypatch.setattr(os, "scandir", scandir)
    where, why = tmp_path / "p.csv", f"{own}/cross: locked cannot be opened (Permission denied); check its permissions"
    check_refused(lambda: predict(run, own / "cross", where), tmp_path, why, "--skip-broken")
    assert len(predict(run, own / "cross", where, skip_broken=True, listener=told)) == 20
    assert f"{own}/cross: left out, linked folders are not entered: circles" in told.lines
    assert f"{own}/cross: left out, export as JPEG or PNG to use: phone.heic" in told.lines
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "circle").symlink_to(own / "circle")
    check_refused(lambda: predict(run, tmp_path / "links"), tmp_path, "holds only linked folders", "circle; copy them")


@pytest.mark.parametrize(("name", "value"), [("top_k", 0), ("batch_size", 0), ("threshold", 2.0)])
def test_predict_looks_at_what_is_asked_before_anything_is_opened(name: str, value: float, tmp_path: Path) -> None:
    asked = {name: value}
    check_refused(
        lambda: predict(tmp_path / "no", [tmp_path / "no.png"], **asked), tmp_path, f"{name} is {value:g}; it"
    )


def test_a_wrong_or_missing_backbone_is_refused(finished: Path, shapes: Path, tmp_path: Path) -> None:
    good = shapes / "cross" / "00.png"
    check_refused(lambda: predict(finished / "run", [good], model="emoji-vit"), tmp_path, "another architecture")
    moved = finished / "vit"
    moved.rename(finished / "moved")
    try:
        said = f"The backbone that the adapter names, {moved}, is not there: say with --model where it is now."
        check_refused(lambda: predict(finished / "run", [good]), tmp_path, said)
        check_refused(lambda: export(finished / "run", tmp_path / "m.onnx", "onnx"), tmp_path, said)
        assert predict(finished / "run", [good], model=str(finished / "moved"))
    finally:
        (finished / "moved").rename(moved)


def test_a_file_is_no_backbone(classify, tiny_vit: Path, tmp_path: Path) -> None:
    file = tiny_vit / "model.safetensors"
    check_refused(lambda: classify(model=str(file)), tmp_path, f"{file} is a file", "--weights", "start_from=")


def test_export_explains_what_it_cannot_do(finished: Path, tmp_path: Path) -> None:
    run = finished / "run"
    check_refused(lambda: export(run, tmp_path / "m", "onx"), tmp_path, "Did you mean 'onnx'?")
    style = Path(__file__).parents[2] / "assets" / "adapters" / "fxemoji"
    check_refused(
        lambda: export(style, tmp_path / "m", "timm"), tmp_path, f"{style} is an adapter for Stable Diffusion"
    )
    check_refused(
        lambda: export(run, tmp_path / "m", "transformers"), tmp_path, "is a model of timm", "Export it to timm"
    )


def test_an_export_does_not_take_a_folder_for_a_file(finished: Path, tmp_path: Path) -> None:
    run = finished / "run"
    (tmp_path / "file").write_text("mine")
    check_refused(lambda: export(run, tmp_path / "file", "timm", overwrite=True), tmp_path, "is a file", "to a folder")
    check_refused(lambda: export(run, tmp_path, "onnx", overwrite=True), tmp_path, "is a folder", "to a file")


def test_replacing_an_export_leaves_other_files_alone(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    check_refused(lambda: export(finished / "run", folder, "timm"), tmp_path, "exists already")
    export(finished / "run", folder, "timm", overwrite=True)
    assert (folder / "mine.txt").read_text() == "mine" and (folder / "model.safetensors").exists()


def test_the_command_line_ends_with_code_2_and_no_traceback(cli, own: Path, tiny_vit: Path) -> None:
    one_class(own)
    code, out, err = cli("classify", "--images", own, "--model", tiny_vit, "--steps", 1)
    assert code == 2 and err.startswith("Error: ") and "Traceback" not in out + err


def test_a_backbone_without_blocks_has_no_layer_decay(classify, tmp_path: Path) -> None:
    words = ("layer_decay is 0.7, but the layers of regnety_002 do not say", "leave layer_decay out")
    check_refused(lambda: classify(model="regnety_002", weights="random", layer_decay=0.7), tmp_path, *words)
