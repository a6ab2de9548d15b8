"""What a classify run says about itself: in the adapter's header and in the run folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visionlora import __version__
from visionlora.config import to_yaml
from visionlora.config.choices import WHOLE
from visionlora.data.images import printable
from visionlora.data.learned import Learned, history
from visionlora.data.wording import count_of
from visionlora.lora.adapter import Adapter
from visionlora.lora.config import AdapterConfig
from visionlora.models.vision import EMBEDDED
from visionlora.report.card import CLASSIFIER_TAGS, model_card
from visionlora.report.classify_charts import draw_confusion, draw_reliability
from visionlora.report.classify_page import ClassifyReport, Contender, report_page
from visionlora.report.curves import draw_curves
from visionlora.report.environment import environment
from visionlora.report.grid import draw_grid
from visionlora.report.listener import Listener
from visionlora.report.resume import LearnedFrom, changed
from visionlora.report.runfolder import RunFolder
from visionlora.training.loop import Progress, process_state
from visionlora.vision.explain import attention_rollout, grad_cam, overlay, supports
from visionlora.vision.material import Material
from visionlora.vision.metrics import (
    AnyMetrics,
    Bin,
    Metrics,
    MultiLabelMetrics,
    expected_calibration_error,
    reliability,
)

SHOWN = 12
"""Pictures on a sheet at most."""
PAYS = 0.005
"""An adapter that is not this much better than a linear probe does not pay."""
SIDES = ("train", "val", "test")


@dataclass(frozen=True)
class Finished:
    """One contender, trained and tested."""

    contender: Contender
    path: Path
    """Of its adapter file."""
    logits: Tensor
    """Of the pictures that the report is about, (n, c)."""
    temperature: float
    step: int
    """Of the best moment."""
    history: tuple[Progress, ...]
    evaluations: tuple[tuple[int, float, float], ...]
    """(step, score, loss) on the validation pictures."""
    overlays: Image.Image | None
    """What it looks at."""

    @property
    def metrics(self) -> AnyMetrics:
        """On the pictures that the report is about."""
        assert self.contender.test is not None
        return self.contender.test


def header(
    material: Material, adapter: AdapterConfig, fingerprints: Mapping[str, Any], step: int, temperature: float,
    first: Adapter | None, older: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What the adapter file says about itself: all that `predict` needs.

    Args:
        material: backbone, pictures and settings.
        adapter: what was trained.
        fingerprints: of the backbone.
        step: of the best moment.
        temperature: of its probabilities.
        first: what it learned on from.
        older: the fingerprints by the names of an older version of the backbone's library.
    """
    config, backbone, data = material.config, material.backbone, material.data
    base: dict[str, Any] = {"id": backbone.id, "fingerprints": dict(fingerprints)}
    if older and older != fingerprints:
        base["older_fingerprints"] = dict(older)
    sha256, sides = material.checked.sha256, material.splits
    own = Learned.of(*([sha256[i] for i in side] for side in (sides.train, sides.val)))
    before = (None, None) if first is None else (config.start_from, first.info)
    if backbone.weights is not None:
        base["weights"] = backbone.weights
    if backbone.image_size is not None:
        base["image_size"] = backbone.image_size
    return {
        "version": __version__,
        "base": base,
        "method": adapter.method,
        "config": adapter.to_dict(),
        "classifier": {
            "classes": list(data.classes),
            "multi_label": data.multi_label,
            "preprocessing": backbone.preprocessing.to_dict(),
            "temperature": temperature,
            "head": backbone.head,
        },
        "training": {
            "steps": step,
            "pictures": len(material.splits.train),
            "batch": (config.batch_size or 1) * config.gradient_accumulation * process_state().num_processes,
            "learning_rate": config.learning_rate,
            "seed": config.seed,
            "data_sha256": material.data_hash,
            **history(own, *before),
        },
    }


