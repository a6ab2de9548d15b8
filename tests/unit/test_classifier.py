"""One classifier, and many tasks on one backbone: together they say what each says alone."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from visionlora.pipelines.predict import Predicted, record, table

from visionlora.classifier import Classifier, load_classifier
from visionlora.errors import AdapterFileError, ConfigError, DataError
from visionlora.formats import native
from visionlora.lora.adapter import Adapter
from visionlora.models.state_dicts import renaming
from visionlora.models.vision import open_backbone

from ..doubles import adapter_of

STYLE = Path(__file__).parents[2] / "assets" / "adapters" / "fxemoji"
TASKS = {"pets": ("cat", "dog", "fish"), "digits": ("0", "1", "2", "3", "4"), "yes": ("no", "yes")}


def pictures(n: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 36, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.fixture
def several(tiny_vit: Path) -> Classifier:
    return load_classifier({n: adapter_of(tiny_vit, c, i) for i, (n, c) in enumerate(TASKS.items())})


def test_a_file_is_all_that_predict_needs(tiny_vit: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tiny_vit, TASKS["pets"], 0)
    native.write(adapter, tmp_path / "adapter.safetensors")
    found = load_classifier(tmp_path / "adapter.safetensors").predict(pictures(3), top_k=2)
    assert all(len(p.labels) == 2 and set(p.labels) <= set(TASKS["pets"]) for p in found)
    assert all(p.probabilities[0] >= p.probabilities[1] > 0 and p.label == p.labels[0] for p in found)
    assert (
        load_classifier(adapter).backbone.why == f"Backbone: {tiny_vit}, which the adapter names. Choose with --model."
    )
    one = load_classifier(adapter).predict(pictures(3)[1])
    assert one[0].labels == found[1].labels[:1]
    assert one[0].probability == pytest.approx(found[1].probability, abs=1e-5)


def test_probabilities_are_those_of_the_model_at_the_temperature(tiny_vit: Path) -> None:
    adapter, x = adapter_of(tiny_vit, TASKS["pets"], 0), torch.randn(4, 3, 32, 32)
    backbone = open_backbone(str(tiny_vit))
    deltas = {n.removeprefix("model."): m for n, m in adapter.modules.items()}
    state = backbone.model.state_dict()
    for block in range(2):
        weight = state[f"blocks.{block}.attn.qkv.weight"]
        for part, rows in (("q", slice(0, 24)), ("v", slice(48, 72))):
            weight[rows] += deltas[f"blocks.{block}.attn.qkv.{part}"].delta_weight()
    head = backbone.new_head(3, 0)
    with torch.no_grad():
        head.weight.copy_(deltas["head.weight"].tensors["value"])
        head.bias.copy_(deltas["head.bias"].tensors["value"])
        want = (backbone.model(x) / 1.5).softmax(1)
    classifier = load_classifier(adapter)
    got = torch.stack([classifier.tasks["default"].probabilities(row) for row in classifier.logits(x)])
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "vera"])
def test_a_mixed_batch_says_what_each_task_says_alone(tiny_vit: Path, method: str) -> None:
    adapters = {n: adapter_of(tiny_vit, c, i, method) for i, (n, c) in enumerate(TASKS.items())}
    classifier = load_classifier(adapters)
    x = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tasks = ["pets", "digits", "digits", "yes", "pets", "yes", "digits"]
    mixed = classifier.logits(x, tasks)
    for i, task in enumerate(tasks):
        (alone,) = load_classifier(adapters[task]).logits(x[i : i + 1])
        assert mixed[i].shape == (len(TASKS[task]),)
        assert torch.allclose(mixed[i], alone, atol=1e-5), (task, (mixed[i] - alone).abs().max())
    # Tasks may be switched at any time, and a merged one leaves nothing behind for the next.
    for task in ("digits", "pets", "digits"):
        again = classifier.logits(x, task)
        assert torch.allclose(torch.stack(again)[0], load_classifier(adapters[task]).logits(x)[0], atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(classifier.logits(x, tasks), mixed, strict=True))


def test_heads_alone_and_full_models_share_a_backbone_with_adapters(tiny_vit: Path) -> None:
    whole = adapter_of(tiny_vit, TASKS["digits"], 1, "full")
    head = adapter_of(tiny_vit, TASKS["yes"], 2, "linear-probe")
    adapters = {"pets": adapter_of(tiny_vit, TASKS["pets"], 0), "digits": whole, "yes": head}
    classifier, x = load_classifier(adapters), torch.randn(3, 3, 32, 32)
    mixed = classifier.logits(x, ["pets", "digits", "yes"])
    for i, name in enumerate(adapters):
        assert torch.allclose(mixed[i], load_classifier(adapters[name]).logits(x)[i], atol=1e-5)


def test_removing_every_task_leaves_the_base_bit_for_bit(several: Classifier) -> None:
    untouched = open_backbone(several.backbone.id).model.state_dict()
    x = torch.randn(4, 3, 32, 32)
    several.logits(x, "digits")
    several.logits(x, ["pets", "yes", "digits", "pets"])
    for name in several.names:
        several.remove(name)
    after = several.model.state_dict()
    assert after.keys() == untouched.keys() and all(torch.equal(t, after[n]) for n, t in untouched.items())


def test_threads_say_what_one_says_and_leave_the_base_bit_for_bit(several: Classifier) -> None:
    untouched = {n: t.clone() for n, t in open_backbone(several.backbone.id).model.state_dict().items()}
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    asked: list[Any] = ["pets", "digits", ["yes", "pets", "digits"], "yes"] * 8
    wanted = [several.logits(x, tasks) for tasks in asked[:4]] * 8
    several.remove("yes")
    several.add("yes", adapter_of(Path(several.backbone.id), TASKS["yes"], 2))  # no task is in the weights now
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda tasks: several.logits(x, tasks), asked))
    for rows, want in zip(found, wanted, strict=True):
        assert all(torch.allclose(row, w, atol=1e-5) for row, w in zip(rows, want, strict=True))
    for name in several.names:
        several.remove(name)
    assert all(torch.equal(t, untouched[n]) for n, t in several.model.state_dict().items())


def test_a_copy_of_a_classifier_says_the_same(several: Classifier) -> None:
    x = torch.randn(1, 3, 32, 32)
    several.logits(x, "pets")
    for copied in (copy.deepcopy(several), pickle.loads(pickle.dumps(several))):
        assert torch.equal(copied.logits(x, "digits")[0], several.logits(x, "digits")[0])


def test_tasks_come_and_go(several: Classifier, tiny_vit: Path) -> None:
    x, before = torch.randn(2, 3, 32, 32), {n: several.logits(torch.ones(1, 3, 32, 32), n)[0] for n in several.names}
    several.remove("pets")
    several.add("pets", adapter_of(tiny_vit, TASKS["pets"], 0))
    several.add("more", adapter_of(tiny_vit, ("a", "b"), 7))
    assert [len(row) for row in several.logits(x, ["more", "pets"])] == [2, 3]
    for name, row in before.items():
        assert torch.allclose(several.logits(torch.ones(1, 3, 32, 32), name)[0], row, atol=1e-5)


def test_an_adapter_from_before_transformers_renamed_its_vit_is_of_the_same_backbone(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(tmp_path)
    adapter, backbone = adapter_of(tmp_path, ("a", "b"), 1), open_backbone(str(tmp_path))
    older = backbone.fingerprints(older=True)
    if older == backbone.fingerprints():
        pytest.skip("this transformers has one spelling")
    spell = renaming(backbone.model, backward=True)
    modules = {f"model.{spell(name.removeprefix('model.'))}": m for name, m in adapter.modules.items()}
    assert "model.vit.encoder.layer.0.attention.attention.query" in modules
    before = Adapter(modules, {**adapter.info, "base": {**adapter.info["base"], "fingerprints": older}})
    x = torch.randn(2, 3, 32, 32)
    (logits, again) = (torch.stack(load_classifier(a).logits(x)) for a in (adapter, before))
    assert torch.equal(logits, again)
    older["model"]["weights"] = "of another"
    with pytest.raises(AdapterFileError, match="has the same architecture but other weights"):
        load_classifier(Adapter(modules, {**before.info, "base": {"id": str(tmp_path), "fingerprints": older}}))


def test_several_labels_are_those_above_one_half(tiny_vit: Path) -> None:
    classifier = load_classifier(adapter_of(tiny_vit, TASKS["digits"], 1, multi_label=True))
    task = classifier.tasks["default"]
    found = task.prediction(torch.tensor([0.2, 0.9, 0.5, 0.7, 0.1]), 1, "default")
    assert found.labels == ("1", "3") and found.probabilities == pytest.approx((0.9, 0.7))
    assert found.top == (("1", pytest.approx(0.9)), ("3", pytest.approx(0.7)))
    more = task.prediction(torch.tensor([0.2, 0.9, 0.5, 0.7, 0.1]), 4, "default", threshold=0.8)
    assert more.labels == ("1",) and [name for name, _ in more.top] == ["1", "3", "2", "0"]
    nothing = task.prediction(torch.full((5,), 0.1), 1, "default")
    said = Predicted(Path("a.png"), nothing)
    assert record(said) == {
        "path": "a.png", "label": None, "probability": None, "labels": [],
        "top": [{"label": "0", "probability": pytest.approx(0.1)}],
    }  # fmt: skip
    assert table([said], ".csv") == b"path,label,probability\na.png,,\n"
    assert nothing.label is None and nothing.probability == 0.0


def test_files_of_predictions_tell_the_labels_that_apply(tiny_vit: Path) -> None:
    """However many were asked for: `top` alone has others, and a table has no columns that are always empty."""
    task = load_classifier(adapter_of(tiny_vit, TASKS["digits"], 1, multi_label=True)).tasks["default"]
    rows = torch.tensor([[0.25, 0.9, 0.5, 0.75, 0.1], [0.1] * 5])
    said = [Predicted(Path("a.png"), task.prediction(row, 4, "default", threshold=0.5)) for row in rows]
    assert [(record(one)["labels"], len(record(one)["top"])) for one in said] == [(["1", "3"], 4), ([], 4)]
    lines = table(said, ".csv").decode().splitlines()
    assert lines[0] == "path,label,probability,label_2,probability_2" and lines[2] == "a.png,,,,"
    assert lines[1].startswith("a.png,1,0.89") and lines[1].endswith(",3,0.75")


def test_files_arrays_and_pictures_are_the_same(tiny_vit: Path, tmp_path: Path) -> None:
    classifier, (picture,) = load_classifier(adapter_of(tiny_vit, TASKS["pets"], 0)), pictures(1)
    picture.save(tmp_path / "a.png")
    found = classifier.predict([picture, tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(picture)])
    assert [p.label for p in found] == [found[0].label] * 4
    assert [p.probability for p in found] == pytest.approx(
        [found[0].probability] * 4, rel=1e-6
    )  # rows of a batch round


def check_says(error: type[Exception], said: str, call: Any) -> None:
    with pytest.raises(error, match=said):
        call()


def odd_pictures(folder: Path) -> dict[str, Path]:
    """Files whose pixels are not what a person sees."""
    random = np.random.default_rng(0)
    clear = Image.fromarray(random.integers(0, 256, (40, 36, 4), dtype=np.uint8), "RGBA")
    turned = Image.fromarray(random.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    clear.save(folder / "clear.png")
    turned.save(folder / "turned.jpg", exif=exif)
    Image.fromarray(np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)).save(folder / "deep.png")
    return {p.stem: p for p in folder.iterdir()}


@pytest.mark.parametrize("name", ["clear", "turned", "deep"])
def test_an_opened_picture_is_seen_as_its_file_is(name: str, tiny_vit: Path, tmp_path: Path) -> None:
    """Training reads files; who opens them with Pillow must not be told something else."""
    path = odd_pictures(tmp_path)[name]
    classifier = load_classifier(adapter_of(tiny_vit, TASKS["pets"], 0))
    with Image.open(path) as opened:
        assert torch.equal(classifier.prepared(opened, "default"), classifier.prepared(path, "default"))


def test_wrong_use_is_explained(several: Classifier, tiny_vit: Path) -> None:
    picture = pictures(1)
    check_says(ConfigError, "There are 3 tasks", lambda: several.predict(picture))
    check_says(ConfigError, "Did you mean 'pets'", lambda: several.predict(picture, "pet"))
    check_says(ConfigError, "1 pictures and 2 tasks", lambda: several.predict(picture, ["pets", "pets"]))
    check_says(ConfigError, "is there already", lambda: several.add("pets", adapter_of(tiny_vit, TASKS["pets"], 0)))
    check_says(ConfigError, "at least 1", lambda: several.predict(picture, "pets", top_k=0))
    check_says(ConfigError, "at least 0 and below 1", lambda: several.predict(picture, "pets", threshold=1.0))
    check_says(DataError, "no pictures", lambda: several.predict([], "pets"))
    check_says(DataError, "uint8 array", lambda: several.predict([np.zeros((4, 4))], "pets"))
    check_says(ConfigError, "No adapter", lambda: load_classifier({}))


def test_adapters_that_are_no_classifiers_or_of_another_backbone_are_refused(tiny_vit: Path) -> None:
    adapter = adapter_of(tiny_vit, TASKS["pets"], 0)
    style = Adapter(adapter.modules, {"base": adapter.info["base"]})
    check_says(AdapterFileError, "The adapter 'style' has no classes", lambda: load_classifier({"style": style}))
    drawing = f"{STYLE} is an adapter for Stable Diffusion"
    check_says(AdapterFileError, drawing, lambda: load_classifier({"style": STYLE}))
    check_says(AdapterFileError, drawing, lambda: load_classifier(adapter).add("style", STYLE))
    headless = Adapter({n: m for n, m in adapter.modules.items() if "head" not in n}, adapter.info)
    check_says(AdapterFileError, "has no head", lambda: load_classifier(headless))
    short = Adapter(adapter.modules, {**adapter.info, "classifier": {**adapter.info["classifier"], "classes": ["a"]}})
    check_says(AdapterFileError, "names 1 classes", lambda: load_classifier(short))
    check_says(AdapterFileError, "another architecture", lambda: load_classifier(adapter, model="emoji-vit"))
    nameless = Adapter(adapter.modules, {"classifier": adapter.info["classifier"]})
    check_says(AdapterFileError, "does not say which backbone", lambda: load_classifier(nameless))
