"""Learning on from a finished adapter: classifiers with their heads, and who may judge what was learned from before."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from visionlora.pipelines.classify import classify
from visionlora.pipelines.train_sd import train_sd

import visionlora as vl
from visionlora.config import ClassifyConfig, TrainSDConfig, build
from visionlora.errors import AdapterFileError, ConfigError, DataError, ModelError
from visionlora.loaders import load_adapter, save_adapter

from ..doubles import Ears

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' schedulers

SMALL = {"steps": 4, "rank": 2, "batch_size": 8, "evaluations": 2, "baselines": ("none",)}


def run(images: Path, output: Path, **settings: object) -> tuple[str, Path]:
    """Trains a classifier; gives what was said and the run folder."""
    ears = Ears()
    folder = classify(
        build(ClassifyConfig, {"images": str(images), "output": str(output), **SMALL, **settings}), ears
    ).folder
    return "\n".join(ears.lines), folder


@pytest.fixture(scope="module")
def first(shapes: Path, tiny_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on circles and crosses alone, of layers that are not the default's."""
    two = tmp_path_factory.mktemp("two")
    for name in ("circle", "cross"):
        shutil.copytree(shapes / name, two / "shapes" / name)
    own = {"model": str(tiny_vit), "rank": 3, "targets": "attn.qv,mlp", "steps": 30, "learning_rate": 0.02,
           "head_init": "random"}  # fmt: skip
    folder = run(two / "shapes", two / "first", **own)[1]
    assert json.loads((folder / "metrics.json").read_text())["best_step"] > 0, "it has learned"
    return folder


@pytest.fixture
def two(shapes: Path, tmp_path: Path) -> Path:
    """The pictures of the first run."""
    for name in ("circle", "cross"):
        shutil.copytree(shapes / name, tmp_path / "shapes" / name)
    return tmp_path / "shapes"


def test_it_begins_with_layers_and_head_of_the_first(first: Path, two: Path, tmp_path: Path) -> None:
    said, folder = run(two, tmp_path / "on", start_from=str(first), learning_rate=1e-9, head_learning_rate=1e-9)
    assert f"Learning on from {first}, with its layers and ranks (rank=2 is left aside)." in said
    assert "The head learns on too: it knows all 2 classes." in said
    before, after = load_adapter(first), load_adapter(folder)
    assert before.modules.keys() == after.modules.keys()
    for name, m in before.modules.items():
        for which, tensor in m.tensors.items():
            torch.testing.assert_close(after.modules[name].tensors[which], tensor, rtol=0, atol=1e-6)
    assert after.info["config"]["targets"] == ["attn.qv", "mlp"] and after.info["config"]["rank"] == 3
    assert "head_init: adapter" in (folder / "config.yaml").read_text()
    assert "| Learned on from | first |" in (folder / "README.md").read_text()


def test_the_backbone_is_the_one_that_the_adapter_names(first: Path, two: Path, tiny_vit: Path, tmp_path: Path) -> None:
    said, folder = run(two, tmp_path / "on", start_from=str(first))
    assert f"Backbone: {tiny_vit}, which {first} names. Choose with --model." in said
    assert load_adapter(folder).info["base"]["id"] == str(tiny_vit)