def learned_from(material: Material, base: str) -> LearnedFrom:
    """What a run learns from, and by which pictures it is judged."""
    data, sides = material.data, {i: side for side in SIDES for i in getattr(material.splits, side)}
    pictures = tuple(
        (digest, sides.get(i, "unused"), " ".join(data.classes[label] for label in item.labels))
        for i, (digest, item) in enumerate(zip(material.checked.sha256, data.items, strict=True))
    )
    return LearnedFrom(material.data_hash, pictures, tuple(data.classes), "classes", base)


# -------------------------------------------------------------------------------------------------------------- sheets


@dataclass(frozen=True)
class Decision:
    """What the model says of a picture, or of one label of it."""

    row: int
    """Of the picture among those that the report is about."""
    label: int
    probability: float
    """Of the label."""
    said: bool
    """Whether the model gives the picture this label."""
    right: bool


def decisions(material: Material, logits: Tensor) -> list[Decision]:
    """Of each picture its class; with several labels, each that is said or missed. The surest come first."""
    truth = torch.from_numpy(material.labels(material.looked_at))
    if material.data.multi_label:
        every = logits.sigmoid()
        rows, labels = ((every > 0.5) | (truth > 0)).nonzero(as_tuple=True)
        probability = every[rows, labels]
        said = probability > 0.5
        right = said & (truth[rows, labels] > 0)
    else:
        probability, labels = logits.softmax(1).max(1)
        rows, said, right = torch.arange(len(truth)), torch.ones(len(truth), dtype=torch.bool), labels == truth
    order = torch.where(said, probability, 1 - probability).argsort(descending=True, stable=True)
    found = zip(*(t[order].tolist() for t in (rows, labels, probability, said, right)), strict=True)
    return [Decision(*one) for one in found]


def wording(material: Material, decision: Decision, *, sure: bool) -> str:
    """A decision as a caption; with its probability where `sure`."""
    name = material.data.classes[decision.label]
    percent = f"{100 * decision.probability:.0f} %" if sure else ""
    if not decision.said:
        return f"misses {name}" + (f" ({percent})" if sure else "")
    told = f"{name} {percent}".rstrip()
    if decision.right:
        return told
    return ("says " if material.data.multi_label else "") + f"{told}, is {names_of(material, decision.row)}"


def names_of(material: Material, row: int) -> str:
    """The true classes of a picture that the report is about."""
    item = material.data.items[material.looked_at[row]]
    return ", ".join(material.data.classes[i] for i in item.labels) or "none"


def shown_picture(material: Material, row: int) -> Image.Image:
    """A picture as the model sees it, before normalisation."""
    stored = torch.from_numpy(material.checked.pictures.stored([material.looked_at[row]])).permute(0, 3, 1, 2)
    return Image.fromarray(material.backbone.preprocessing.cropped(stored)[0].permute(1, 2, 0).contiguous().numpy())


def sheet_of(pictures: Sequence[Image.Image], labels: Sequence[str], caption: str, across: int = 6) -> Image.Image:
    """Pictures with a line below each, several rows of them."""
    rows = [list(range(start, min(start + across, len(pictures)))) for start in range(0, len(pictures), across)]
    sheets = [
        draw_grid(
            [[pictures[i] for i in row]], [""], [labels[i] for i in row], caption=caption if row is rows[-1] else ""
        )
        for row in rows
    ]
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def mistakes_sheet(material: Material, logits: Tensor, temperature: float) -> Image.Image | None:
    """The most confident mistakes, surest first."""
    wrong = [d for d in decisions(material, logits / temperature) if not d.right][:SHOWN]
    if not wrong:
        return None
    labels = [wording(material, d, sure=True) for d in wrong]
    return sheet_of([shown_picture(material, d.row) for d in wrong], labels, "")


