"""classify, predict and export end to end through the real commands, on the embedded backbone and real pictures."""

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from visionlora.pipelines.classify_dry_run import classify_dry_run
from visionlora.pipelines.export import export

import visionlora as vl
from visionlora.config import ClassifyConfig, build, read_yaml
from visionlora.errors import ProcessLost, TrainingError
from visionlora.formats import native
from visionlora.loaders import load_adapter
from visionlora.lora.adapter import Adapter
from visionlora.models.vision import open_backbone
from visionlora.report.classify_fitting import Fitting
from visionlora.report.logbook import Logbook
from visionlora.training.loop import Fit, Progress

from ..doubles import Ears, adapter_of, not_finite_after

SHORT = ("--epochs", 6, "--batch-size", 16, "evaluations=3")


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run that several tests look at."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "visionlora", "classify", "--images", shapes, "--output", "run", *SHORT]
    done = subprocess.run([*map(str, command), "--baselines", "probe", "--baselines", "full"], capture_output=True,
                          text=True, cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 classes; 42 pictures to train on, 9 to choose by, 9 to test on." in done.stdout
    return folder / "run"


def test_a_backbone_named_from_here_is_found_from_elsewhere(
    shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path as it was given would be looked for below another folder, or on the Hub."""
    monkeypatch.chdir(tiny_vit.parent)
    asked = {"images": str(shapes), "model": tiny_vit.name, "steps": 1, "baselines": ("none",)}
    run = vl.classify(vl.ClassifyConfig(**asked, output=str(tmp_path / "run"))).folder
    monkeypatch.chdir(tmp_path)
    assert len(vl.load_classifier(run).predict(sorted(shapes.rglob("*.png"))[:2])) == 2


def test_a_head_that_the_targets_reach_is_trained_in_full_alone(shapes: Path, tiny_vit: Path, tmp_path: Path) -> None:
    """It would be twice in the file, which then fits no backbone."""
    asked = {"images": str(shapes), "model": str(tiny_vit), "steps": 1, "rank": 2, "baselines": ("none",)}
    run = vl.classify(vl.ClassifyConfig(**asked, targets="head,attn.q", output=str(tmp_path / "run"))).folder
    assert {n: m.kind for n, m in load_adapter(run).modules.items() if "head" in n} == {
        "model.head.weight": "full",
        "model.head.bias": "full",
    }
    assert len(vl.load_classifier(run).predict(sorted(shapes.rglob("*.png"))[:2])) == 2


def test_a_run_leaves_everything(trained: Path) -> None:
    assert {p.name for p in trained.iterdir()} >= {
        "asked.yaml", "config.yaml", "metrics.jsonl", "adapter.safetensors", "baselines", "checkpoints", "loss.png",
        "score.png", "confusion.png", "reliability.png", "overlays.png", "metrics.json", "predictions.csv",
        "report.html", "README.md", "run.json",
    }  # fmt: skip
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["evaluated_on"] == "test" and metrics["pictures"] == 9
    assert list(metrics["contenders"]) == ["lora", "linear-probe", "full"]
    assert metrics["top1"] >= 6 / 9, "it learned"
    assert sum(map(sum, metrics["confusion"])) == 9
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 17))
    looks = [json.loads(line) for line in (trained / "validation.jsonl").read_text().splitlines()]
    assert looks[0]["step"] == 0 and looks[-1]["step"] == 16 and len(looks) == 4
    assert max(look["top1"] for look in looks) == metrics["contenders"]["lora"]["val_score"]
    page = (trained / "report.html").read_text()
    assert all(name in page for name in ("circle", "cross", "square", "linear probe", "full"))
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_the_adapter_carries_everything(trained: Path) -> None:
    adapter = load_adapter(trained)
    about = adapter.info["classifier"]
    assert about["classes"] == ["circle", "cross", "square"] and about["preprocessing"]["size"] == 64
    assert adapter.info["base"]["id"] == "emoji-vit" and adapter.info["method"] == "lora"
    assert {n for n, m in adapter.modules.items() if m.kind == "full"} == {"model.head.weight", "model.head.bias"}
    assert (trained / "adapter.safetensors").stat().st_size < 300_000


def test_its_config_runs_again_to_the_same_bytes(cli, trained: Path, tmp_path: Path) -> None:
    code, _, err = cli("classify", "--config", trained / "config.yaml", "--output", tmp_path / "again")
    assert code == 0, err
    assert (tmp_path / "again" / "config.yaml").read_text() == (trained / "config.yaml").read_text()
    for name in ("adapter.safetensors", "baselines/full.safetensors", "baselines/probe.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes(), name


def test_predictions_are_those_of_the_test(cli, trained: Path, tmp_path: Path) -> None:
    """The report's test pictures, read again by another process, give the report's accuracy."""
    files = json.loads((trained / "run.json").read_text())["splits"]["test"]
    code, _, err = cli("predict", "--adapter", trained, *files, "--top-k", 3, "--output", tmp_path / "p.csv")
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert [r["path"] for r in rows] == files
    own = list(csv.DictReader((trained / "predictions.csv").read_text().splitlines()))
    assert [(r["path"], r["predicted"], Path(r["path"]).parent.name) for r in own] == [
        (r["path"], r["label"], o["label"]) for r, o in zip(rows, own, strict=True)
    ]
    assert [float(r["probability"]) for r in own] == pytest.approx([float(r["probability"]) for r in rows], abs=1e-5)
    loss = json.loads((trained / "metrics.json").read_text())["loss"]
    assert -sum(math.log(float(r["probability_of_label"])) for r in own) / len(own) == pytest.approx(loss)
    right = sum(Path(r["path"]).parent.name == r["label"] for r in rows)
    assert right / len(rows) == pytest.approx(json.loads((trained / "metrics.json").read_text())["top1"])
    assert all(float(r["probability"]) >= float(r["probability_2"]) >= float(r["probability_3"]) for r in rows)


def test_predict_reads_tables_row_by_row(cli, trained: Path, shapes: Path, tmp_path: Path) -> None:
    """Those that classify reads: paths in a column, or the pictures themselves; labels are passed over."""
    pyarrow, parquet = (pytest.importorskip(module) for module in ("pyarrow", "pyarrow.parquet"))
    names = ["03.png", "01.png", "03.png", "02.png"]
    pictures = [
        shapes / folder / name for folder, name in zip(("square", "circle", "square", "cross"), names, strict=True)
    ]
    labels = [one.prediction.label for one in vl.predict(trained, pictures)]
    for picture in pictures:
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    (tmp_path / "new.csv").write_text("file,label\n" + "".join(f"{name},?\n" for name in names))
    code, out, err = cli("predict", "--adapter", trained, "--images", tmp_path / "new.csv", "--json")
    assert code == 0, err
    assert [(one["path"], one["label"]) for one in json.loads(out)] == [
        (f"{tmp_path}/{name}", label) for name, label in zip(names, labels, strict=True)
    ]
    held = tmp_path / "held"
    held.mkdir()
    contents = [picture.read_bytes() for picture in pictures]
    for name, rows in (("test-0", contents[:2]), ("test-1", [b"no picture", *contents[2:]])):
        columns = {"image": [{"bytes": content} for content in rows], "label": [0] * len(rows)}
        parquet.write_table(pyarrow.table(columns), held / f"{name}.parquet")
    words = ("predict", "--adapter", trained, held, "--output", tmp_path / "p.csv")
    code, out, err = cli(*words)
    assert "Unpacking pictures 3/3" in out
    assert code == 2 and "1 of 5 pictures cannot be read" in err and f"{held}/test-1.parquet row 1 is not" in err, err
    code, _, err = cli(*words, "--skip-broken")
    assert code == 0, err
    told = [f"{held}/test-{file}.parquet row {row}" for file, row in ((0, 1), (0, 2), (1, 2), (1, 3))]
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert [(row["path"], row["label"]) for row in rows] == list(zip(told, labels, strict=True))
    (held / "0.png").write_bytes(pictures[0].read_bytes())
    code, out, err = cli(*words, "--overwrite")
    assert code == 0 and f"not used, as there are pictures beside them: {held}/test-0.parquet, " in out, err


def test_predict_writes_json_and_parquet_and_prints(cli, trained: Path, shapes: Path, tmp_path: Path) -> None:
    code, out, err = cli("predict", "--adapter", trained, "--images", shapes / "cross", "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert len(printed) == 20 and set(printed[0]) == {"path", "label", "probability", "labels", "top"}
    code, _, err = cli("predict", "--adapter", trained, shapes / "cross", "--output", tmp_path / "p.json")
    assert code == 0 and json.loads((tmp_path / "p.json").read_text()) == printed
    pyarrow = pytest.importorskip("pyarrow.parquet")
    code, _, err = cli("predict", "--adapter", trained, shapes / "cross", "--output", tmp_path / "p.parquet")
    assert code == 0, err
    assert pyarrow.read_table(tmp_path / "p.parquet").column("label").to_pylist() == [p["label"] for p in printed]


def test_files_are_found_by_the_names_that_are_written(shapes: Path, tiny_vit: Path, tmp_path: Path) -> None:
    """They were as they are printed, with control characters escaped."""
    adapter, new = tmp_path / "adapter.safetensors", tmp_path / "new"
    native.write(adapter_of(tiny_vit, ("circle", "cross")), adapter)
    new.mkdir()
    names = ["a\nb.png", "c\x1b[31m.png", 'd,"\r.png', "e\u202e\x85.png", "f é\U000e0001.png"]
    for name in (*names, os.fsdecode(b"g\xe9.png")):
        (new / name).write_bytes((shapes / "cross" / "00.png").read_bytes())
    ears, found = Ears(), {}
    for suffix in ("csv", "json", "parquet"):
        output = tmp_path / f"p.{suffix}"
        done = vl.predict(adapter, new, output, listener=ears)
        if suffix == "csv":
            with output.open(newline="") as file:
                found[suffix] = [r["path"] for r in csv.DictReader(file)]
        elif suffix == "json":
            found[suffix] = [r["path"] for r in json.loads(output.read_text())]
            assert output.read_text().replace("\n", "").isprintable(), "it may be read in a terminal"
        else:
            pyarrow = pytest.importorskip("pyarrow.parquet")
            found[suffix] = pyarrow.read_table(output).column("path").to_pylist()
    written = [f"{new}/{name}" for name in names]
    assert list(found.values()) == [[*written, rf"{new}/g\udce9.png"]] * 3
    assert all(Path(path).is_file() for path in written) and all(one.shown.isprintable() for one in done)
    said = rf"1 name is no UTF-8 and told escaped, by which no file is found: {new}/g\udce9.png."
    assert ears.lines.count(said) == 3


def test_every_probability_has_a_column_where_asked_for(cli, trained: Path, shapes: Path, tmp_path: Path) -> None:
    code, _, err = cli(
        "predict", "--adapter", trained, shapes / "cross", "--all-scores", "--output", tmp_path / "p.csv"
    )
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert list(rows[0]) == ["path", "label", "probability", "p_circle", "p_cross", "p_square"]
    for r in rows:
        scores = {n: float(r[f"p_{n}"]) for n in ("circle", "cross", "square")}
        assert sum(scores.values()) == pytest.approx(1) and float(r["probability"]) == scores[r["label"]]
        assert scores[r["label"]] == max(scores.values())
    code, out, err = cli("predict", "--adapter", trained, shapes / "cross", "--all-scores", "--json")
    assert code == 0 and json.loads(out)[0]["scores"]["cross"] == pytest.approx(float(rows[0]["p_cross"])), err
    code, out, err = cli("predict", "--adapter", trained, shapes / "cross" / "00.png", "--all-scores")
    assert code == 0 and all(f"{name} 0." in out for name in ("circle", "square")), err


@pytest.mark.parametrize(
    ("multi_label", "asked", "said"),
    [
        (
            False,
            {"threshold": 0.9},
            "threshold 0.9 has no effect: this adapter gives each picture its likeliest class.",
        ),
        (True, {"top_k": 2}, "top_k 2 has no effect on a .csv file: it holds the labels above the threshold."),
    ],
)
def test_what_has_no_effect_on_predictions_is_said(
    multi_label: bool, asked: dict, said: str, shapes: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    for several in (True, False):
        adapter, ears = adapter_of(tiny_vit, ("label", "2"), multi_label=several), Ears()
        native.write(adapter, tmp_path / "adapter.safetensors")
        vl.predict(tmp_path, shapes / "cross" / "00.png", tmp_path / f"{several}.csv", **asked, listener=ears)
        assert (said in ears.lines) == (several == multi_label)


def test_several_labels_have_their_probabilities_below_the_threshold_too(
    cli, shapes: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    native.write(adapter_of(tiny_vit, ("label", "2"), multi_label=True), tmp_path / "adapter.safetensors")
    words = ("--adapter", tmp_path / "adapter.safetensors", shapes / "cross", "--all-scores", "--threshold", 0.999)
    code, _, err = cli("predict", *words, "--output", tmp_path / "p.csv")
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert list(rows[0]) == ["path", "label", "probability", "p_label", "p_2"]
    assert all(r["label"] == "" and 0 < float(r["p_2"]) < 0.999 for r in rows)
    pyarrow = pytest.importorskip("pyarrow.parquet")
    code, _, err = cli("predict", *words, "--output", tmp_path / "p.parquet")
    assert code == 0, err
    found = pyarrow.read_table(tmp_path / "p.parquet").column("p_label").to_pylist()
    assert found == pytest.approx([float(r["p_label"]) for r in rows])


@pytest.mark.parametrize("to", ["timm", "state-dict", "peft", "onnx"])
def test_exports_are_opened_again_and_agree(cli, trained: Path, tmp_path: Path, to: str) -> None:
    for needed in {"peft": ("peft",), "onnx": ("onnxruntime", "onnxscript")}.get(to, ()):
        pytest.importorskip(needed)
    output = tmp_path / {"state-dict": "model.safetensors", "onnx": "model.onnx"}.get(to, "model")
    code, out, err = cli("export", trained, "--to", to, "--output", output)
    assert code == 0, err
    assert "Opened again and compared: logits differ by at most" in out
    assert float(out.rsplit("at most ", 1)[1].rstrip(".\n")) < 1e-4
    code, _, err = cli("export", trained, "--to", to, "--output", output)
    assert code == 2 and "exists already" in err


def test_a_transformers_folder_trains_and_is_exported(cli, shapes: Path, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                       image_size=32, patch_size=8)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    code, _, err = cli("classify", "--images", shapes, "--model", tmp_path / "base", "--steps", 3, "--output",
                       tmp_path / "run", "--rank", 2)  # fmt: skip
    assert code == 0, err
    said, backbone = load_adapter(tmp_path / "run").info["base"], open_backbone(str(tmp_path / "base"))
    older = backbone.fingerprints(older=True)
    assert said.get("older_fingerprints") == (None if older == backbone.fingerprints() else older)
    code, _, err = cli("export", tmp_path / "run", "--to", "transformers", "--output", tmp_path / "out")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["1"] == "cross"
    check_same_input(tmp_path / "out", tmp_path / "run")
    code, _, err = cli("export", tmp_path / "run", "--to", "timm", "--output", tmp_path / "other")
    assert code == 2 and "is a model of transformers" in err


def answers(to: str, path: Path, adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """What an exported model of two classes says."""
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert session.get_modelmeta().custom_metadata_map["temperature"] == "1.0"
        return torch.from_numpy(session.run(None, {"pixels": x.numpy()})[0])
    backbone = open_backbone(str(adapter.info["base"]["id"]))
    backbone.new_head(2, 0)
    if to == "peft":
        from peft import PeftModel

        return PeftModel.from_pretrained(backbone.model, str(path)).eval()(x)
    if to == "timm":
        import timm

        return timm.create_model(f"local-dir:{path}", pretrained=True).eval()(x)
    backbone.model.load_state_dict(load_file(path))
    return backbone.model(x)


@pytest.mark.parametrize(
    ("to", "multi_label"),
    [("timm", False), ("state-dict", False), ("state-dict", True), ("peft", False), ("onnx", False)],
)
@torch.no_grad()
def test_probabilities_of_exports_are_those_of_predict(
    tiny_vit: Path, tmp_path: Path, to: str, multi_label: bool
) -> None:
    for needed in {"peft": ("peft",), "onnx": ("onnxruntime", "onnxscript")}.get(to, ()):
        pytest.importorskip(needed)
    adapter = adapter_of(tiny_vit, ("a", "b"), temperature=2.5, multi_label=multi_label)
    native.write(adapter, tmp_path / "adapter.safetensors")
    output = tmp_path / {"state-dict": "model.safetensors", "onnx": "model.onnx"}.get(to, "model")
    export(tmp_path / "adapter.safetensors", output, to)
    x, classifier = torch.randn(3, 3, 32, 32), vl.load_classifier(adapter)
    want = classifier.tasks["default"].probabilities(torch.stack(classifier.logits(x)))
    logits = answers(to, output, adapter, x)
    assert torch.allclose(logits.sigmoid() if multi_label else logits.softmax(1), want, atol=1e-4)


@pytest.mark.parametrize("to", ["timm", "state-dict", "peft", "onnx"])
def test_an_export_that_answers_otherwise_leaves_nothing(
    tiny_vit: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for needed in {"peft": ("peft",), "onnx": ("onnxruntime", "onnxscript")}.get(to, ()):
        pytest.importorskip(needed)
    native.write(adapter_of(tiny_vit, ("a", "b")), tmp_path / "adapter.safetensors")
    place = tmp_path / "place"
    place.mkdir()
    export(tmp_path / "adapter.safetensors", place / "older", to)
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    monkeypatch.setattr("visionlora.pipelines.export.TOLERANCE", -1.0)
    for output in (place / "older", place / "new" / "model"):
        with pytest.raises(vl.VisionLoRAError, match=r"would give other answers than the adapter .* was not written"):
            export(tmp_path / "adapter.safetensors", output, to, overwrite=True)
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before and not (place / "new").exists()


def test_an_export_in_a_folder_that_is_there_leaves_other_files_alone(tiny_vit: Path, tmp_path: Path) -> None:
    native.write(adapter_of(tiny_vit, ("a", "b")), tmp_path / "adapter.safetensors")
    output = tmp_path / "deep" / "model"
    exported = export(tmp_path / "adapter.safetensors", output, "timm")
    assert exported.how == f"timm.create_model({f'local-dir:{output}'!r}, pretrained=True)"
    (output / "notes.txt").write_text("mine")
    (output / "config.json").write_text("{}")
    export(tmp_path / "adapter.safetensors", output, "timm", overwrite=True)
    assert {p.name for p in output.iterdir()} == {"notes.txt", "config.json", "model.safetensors"}
    assert json.loads((output / "config.json").read_text())["label_names"] == ["a", "b"]
    assert [p.name for p in output.parent.iterdir()] == ["model"]


def learned(shapes: Path, output: Path, **settings: object) -> Path:
    """The folder of a run of one step."""
    own = {"steps": 1, "rank": 2, "baselines": ("none",), **settings}
    return vl.classify(vl.ClassifyConfig(images=str(shapes), output=str(output), **own)).folder


def check_same_input(exported: Path, run: Path) -> None:
    """The processor beside the model sees a picture that is no square as training did."""
    from transformers import AutoImageProcessor

    from visionlora.data.preprocess import Preprocessing

    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((200, 100), Image.Resampling.BICUBIC)
    own = Preprocessing.from_dict(load_adapter(run).info["classifier"]["preprocessing"])
    theirs = AutoImageProcessor.from_pretrained(exported)(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(theirs, own.batch(own.stored(picture)[None]), rtol=0, atol=0.02)


@pytest.mark.parametrize("shown", [{"shortest_edge": 32}, {"height": 32, "width": 32}, {"shortest_edge": 40}])
def test_an_export_sees_pictures_as_its_base_did(shapes: Path, tmp_path: Path, shown: dict[str, int]) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
                       image_size=32, patch_size=8)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    ViTImageProcessor(size=shown, do_center_crop=True, crop_size=32).save_pretrained(tmp_path / "base")
    run = learned(shapes, tmp_path / "run", model=str(tmp_path / "base"))
    export(run, tmp_path / "out", "transformers")
    check_same_input(tmp_path / "out", run)


@pytest.mark.parametrize("method", ["full", "linear-probe", "rslora", "lora+", "dora", "adalora", "vera", "ia3"])
def test_every_method_trains_and_predicts(shapes: Path, tiny_vit: Path, tmp_path: Path, method: str) -> None:
    config = vl.ClassifyConfig(images=str(shapes), model=str(tiny_vit), steps=3, method=method, rank=2, batch_size=8,
                               output=str(tmp_path / "run"), baselines=("none",))  # fmt: skip
    result = vl.classify(config)
    assert [c.name for c in result.contenders] == [method]
    again = build(ClassifyConfig, read_yaml(str(result.folder / "config.yaml")))
    assert (again.targets == "auto") == (method in ("full", "linear-probe")), (
        "which have none, so that none is left aside"
    )
    if method == "adalora":  # its ranks are at their budget in the end alone
        assert json.loads((result.folder / "metrics.json").read_text())["best_step"] == 3
    (found,) = vl.load_classifier(result.adapter).predict(shapes / "circle" / "00.png", top_k=3)
    assert set(found.labels) == {"circle", "cross", "square"} and sum(found.probabilities) == pytest.approx(1)


def test_all_the_options_of_training_together(cli, shapes: Path, tiny_vit: Path, tmp_path: Path) -> None:
    code, out, err = cli(
        "classify", "--images", shapes, "--model", tiny_vit, "--steps", 30, "--rank", "auto", "rank_budget=2", "--find-rate",
        "--augment", "rand", "--class-weights", "auto", "mixup=0.2", "cutmix=1", "erasing=0.25", "label_smoothing=0.1",
        "focal_gamma=1", "balanced_sampling=true", "ema_decay=0.9", "layer_decay=0.8", "patience=2", "evaluations=15",
        "select_by=macro_f1", "gradient_accumulation=2", "head_init=random", "--precision", "bf16", "--output", "run",
    )  # fmt: skip
    assert code == 0, err
    assert "Mean rank by block" in out and "Learning rate:" in out and (tmp_path / "run" / "rate.png").exists()
    assert "macro_f1 on 9 held-out pictures" in out


def test_batches_too_small_for_the_search_keep_the_usual_rate(
    cli, shapes: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    code, out, err = cli(
        "classify", "--images", shapes, "--model", tiny_vit, "--steps", 2, "--rank", 2, "--find-rate", "--batch-size", 2,
        "baselines=none", "--output", "run",
    )  # fmt: skip
    assert code == 0, err
    assert "the usual one: none of those tried" in out and "A batch_size above 2" in out
    kept = (tmp_path / "run" / "config.yaml").read_text().splitlines()
    assert {"learning_rate: 0.01", "head_learning_rate: 0.001"} <= set(kept)
    assert (tmp_path / "run" / "rate.png").exists()


@pytest.mark.parametrize(
    "settings",
    [{"init": "pissa"}, {"init": "orthogonal", "basis_index": 1}, {"rank": "auto", "rank_budget": "2"}],
    ids=["pissa", "basis", "rank auto"],
)
def test_a_start_that_full_fine_tuning_has_not(
    shapes: Path, tiny_vit: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    """It ended the run when the adapter was trained."""
    own = {"images": str(shapes), "model": str(tiny_vit), "steps": 2, "rank": 2, **settings}
    config = vl.ClassifyConfig(**own, baselines=("full",), output=str(tmp_path / "run"))
    assert [c.name for c in vl.classify(config).contenders] == ["lora", "full"]


def test_a_random_backbone_is_the_same_again(shapes: Path, tmp_path: Path) -> None:
    run = learned(shapes, tmp_path / "run", model="vit_tiny_patch16_224", weights="random")
    (found,) = vl.load_classifier(run).predict(shapes / "circle" / "00.png")
    assert found.label in ("circle", "cross", "square")


def test_weights_that_were_moved(
    cli, shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    own, picture = tmp_path / "own.safetensors", shapes / "circle" / "00.png"
    shutil.copy(tiny_vit / "model.safetensors", own)
    monkeypatch.chdir(tmp_path)
    run = learned(shapes, tmp_path / "run", model=str(tiny_vit), weights="own.safetensors")
    assert load_adapter(run).info["base"]["weights"] == str(own), "another folder can be the working one"
    own.rename(tmp_path / "moved.safetensors")
    with pytest.raises(vl.VisionLoRAError, match="There is no file"):
        vl.load_classifier(run)
    code, _, err = cli("predict", "--adapter", "run", picture, "--weights", "moved.safetensors")
    assert code == 0, err
    export(run, tmp_path / "out", "timm", weights="moved.safetensors")


@pytest.mark.parametrize(
    ("name", "heads", "more", "targets", "fitting", "not_fitting"),
    [
        ("dla46_c", "fc", {}, "conv", "timm", "peft"),
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"],
         {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}, "attn", "state-dict", "timm"),
    ],
)  # fmt: skip
def test_heads_that_are_not_one_layer(
    cli,
    shapes: Path,
    tmp_path: Path,
    name: str,
    heads: object,
    more: dict,
    targets: str,
    fitting: str,
    not_fitting: str,
) -> None:
    """A convolution before the flatten, and two heads of which the mean is taken."""
    (tmp_path / "model").mkdir()
    cfg = {"input_size": [3, 32, 32], "classifier": heads, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0,
           "interpolation": "bicubic"}  # fmt: skip
    config = {"architecture": name, "num_classes": 7, "model_args": more, "pretrained_cfg": cfg}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    run = learned(shapes, tmp_path / "run", model=str(tmp_path / "model"), weights="random", targets=targets)
    code, out, err = cli("predict", "--adapter", run, shapes / "circle" / "00.png", "--json")
    assert code == 0 and json.loads(out)[0]["label"], err
    assert export(run, tmp_path / f"out.{fitting}", fitting).difference < 1e-3
    with pytest.raises(vl.VisionLoRAError, match="has no place for one linear head"):
        export(run, tmp_path / "no", not_fitting)


def test_a_backbone_without_attention_learns_in_every_layer(shapes: Path, tmp_path: Path) -> None:
    ears = Ears()
    config = vl.ClassifyConfig(images=str(shapes), output=str(tmp_path / "run"), model="test_efficientnet", image_size=32,
                               weights="random", steps=1, rank=2, baselines=("none",))  # fmt: skip
    run = vl.classify(config, ears).folder
    assert "Targets: all, as no attention is known of test_efficientnet; attn.qv where there is." in ears.lines
    assert "targets: all\n" in (run / "config.yaml").read_text()
    adapted = load_adapter(run).modules
    assert {"model.conv_stem", "model.blocks.0.0.conv", "model.conv_head"} <= set(adapted)
    assert adapted["model.classifier.weight"].kind == "full" and "model.classifier" not in adapted


def test_two_heads_of_transformers_give_way_to_one(shapes: Path, tmp_path: Path) -> None:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    torch.manual_seed(0)
    config = DeiTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32,
                        patch_size=8)  # fmt: skip
    DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "base")
    run = learned(shapes, tmp_path / "run", model=str(tmp_path / "base"))
    found = vl.load_classifier(run).predict(shapes / "circle" / "00.png", top_k=3)
    assert sum(found[0].probabilities) == pytest.approx(1)
    assert export(run, tmp_path / "model.safetensors", "state-dict").difference < 1e-3
    with pytest.raises(vl.VisionLoRAError, match=r"has no place for one linear head.*which transformers cannot"):
        export(run, tmp_path / "no", "transformers")


def test_a_dry_run_says_what_the_run_would_do_and_writes_nothing(
    cli, shapes: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = ("classify", "--images", shapes, "--model", tiny_vit, "--steps", 21, "--batch-size", 8, "--rank", "auto")
    code, out, err = cli(*words, "--dry-run")
    assert code == 0, err
    assert "Targets     attn.qv: 4 layers" in out and "Steps       21 of 8 pictures, 4.0 times over" in out
    assert "Pictures    42 to train on, 9 to choose by, 9 to test on" in out
    assert (
        "Classes     3, with pictures: circle 20, cross 20, square 20" in out
        and "Rank auto is counted as rank 8" in out
    )
    assert sorted(tmp_path.rglob("*")) == before
    code, out, err = cli(*words, "--dry-run", "--json", "--rank", 2)
    found = json.loads(out)
    assert code == 0 and found["looks"] == 11 and found["step_seconds"] > 0 < found["peak_bytes"], err
    code, _, err = cli(*words, "--dry-run", "--targets", "atn")
    assert code == 2 and "Target 'atn' reaches no layer" in err


@pytest.mark.parametrize(("method", "what"), [("full", "every parameter"), ("linear-probe", "the head alone")])
def test_a_dry_run_of_a_method_without_layers(shapes: Path, tiny_vit: Path, method: str, what: str) -> None:
    given = {"images": str(shapes), "model": str(tiny_vit), "steps": 1, "method": method, "targets": "attn.q"}
    ears = Ears()
    found = classify_dry_run(build(ClassifyConfig, given), ears)
    assert found.lines()[1].startswith(f"Targets     {what}: {found.trained_parameters:,} parameters train")
    assert ears.lines[0] == f"Method {method} trains {what}, so this is left aside: targets=attn.q."


def test_a_run_whose_heat_maps_cannot_be_drawn_is_finished_all_the_same(
    shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("visionlora.report.classify_fitting.overlay_sheet", too_large)
    ears = Ears()
    config = vl.ClassifyConfig(images=str(shapes), output=str(tmp_path / "run"), model=str(tiny_vit), steps=1)
    assert vl.classify(config, ears).report.is_file()
    warning = "Warning: what the model looks at cannot be shown (OutOfMemoryError: out of memory)."
    assert ears.lines.count(warning) == 1 and not (tmp_path / "run" / "overlays.png").exists()


def test_no_augmentation_mirrors_nothing_unless_it_is_asked_for(shapes: Path, tiny_vit: Path, tmp_path: Path) -> None:
    settled = {}
    for augment, flip in (("none", None), ("affine", None), ("light", None), ("none", True)):
        run = learned(shapes, tmp_path / f"{augment}-{flip}", model=str(tiny_vit), augment=augment, flip=flip)
        settled[augment, flip] = "flip: true" in (run / "config.yaml").read_text()
    assert settled == {("none", None): False, ("affine", None): False, ("light", None): True, ("none", True): True}


@pytest.mark.parametrize(
    ("settings", "expected"), [({"method": "full"}, True), ({"baselines": ("full",)}, True), ({}, False)]
)
def test_several_processes_expect_unused_parameters_where_all_train(
    shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, expected: bool
) -> None:
    """Such as the mask token of DINOv2, at which torch's DistributedDataParallel stops."""

    def seen(*_: object, parts_stop: bool = False) -> None:
        raise RuntimeError(f"parts_stop {parts_stop}")

    monkeypatch.setattr("visionlora.pipelines.classify.new_accelerator", seen)
    with pytest.raises(RuntimeError, match=f"parts_stop {expected}"):
        learned(shapes, tmp_path / "run", model=str(tiny_vit), **settings)


def test_a_head_alone_is_no_folder_of_peft(shapes: Path, tiny_vit: Path, tmp_path: Path) -> None:
    run = learned(shapes, tmp_path / "run", model=str(tiny_vit), method="linear-probe")
    with pytest.raises(vl.VisionLoRAError, match="A PEFT folder holds at least one adapted layer"):
        export(run, tmp_path / "p", "peft")


def test_pictures_of_another_size_than_the_backbones_own(cli, shapes: Path, tiny_vit: Path, tmp_path: Path) -> None:
    """The size goes into the adapter: predict, export and a run that learns on need not be told."""
    run = learned(shapes, tmp_path / "run", model=str(tiny_vit), image_size=48)
    base, about = (load_adapter(run).info[part] for part in ("base", "classifier"))
    assert base["image_size"] == about["preprocessing"]["size"] == 48
    classifier = vl.load_classifier(run)
    files = sorted((shapes / "cross").iterdir())
    found = classifier.predict(files)
    assert classifier.backbone.preprocessing.size == 48

    (written := tmp_path / "timm").mkdir()
    exported = export(run, written / "model", "timm")
    assert exported.difference is not None and exported.difference < 1e-4
    again = learned(shapes, tmp_path / "again", start_from=str(run), image_size=None)
    assert load_adapter(again).info["base"]["image_size"] == 48
    assert "image_size: 48" in (again / "config.yaml").read_text()
    own = learned(shapes, tmp_path / "own", start_from=str(run), image_size=32)
    assert "image_size" not in load_adapter(own).info["base"], "its own size again"

    with pytest.raises(vl.VisionLoRAError, match=r"trained on pictures of 32 px, and .* is open for 48 px"):
        classifier.add("own", own)
    assert classifier.predict(files) == found
    code, _, err = cli("classify", "--images", shapes, "--model", tiny_vit, "--image-size", 50)
    assert code == 2 and "try 48 or 56" in err


def test_a_resumed_run_has_the_same_backbone(cli, shapes: Path, tiny_vit: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    own = Path(shutil.copytree(tiny_vit, tmp_path / "vit"))
    state = tmp_path / "cut" / "checkpoints" / "state.pt"
    run_until(command_for(shapes, own, "cut"), tmp_path, state.exists, signal.SIGKILL)
    tensors = load_file(own / "model.safetensors")
    save_file({n: t + 0.01 for n, t in tensors.items()}, own / "model.safetensors")
    code, _, err = cli("classify", "--resume", "cut")
    assert code == 2 and "has changed since it was cut off (the weights of the base model)" in err


def test_several_labels_from_a_table(cli, shapes: Path, tiny_vit: Path, tmp_path: Path) -> None:
    rows = ["file_name,dark,round"]
    for path in sorted(shapes.glob("*/*.png")):
        dark = int(np.asarray(Image.open(path)).mean() < 165)
        rows.append(f"{path.relative_to(shapes)},{dark},{int(path.parent.name == 'circle')}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    code, out, err = cli("classify", "--images", shapes, "--table", "labels.csv", "label_columns=[dark,round]", "--model",
                         tiny_vit, "--steps", 4, "--output", "run")  # fmt: skip
    assert code == 0, err
    assert "map on" in out and load_adapter(tmp_path / "run").info["classifier"]["multi_label"] is True
    own = list(csv.DictReader((tmp_path / "run" / "predictions.csv").read_text().splitlines()))
    right = [all((float(r[f"p_{c}"]) > 0.5) == (r[c] == "1") for c in ("dark", "round")) for r in own]
    kept = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert sum(right) / len(own) == pytest.approx(kept["subset_accuracy"]) and len(own) == kept["pictures"]
    code, out, err = cli("predict", "--adapter", "run", shapes, "--json")
    assert code == 0 and all({t["label"] for t in p["top"]} <= {"dark", "round"} for p in json.loads(out)), err


# ------------------------------------------------------------------------------------------------------------- resume


def run_until(command: list[str], folder: Path, moment, signal_number: int) -> tuple[int, str]:
    """Starts a run and sends a signal when `moment` says so."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while not moment() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal_number)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def command_for(shapes: Path, model: Path, output: str) -> list[str]:
    words = ["classify", "--images", shapes, "--model", model, "--steps", 60, "evaluations=20", "--rank", 2,
             "ema_decay=0.9", "dropout=0.1", "--output", output, "--baselines", "none"]  # fmt: skip
    return [sys.executable, "-m", "visionlora", *map(str, words)]


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_cut_off_ends_in_the_same_bytes(
    cli, shapes: Path, tiny_vit: Path, tmp_path: Path, signal_number: int
) -> None:
    whole = subprocess.run(command_for(shapes, tiny_vit, "whole"), cwd=tmp_path, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    lines = tmp_path / "cut" / "metrics.jsonl"
    code, out = run_until(
        command_for(shapes, tiny_vit, "cut"), tmp_path,
        lambda: lines.exists() and len(lines.read_bytes().splitlines()) > 12, signal_number,
    )  # fmt: skip
    assert not (tmp_path / "cut" / "report.html").exists(), "it was cut off before its end"
    if signal_number == signal.SIGINT:
        assert code == 130 and "visionlora classify --resume cut" in out and "Traceback" not in out
    before = torch.load(tmp_path / "cut" / "checkpoints" / "state.pt", weights_only=True)["seconds"]
    code, out, err = cli("classify", "--resume", "cut")
    assert code == 0, err
    assert "Going on at step" in out
    own = next(iter(json.loads((tmp_path / "cut" / "metrics.json").read_text())["contenders"].values()))
    assert own["seconds"] > before > 0, "the time before it was cut off counts"
    assert (tmp_path / "cut" / "adapter.safetensors").read_bytes() == (
        tmp_path / "whole" / "adapter.safetensors"
    ).read_bytes()
    whole_lines, cut_lines = ((tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("whole", "cut"))
    assert [json.loads(line)["loss"] for line in cut_lines] == [json.loads(line)["loss"] for line in whole_lines]
    whole_looks, cut_looks = ((tmp_path / n / "validation.jsonl").read_bytes() for n in ("whole", "cut"))
    assert cut_looks == whole_looks
    code, _, err = cli("classify", "--resume", "cut")
    assert code == 2 and "is finished" in err


def test_losses_that_are_not_finite_cost_the_steps_that_had_them_alone(
    cli, shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fit, "advance", not_finite_after(5, 0.005))
    asked = vl.ClassifyConfig(
        images=str(shapes),
        model=str(tiny_vit),
        steps=10,
        learning_rate=0.009,
        evaluations=1,
        output=str(tmp_path / "run"),
    )
    with pytest.raises(TrainingError, match="The loss became nan at step 8") as caught:
        vl.classify(asked)
    assert str(caught.value).endswith(
        f"classify --resume {tmp_path / 'run'} --force learning_rate=0.003 head_learning_rate=0.00033"
    )
    code, out, err = cli("classify", "--resume", "run", "--force", "learning_rate=0.003", "head_learning_rate=0.00033")
    assert code == 0 and "Going on at step 7 of 10." in out, err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] is None for line in lines] == [False] * 5 + [True] * 2 + [False] * 3


class Killed(BaseException):
    """As sudden as a power cut, within one process."""


def killed(self: object) -> None:
    """In place of a method."""
    raise Killed


def test_killed_before_its_first_checkpoint_the_same_command_runs_as_if_it_had_not_been(
    shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate that it found and the steps that its epochs became were settings that nobody may give again."""

    def asked(output: Path) -> vl.ClassifyConfig:
        return vl.ClassifyConfig(
            images=str(shapes), model=str(tiny_vit), output=str(output), epochs=3, evaluations=1, baselines=("none",),
            find_rate=True, targets="auto", resume="auto",
        )  # fmt: skip

    with monkeypatch.context() as broken, pytest.raises(Killed):
        broken.setattr(Fitting, "checkpoint", killed)
        vl.classify(asked(tmp_path / "cut"))
    ears = Ears()
    vl.classify(asked(tmp_path / "cut"), ears)
    assert not any("starts with changes" in line for line in ears.lines)
    vl.classify(asked(tmp_path / "whole"))
    for name in ("config.yaml", "adapter.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def of_eight_steps(images: Path, model: Path, output: Path) -> vl.ClassifyConfig:
    """Two moments, after steps 4 and 8."""
    return vl.ClassifyConfig(
        images=str(images), model=str(model), output=str(output), steps=8, evaluations=2, baselines=("none",)
    )


@pytest.mark.parametrize(("lost", "looked_at"), [(7, 8), (3, 5)])
def test_a_moment_whose_step_is_lost_is_made_up_for(
    shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int, looked_at: int
) -> None:
    """Nothing was evaluated then: lost in the last step, all that was learned since the last moment was thrown away."""
    monkeypatch.setattr(Fit, "advance", not_finite_after(lost, 0, until=lost + 1))
    result = vl.classify(of_eight_steps(shapes, tiny_vit, tmp_path / "run"))
    rows = [json.loads(line) for line in (result.folder / "validation.jsonl").read_text().splitlines()]
    assert looked_at in [row["step"] for row in rows] and len(rows) == 3


def test_a_moment_that_is_made_up_for_at_the_end_is_owed_no_more(
    shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken, pytest.raises(Killed):
        broken.setattr(Fit, "advance", not_finite_after(7, 0, until=8))
        broken.setattr(Logbook, "end", killed)
        vl.classify(of_eight_steps(shapes, tiny_vit, tmp_path / "run"))
    vl.classify(vl.ClassifyConfig(images="x", resume=str(tmp_path / "run")))
    rows = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 4, 8]


def test_a_last_step_after_ruined_weights_ends_the_run_in_its_last_good_state(
    shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fit, "advance", not_finite_after(7, 0, until=8))
    monkeypatch.setattr(Fit, "first_loss", lambda self, task: math.nan)
    asked = of_eight_steps(shapes, tiny_vit, tmp_path / "run")
    with pytest.raises(TrainingError, match=r"The last step was skipped.*What was learned up to step 4 is kept"):
        vl.classify(asked)


def test_a_baseline_that_cannot_be_trained_costs_the_run_its_figures_alone(
    shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fit, "advance", not_finite_after(1, 0.0009))
    asked = vl.ClassifyConfig(
        images=str(shapes), model=str(tiny_vit), steps=4, learning_rate=0.0005, evaluations=1,
        baselines=("full", "probe"), output=str(tmp_path / "run"),
    )  # fmt: skip
    ears = Ears()
    result = vl.classify(asked, ears)
    assert [one.name for one in result.contenders] == ["lora", "linear-probe"]
    why = "The baseline full is missing: The loss became nan at step 4."
    assert any(line.startswith(f"Warning: {why}") for line in ears.lines)
    assert why in result.report.read_text(encoding="utf-8") and result.adapter.is_file()
    assert set(json.loads((result.folder / "metrics.json").read_text())["contenders"]) == {"lora", "linear-probe"}


@pytest.mark.parametrize(("steps", "what"), [(4, "The loss became nan at step 3."), (1, "The last step was skipped")])
def test_a_baseline_that_is_not_finite_from_the_first_step_on_does_not_blame_its_rate(
    shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, what: str
) -> None:
    """Its rate is not even a setting."""
    monkeypatch.setattr(Fit, "advance", not_finite_after(0, 0.0009))
    monkeypatch.setattr(Fit, "first_loss", lambda self, task: math.nan)
    asked = vl.ClassifyConfig(
        images=str(shapes), model=str(tiny_vit), steps=steps, learning_rate=0.0005, evaluations=1,
        baselines=("full",), output=str(tmp_path / "run"),
    )  # fmt: skip
    ears = Ears()
    vl.classify(asked, ears)
    (line,) = (line for line in ears.lines if line.startswith(f"Warning: The baseline full is missing: {what}"))
    assert "so the learning rate is not the cause" in line and "bf16), the base model and the pictures." in line
    assert "too high" not in line and "new run" not in line and "ruined" not in line


def test_a_run_that_is_interrupted_in_a_baseline_says_how_to_go_on(
    shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ears, add = Ears(), Logbook.add

    def add_and_interrupt(self: Logbook, progress: Progress, what: str, detail: str) -> None:
        add(self, progress, what, detail)
        if what == "Training full":
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(Logbook, "add", add_and_interrupt)
        vl.classify(dataclasses.replace(of_eight_steps(shapes, tiny_vit, tmp_path / "run"), baselines=("full",)), ears)
    folder = tmp_path / "run"
    assert ears.lines[-2:] == [
        "Stopping after this step; once more stops at once.",
        f"Interrupted after the training, of which all is kept. Go on with: visionlora classify --resume {folder}",
    ]
    result = vl.classify(vl.ClassifyConfig(images="x", resume=str(folder)))
    assert [one.name for one in result.contenders] == ["lora", "full"]


def test_a_run_that_is_interrupted_before_its_test_says_how_to_go_on(
    shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    ears, folder = Ears(), tmp_path / "run"
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr("visionlora.report.classify_fitting.fit_temperature", interrupted)
        vl.classify(of_eight_steps(shapes, tiny_vit, folder), ears)
    assert ears.lines[-1] == (
        f"Interrupted after the training, of which all is kept. Go on with: visionlora classify --resume {folder}"
    )
    assert vl.classify(vl.ClassifyConfig(images="x", resume=str(folder))).adapter.is_file()


def test_a_run_that_loses_a_process_in_a_baseline_says_how_to_go_on(
    shapes: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, folder = Logbook.add, tmp_path / "run"

    def add_and_lose(self: Logbook, progress: Progress, what: str, detail: str) -> None:
        add(self, progress, what, detail)
        if what == "Training full":
            raise ProcessLost("Another process has ended.")

    monkeypatch.setattr(Logbook, "add", add_and_lose)
    with pytest.raises(ProcessLost) as caught:
        vl.classify(dataclasses.replace(of_eight_steps(shapes, tiny_vit, folder), baselines=("full",)))
    assert str(caught.value) == (
        f"Another process has ended. All of the training is kept.\nGo on with: visionlora classify --resume {folder}"
    )


def test_a_run_that_is_finished_already_tells_the_same(cli, shapes: Path, tiny_vit: Path) -> None:
    words = ("classify", "--images", shapes, "--model", tiny_vit, "--steps", 2, "--output", "run", "--json")
    code, out, err = cli(*words)
    assert code == 0, err
    code, again, err = cli(*words, "--resume", "auto")
    assert code == 0 and "is finished; nothing is left to do" in err
    assert json.loads(again) == {**json.loads(out), "finished": True}


def test_a_resumed_run_keeps_its_settings_and_pictures(cli, shapes: Path, tiny_vit: Path, tmp_path: Path) -> None:
    import shutil

    own = tmp_path / "own"
    shutil.copytree(shapes, own)
    state = tmp_path / "cut" / "checkpoints" / "state.pt"
    run_until(command_for(own, tiny_vit, "cut"), tmp_path, state.exists, signal.SIGKILL)
    code, _, err = cli("classify", "--resume", "cut", "--seed", 5)
    assert code == 2 and "- seed: 0 -> 5 (can never change: it decides which pictures are kept apart)" in err
    (own / "circle" / "00.png").unlink()
    code, _, err = cli("classify", "--resume", "cut")
    assert (code == 2 and "now be those that judge it" in err) or "1 removed, 0 with other classes" in err
    code, _, err = cli("classify", "--resume", "nowhere")
    assert code == 2 and "is no run that can be resumed" in err