def test_the_base_is_the_one_that_the_adapter_names(
    tiny_model: Path, dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was said to be chosen with --model, which nobody had given; and one named by a path from there was lost elsewhere."""
    settings = {"images": dogs, "steps": 1, "rank": 2, "sample_columns": 0}
    moved = tmp_path / "base"
    shutil.copytree(tiny_model, moved)
    monkeypatch.chdir(tmp_path)
    before = train_sd(TrainSDConfig(**settings, output=tmp_path / "a", model="base")).folder
    monkeypatch.chdir(dogs)
    ears = Ears()
    train_sd(TrainSDConfig(**settings, output=tmp_path / "b", start_from=before), ears)
    assert f"Base model: {moved}, which {before} names. Choose with --model." in ears.lines
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(
        ModelError, match=f"The base model that {before} names, {moved}, is not there: say with --model"
    ):
        train_sd(TrainSDConfig(**settings, output=tmp_path / "c", start_from=before))


def test_no_picture_that_was_learned_from_judges(first: Path, shapes: Path, tiny_vit: Path, tmp_path: Path) -> None:
    """Also in the third generation, and of the pictures that chose the best moment none is tested on."""
    before = json.loads((first / "run.json").read_text())["splits"]
    names = {side: {"/".join(Path(p).parts[-2:]) for p in paths} for side, paths in before.items()}
    said, folder = run(shapes, tmp_path / "second", start_from=str(first), model=str(tiny_vit), seed=3)
    assert "The head starts as a linear probe of what the adapter makes of the pictures." in said
    third = tmp_path / "third"
    run(shapes, third, start_from=str(folder), model=str(tiny_vit), seed=4)
    trained, chosen = set(names["train"]), set(names["val"])
    for later in (folder, third):
        found = json.loads((later / "run.json").read_text())["splits"]
        sides = {side: {"/".join(Path(p).parts[-2:]) for p in paths} for side, paths in found.items()}
        assert sides["val"] and sides["test"] and not trained & (sides["val"] | sides["test"])
        assert not chosen & sides["test"]
        trained, chosen = trained | sides["train"], chosen | sides["val"]


def test_other_classes_start_from_what_it_sees(first: Path, shapes: Path, tmp_path: Path) -> None:
    """The probe of the adapter's features, not of the bare backbone's."""
    said, folder = run(shapes, tmp_path / "three", start_from=str(first), learning_rate=1e-9, head_learning_rate=1e-9,
                       baselines=("probe",))  # fmt: skip
    assert "it knows all" not in said
    own, bare = (load_adapter(folder / name) for name in ("adapter.safetensors", "baselines/probe.safetensors"))
    assert own.info["classifier"]["classes"] == ["circle", "cross", "square"]
    head = "model.head.weight"
    assert not torch.allclose(own.modules[head].tensors["value"], bare.modules[head].tensors["value"], atol=1e-3)
    assert "start_from" in own.info["training"] and "start_from" not in bare.info["training"], "it began from the base"


def test_fewer_classes_keep_their_rows_and_random_is_random(first: Path, two: Path, tmp_path: Path) -> None:
    three = vl.load_adapter(first)
    three.info["classifier"]["classes"] = ["cross", "square", "circle"]
    for n in ("weight", "bias"):
        value = three.modules[f"model.head.{n}"].tensors["value"]
        three.modules[f"model.head.{n}"].tensors["value"] = torch.cat([value[1:], 9 + 0 * value[:1], value[:1]])
    save_adapter(three, tmp_path / "three.safetensors")
    still = {"learning_rate": 1e-9, "head_learning_rate": 1e-9}
    said, folder = run(two, tmp_path / "a", start_from=str(tmp_path / "three.safetensors"), **still)
    assert "The head learns on too: it knows all 2 classes; 1 other class is left out." in said
    heads = [vl.load_adapter(f).modules["model.head.weight"].tensors["value"] for f in (folder, first)]
    torch.testing.assert_close(heads[0], heads[1], rtol=0, atol=1e-6)
    _, folder = run(two, tmp_path / "b", start_from=str(first), head_init="random", **still)
    head = vl.load_adapter(folder).modules["model.head.weight"].tensors["value"]
    assert 0.01 < head.std() < 0.03 and not torch.allclose(head, heads[1], atol=1e-3)


def test_from_a_folder_of_peft(first: Path, two: Path, tiny_vit: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from visionlora.pipelines.export import export

    export(first, tmp_path / "peft", "peft")
    said, folder = run(two, tmp_path / "on", start_from=str(tmp_path / "peft"), model=str(tiny_vit),
                       learning_rate=1e-9, head_learning_rate=1e-9)  # fmt: skip
    assert "does not say which pictures it has learned from" in said
    assert "does not say which pictures it has learned from" in (folder / "report.html").read_text()
    assert "learned_from" not in load_adapter(folder).info["training"], "it is not known in full"
    before, after = (load_adapter(f).modules["model.blocks.0.mlp.fc1"].delta_weight() for f in (first, folder))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


def test_it_goes_on_when_the_first_is_gone(first: Path, two: Path, tmp_path: Path) -> None:
    class Cut(Ears):
        def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
            if what.startswith("Training") and done == 3:
                raise KeyboardInterrupt

    copy = tmp_path / "first.safetensors"
    shutil.copy(first / "adapter.safetensors", copy)
    _, whole = run(two, tmp_path / "whole", start_from=str(copy))
    settings = {"images": str(two), "output": str(tmp_path / "cut"), **SMALL, "start_from": str(copy)}
    with pytest.raises(KeyboardInterrupt):
        classify(build(ClassifyConfig, settings), Cut())
    copy.unlink()
    classify(build(ClassifyConfig, {"images": str(two), "resume": str(tmp_path / "cut")}))
    assert (tmp_path / "cut" / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["adalora", "full", "linear-probe"])
def test_what_cannot_learn_on(kind: str, two: Path, tiny_vit: Path, tmp_path: Path) -> None:
    _, folder = run(two, tmp_path / "first", model=str(tiny_vit), method=kind, steps=2)
    before = sorted(tmp_path.rglob("*"))
    if kind == "adalora":  # a finished one is a LoRA
        said, _ = run(two, tmp_path / "on", start_from=str(folder))
        assert "Learning on from" in said
        return
    words = {
        "full": "trained in full is a base of its own",
        "linear-probe": "has a head alone, no layers that could learn on",
    }
    with pytest.raises(ConfigError, match=words[kind]):
        run(two, tmp_path / "on", start_from=str(folder))
    assert sorted(tmp_path.rglob("*")) == before


def test_full_fine_tuning_beside_it_starts_from_the_base(first: Path, two: Path, tmp_path: Path) -> None:
    _, folder = run(two, tmp_path / "on", start_from=str(first), baselines=("probe", "full"))
    contenders = json.loads((folder / "metrics.json").read_text())["contenders"]
    assert list(contenders) == ["lora", "linear-probe", "full"]


def test_nothing_new_is_left_to_judge_by(first: Path, two: Path, tmp_path: Path) -> None:
    splits = json.loads((first / "run.json").read_text())["splits"]
    for path in (*splits["val"], *splits["test"]):
        (two / "/".join(Path(path).parts[-2:])).unlink()
    with pytest.raises(DataError, match=r"has learned from 28 of the 28 pictures, .* add new pictures"):
        run(two, tmp_path / "on", start_from=str(first))
    assert not (tmp_path / "on").exists()


def test_a_head_that_does_not_know_the_classes(first: Path, shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"head_init is 'adapter', but the head of .* does not know square"):
        run(shapes, tmp_path / "on", start_from=str(first), head_init="adapter")
    with pytest.raises(ConfigError, match="there is no start_from whose head it could be"):
        run(shapes, tmp_path / "on", head_init="adapter")


def test_pictures_cannot_be_learned_on_from_a_classifier(dogs: Path, tmp_path: Path) -> None:
    classifier = Path(__file__).parents[2] / "assets" / "adapters" / "style-classifier"
    settings = {"images": str(dogs), "output": str(tmp_path / "on"), "start_from": str(classifier)}
    with pytest.raises(AdapterFileError, match=r"style-classifier is a classifier of \d+ classes"):
        train_sd(build(TrainSDConfig, settings))


def test_classes_cannot_be_learned_on_from_a_style(shapes: Path, tmp_path: Path) -> None:
    style = Path(__file__).parents[2] / "assets" / "adapters" / "fxemoji"
    with pytest.raises(AdapterFileError, match="fxemoji is an adapter for Stable Diffusion"):
        run(shapes, tmp_path / "on", start_from=str(style))


def test_pictures_kept_apart_from_a_style_were_not_learned(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    small = {"steps": 2, "rank": 2, "batch_size": 2, "sample_columns": 0, "learning_rate": 0.01}

    def train(name: str, **settings: object) -> tuple[str, Path]:
        ears = Ears()
        fixed = {"images": str(dogs), "output": str(tmp_path / name), **small, **settings}
        return "\n".join(ears.lines), train_sd(build(TrainSDConfig, fixed), ears).folder

    _, before = train("first", model=str(tiny_model), val_share=0.3)
    apart = [line for line in (before / "checkpoints").iterdir() if line.name == "best.safetensors"]
    assert apart, "one picture was kept apart"
    _, on = train("on", start_from=str(before), val_share=0.3, seed=5)  # of the base that the adapter names
    found = [vl.load_adapter(f).info for f in (before, on)]
    assert found[0]["base"] == found[1]["base"]
    assert found[0]["training"]["data_sha256"] == found[1]["training"]["data_sha256"], "the same one"
    _, all_of_them = train("all", model=str(tiny_model))
    with pytest.raises(DataError, match="has learned from all of these pictures"):
        train("no", start_from=str(all_of_them), val_share=0.3)
    (tmp_path / "judges").mkdir()
    (dogs / "0.png").rename(tmp_path / "judges" / "0.png")
    with pytest.raises(DataError, match=r"has learned from 1 pictures of .*judges \(first 0\.png\)"):
        train("no", start_from=str(all_of_them), validation=str(tmp_path / "judges"))


def test_a_learned_word_learns_on(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    """Its vectors go on from where they were, under the same name, without anything said of it."""
    small = {
        "steps": 3,
        "rank": 2,
        "batch_size": 2,
        "sample_columns": 0,
        "prompt": "a <it> dog",
        "model": str(tiny_model),
    }

    def train(name: str, **settings: object) -> tuple[Path, dict[str, torch.Tensor]]:
        fixed = {"images": str(dogs), "output": str(tmp_path / name), **small, **settings}
        folder = train_sd(build(TrainSDConfig, fixed), Ears()).folder
        ((word, parts),) = load_adapter(folder).embeddings.items()
        assert word == "<it>"
        return folder, dict(parts)

    first, before = train("first", token="<it>", token_vectors=2, learning_rate=0.1)
    still, same = train("still", start_from=str(first), learning_rate=1e-9)
    torch.testing.assert_close(same, before, rtol=0, atol=1e-6)
    assert "Use `<it>`" in (still / "README.md").read_text()
    _, untrained = train("none", token="<it>", token_vectors=2, learning_rate=1e-9)
    assert (untrained["text_encoder"] - before["text_encoder"]).abs().max() > 0.01
    _, after = train("on", start_from=str(still), learning_rate=0.1, steps=6, train_text_encoder=True)
    assert after["text_encoder"].shape == before["text_encoder"].shape
    assert not torch.equal(after["text_encoder"], before["text_encoder"])
    for which in ("whole", "cut"):
        settings = build(TrainSDConfig, {"images": str(dogs), "output": str(tmp_path / which), **small, "steps": 6,
                                         "start_from": str(still), "checkpoints": 6, "learning_rate": 0.1})  # fmt: skip
        with suppress(Stopped):
            train_sd(settings, Stopping() if which == "cut" else Ears())
    shutil.rmtree(still)
    train_sd(build(TrainSDConfig, {"images": str(dogs), "resume": str(tmp_path / "cut")}), Ears())
    whole, cut = (load_adapter(tmp_path / name).embeddings["<it>"] for name in ("whole", "cut"))
    torch.testing.assert_close(cut, whole, rtol=0, atol=0)


class Stopped(BaseException):
    """As sudden as a power cut."""


class Stopping(Ears):
    """Ends the run in the middle of its training."""

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        if what == "Training" and done == 4:
            raise Stopped