def overlay_sheet(material: Material, logits: Tensor) -> Image.Image | None:
    """What the model looks at, as it is now: the surest mistakes first, then the surest hits of different classes."""
    model = material.backbone.model
    ways = supports(model)
    if not ways:
        return None
    found = decisions(material, logits)
    chosen = [d for d in found if not d.right][: SHOWN // 3]
    seen: set[int] = set()
    for d in found:
        if d.right and d.label not in seen and len(chosen) < SHOWN // 2:
            seen.add(d.label)
            chosen.append(d)
    if not chosen:  # no label is there or said
        return None
    x = material.backbone.preprocessing.batch(
        material.checked.pictures.stored([material.looked_at[d.row] for d in chosen])
    )
    x = x.to(next(model.parameters()).device)
    classes = torch.tensor([d.label for d in chosen], device=x.device)
    maps = {
        way: (grad_cam(model, x, classes) if way == "grad-cam" else attention_rollout(model, x)).cpu() for way in ways
    }
    pictures = [shown_picture(material, d.row) for d in chosen]
    rows = [pictures, *([overlay(p, m) for p, m in zip(pictures, maps[way], strict=True)] for way in ways)]
    explained = "named label" if material.data.multi_label else "predicted class"
    titles = {"grad-cam": f"Grad-CAM of the {explained}", "rollout": "attention rollout"}
    return draw_grid(
        rows, ["picture", *(titles[way] for way in ways)], [wording(material, d, sure=False) for d in chosen]
    )


# -------------------------------------------------------------------------------------------------------------- report


def png(picture: Image.Image) -> bytes:
    """The picture as a file."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def warnings_of(material: Material, finished: Sequence[Finished]) -> tuple[str, ...]:
    """What a user should know before using the adapter."""
    found = []
    by_name = {f.contender.name: f for f in finished}
    probe, own, select = by_name.get("linear-probe"), finished[0], material.config.select_by
    if probe is not None and probe is not own:
        before, after = material.selected(probe.metrics), material.selected(own.metrics)
        best = 0.0 if select == "loss" else 1.0
        if before + PAYS > best and after - before > -PAYS:
            found.append(
                f"The linear probe, which trains the head alone, has a {select} of {abs(before):.3f} already "
                f"(baselines/probe.safetensors): on these pictures {own.contender.name} cannot be seen to be better."
            )
        elif after - before < PAYS:
            found.append(
                f"{own.contender.name} does not pay on this backbone: {select} is {abs(after) - abs(before):+.3f} against the "
                f"linear probe, which trains the head alone (baselines/probe.safetensors). {what_to_try(material, own)}"
            )
        found += worse_labels(material, own, probe)
    full = by_name.get("full")
    if full is not None and material.selected(full.metrics) - material.selected(own.metrics) > 2 * PAYS:
        found.append("Full fine-tuning is clearly better here: a higher rank or more targets may close the gap.")
    if len(material.looked_at) < 100:
        side = material.looked_at_side
        pictures = count_of(len(material.looked_at), f"{side} picture", f"{side} pictures")
        found.append(f"Only {pictures}: the figures are uncertain.")
    return tuple(found)


def worse_labels(material: Material, own: Finished, probe: Finished) -> list[str]:
    """A warning where the moment that ranks the pictures best gives them worse labels than a linear probe."""
    select, ours, theirs = material.config.select_by, own.metrics, probe.metrics
    if not (isinstance(ours, MultiLabelMetrics) and isinstance(theirs, MultiLabelMetrics)) or select != "map":
        return []
    if theirs.micro_f1 - ours.micro_f1 <= 2 * PAYS:
        return []
    return [
        f"The labels that {own.contender.name} gives, those above one half, are worse than the linear probe's: micro_f1 is "
        f"{ours.micro_f1:.3f} against {theirs.micro_f1:.3f}. The best moment was chosen by map, which sees the order of the "
        "pictures alone: select_by=micro_f1 chooses by the labels."
    ]


def what_to_try(material: Material, own: Finished) -> str:
    """After a training that was in vain."""
    config = material.config
    if own.step > 0:
        return "Try a higher rank, more targets (targets=attn,mlp), a longer training, or another backbone."
    augmented = config.augment != "none" or config.flip or config.erasing or config.mixup or config.cutmix
    without = (
        "without augmentation (augment=none), which may change what the classes differ by (size, colour, side), then "
        if augmented
        else ""
    )
    return (
        f"Every step made the validation pictures worse than they were at the start: try {without}at a third of the "
        "learning_rate."
    )


def report(
    run: RunFolder, material: Material, finished: Sequence[Finished], seconds: float, tell: Listener,
    changes: Sequence[Mapping[str, Any]] = (), missing: Sequence[str] = (),
) -> None:  # fmt: skip
    """report.html, metrics.json, predictions.csv, the charts, README.md and run.json.

    `missing` says which baselines are missing, and why.
    """
    own, data, config = finished[0], material.data, material.config
    pictures = charts(run, material, own)
    bins: dict[str, tuple[Bin, ...]] = {"before": (), "after": ()}
    errors: dict[str, float | None] = {"before": None, "after": None}
    if not data.multi_label:
        logits, labels = own.logits.double().numpy(), material.labels(material.looked_at)
        for when, temperature in (("before", 1.0), ("after", own.temperature)):
            bins[when] = reliability(logits, labels, temperature)
            errors[when] = expected_calibration_error(logits, labels, temperature)
        pictures["reliability"] = draw_reliability(bins["before"], bins["after"], errors["before"], errors["after"])
        run.write_bytes("reliability.png", pictures["reliability"])
    warnings = (*missing, *warnings_of(material, finished))
    for warning in warnings:
        tell.say(f"Warning: {warning}")
    page = ClassifyReport(
        title=config.title,
        classes=data.classes,
        adapter_name="adapter.safetensors",
        contenders=tuple(f.contender for f in finished),
        metrics=own.metrics,
        temperature=own.temperature,
        bins_before=bins["before"],
        bins_after=bins["after"],
        ece_before=errors["before"],
        ece_after=errors["after"],
        counts=counts_of(material),
        notes=(data.source, *data.notes, *material.checked.notes, *material.splits.notes),
        config_yaml=to_yaml(config),
        pictures=pictures,
        model_id=material.backbone.id,
        warnings=warnings,
        evaluated_on=material.looked_at_side,
    )
    run.write_text("report.html", report_page(page))
    run.write_json(
        "metrics.json",
        {
            "evaluated_on": material.looked_at_side,
            "temperature": own.temperature,
            "ece_before": errors["before"],
            "ece_after": errors["after"],
            "best_step": own.step,
            "contenders": {f.contender.name: described(f) for f in finished},
            **own.metrics.to_dict(),
        },
    )
    run.write_text("predictions.csv", told_of_each(material, own))
    write_card(run, material, finished, changes)
    run.write_json(
        "run.json",
        {
            **environment(("timm", "torchvision", "transformers", "accelerate")),
            "seed": config.seed,
            "data_sha256": material.data_hash,
            "base": material.backbone.id,
            "seconds": round(seconds, 1),
            "noise_scale": own.history[-1].noise_scale if own.history else None,
            "changes": list(changes),
            "splits": {side: called(material, getattr(material.splits, side)) for side in SIDES},
        },
    )


def told_of_each(material: Material, own: Finished) -> str:
    """CSV: what is said of each picture that the report is about, by which every figure can be computed again.

    A column each for the picture, its label, what is predicted, and the probabilities of both; with several labels, for each
    class whether the picture has it (`CLASS`) and its probability (`p_CLASS`).
    """
    data, scaled = material.data, own.logits.double() / own.temperature
    names = called(material, material.looked_at)
    truth = material.labels(material.looked_at)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if data.multi_label:
        writer.writerow(["path", *data.classes, *(f"p_{name}" for name in data.classes)])
        for name, labels, p in zip(names, truth.tolist(), scaled.sigmoid().tolist(), strict=True):
            writer.writerow([name, *labels, *p])
        return text.getvalue()
    writer.writerow(["path", "label", "predicted", "probability", "probability_of_label"])
    for name, label, p in zip(names, truth.tolist(), scaled.softmax(1), strict=True):
        said = int(p.argmax())
        writer.writerow([name, data.classes[label], data.classes[said], float(p[said]), float(p[label])])
    return text.getvalue()


def called(material: Material, side: Sequence[int]) -> list[str]:
    """How files of the run call the pictures of a side: by their paths, with which `predict` finds them."""
    items = material.data.items
    return [printable(items[i].name or items[i].path) for i in side]


def described(finished: Finished) -> dict[str, Any]:
    """A contender in metrics.json."""
    c = finished.contender
    return {
        "trained_parameters": c.trained_parameters,
        "val_score": c.val_score,
        "seconds": round(c.seconds, 2),
        "file_bytes": c.file_bytes,
        "metrics": finished.metrics.to_dict(),
    }


def charts(run: RunFolder, material: Material, own: Finished) -> dict[str, bytes]:
    """Every picture of the report, also as files of the run folder."""
    found: dict[str, bytes] = {}
    curves = {
        "training": [(p.step, p.loss) for p in own.history],
        "validation": [(step, loss) for step, _, loss in own.evaluations],
    }
    if own.history and draw_curves(run.path / "loss.png", curves, xlabel="step", ylabel="loss"):
        found["curves"] = (run.path / "loss.png").read_bytes()
    select = material.config.select_by or ""
    scores = [(step, score) for step, score, _ in own.evaluations]
    axes = {"xlabel": "step", "ylabel": select, "title": f"Kept: step {own.step}"}
    if own.history and select != "loss" and draw_curves(run.path / "score.png", {"validation": scores}, **axes):
        found["scores"] = (run.path / "score.png").read_bytes()
    if isinstance(own.metrics, Metrics):
        found["confusion"] = draw_confusion(own.metrics.confusion, material.data.classes)
        run.write_bytes("confusion.png", found["confusion"])
    for name, sheet in (
        ("mistakes", mistakes_sheet(material, own.logits, own.temperature)),
        ("overlays", own.overlays),
    ):
        if sheet is not None:
            found[name] = png(sheet)
            run.write_bytes(f"{name}.png", found[name])
    return found


def counts_of(material: Material) -> dict[str, dict[str, int]]:
    """Pictures by side and class."""
    return {
        side: {
            name: int(count)
            for name, count in zip(
                material.data.classes,
                material.targets[list(getattr(material.splits, side))].sum(0).tolist(),
                strict=True,
            )
        }
        for side in SIDES
    }


def write_card(
    run: RunFolder, material: Material, finished: Sequence[Finished], changes: Sequence[Mapping[str, Any]]
) -> None:
    """README.md, a model card for the Hub."""
    own, config = finished[0], material.config
    figures = {
        key: value
        for key, value in own.metrics.to_dict().items()
        if isinstance(value, float) and key not in ("loss", "top1_low", "top1_high")
    }
    facts = {
        "Base model": material.backbone.id,
        "Classes": f"{len(material.data.classes)}: {', '.join(material.data.classes[:20])}"
        + (" …" if len(material.data.classes) > 20 else ""),
        "Pictures": ", ".join(f"{len(getattr(material.splits, side))} {side}" for side in SIDES),
        "Method": f"{config.method}, rank {config.rank}, targets {config.targets}"
        if config.method not in WHOLE
        else config.method,
        "Trained parameters": f"{own.contender.trained_parameters:,} and the head",
        **({} if config.start_from is None else {"Learned on from": Path(config.start_from).name}),
        "Best moment": f"step {own.step} of {config.steps}",
        **{f"{key} ({material.looked_at_side})": f"{value:.4f}" for key, value in figures.items()},
        **{
            f"{f.contender.name}: {config.select_by} ({material.looked_at_side})": f"{abs(material.selected(f.metrics)):.4f}"
            for f in finished[1:]
        },
        **changed(changes),
    }
    file = f"{run.path.resolve().name}/adapter.safetensors"
    usage = (
        "import visionlora as vl\n\n"
        f"classifier = vl.load_classifier({file!r})\n"
        'classifier.predict("picture.png", top_k=3)'
    )
    note = f"{material.data.source}. " + (
        "The backbone comes with visionlora." if material.backbone.id == EMBEDDED else ""
    )
    run.write_text(
        "README.md",
        model_card(
            title=config.title, base_model=material.backbone.id, trigger=None, facts=facts, samples=(), usage=usage,
            images_note=note, license=None, tags=CLASSIFIER_TAGS,
        ),
    )  # fmt: skip
