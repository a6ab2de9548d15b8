"""`visionlora classify`, `predict` and `export`: class folders -> an adapter with a report, and its use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from visionlora.cli import options
from visionlora.cli.console import ConsoleListener, duration, speaks, tell
from visionlora.config import ClassifyConfig, read_yaml

if TYPE_CHECKING:
    from visionlora.pipelines.classify import ClassifyResult

SHOWN = 20
"""Predictions printed when they are not written to a file."""


def command(
    settings: options.Settings = None,
    images: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Folder of classes or of parquet files, or a table (CSV, JSON lines, parquet)."),
    ] = None,
    table: Annotated[Optional[str], typer.Option(help="A table with a row per picture.")] = None,  # noqa: UP045
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="auto, emoji-vit, a timm name, a folder, torchvision/NAME or a Hub id."),
    ] = None,
    weights: Annotated[Optional[str], typer.Option(help="A state dict to start from, or random.")] = None,  # noqa: UP045
    image_size: Annotated[
        Optional[int], typer.Option(help="Side of the pictures that the backbone reads, px, if not its own.")  # noqa: UP045
    ] = None,
    output: options.Output = None,
    epochs: options.Epochs = None,
    steps: options.Steps = None,
    method: Annotated[
        Optional[str], typer.Option(help="lora, dora, vera, ia3 …, full or linear-probe.")  # noqa: UP045
    ] = None,
    rank: options.Rank = None,
    targets: Annotated[
        Optional[str], typer.Option(help="auto, roles (attn.qv, attn, mlp, all), names or re:regex, by commas.")  # noqa: UP045
    ] = None,
    learning_rate: options.LearningRate = None,
    find_rate: Annotated[
        Optional[bool], typer.Option("--find-rate", help="Find the learning rate first.")  # noqa: UP045
    ] = None,
    optimizer: options.Optimizer = None,
    batch_size: options.BatchSize = None,
    augment: Annotated[Optional[str], typer.Option(help="none, light, affine, trivial or rand.")] = None,  # noqa: UP045
    flip: Annotated[
        Optional[bool], typer.Option("--flip/--no-flip", help="Mirror pictures; not for letters and digits.")  # noqa: UP045
    ] = None,
    class_weights: Annotated[
        Optional[str], typer.Option(help="auto: rare classes count more; or {cat: 2, dog: 1}.")  # noqa: UP045
    ] = None,
    baselines: Annotated[
        Optional[list[str]], typer.Option(help="probe, full or none; repeat for more.")  # noqa: UP045
    ] = None,
    precision: options.Precision = None,
    seed: options.Seed = None,
    skip_broken: options.SkipBroken = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would do, take and need, and end.")
    ] = False,
    resume: options.Resume = None,
    force: options.Force = None,
    config: options.Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result for programs.")] = False,
) -> None:
    """Fine-tune a vision transformer on class folders: `visionlora classify --images ./pets`."""
    given = {name: value for name, value in locals().items() if name not in ("as_json", "dry_run")}
    resolved = options.resolved(ClassifyConfig, given)
    if dry_run:
        with ConsoleListener(quiet=as_json) as listener:
            from visionlora.pipelines.classify_dry_run import classify_dry_run

            planned = classify_dry_run(resolved, listener)
        tell(json.dumps(dataclasses.asdict(planned)) if as_json else "\n".join(planned.lines()))
        return
    if (line := options.finished(resolved)) is not None:
        tell(line, err=as_json)
        if as_json:
            tell(json.dumps({**found_before(Path(resolved.output or "")), "finished": True}))
        return
    with ConsoleListener(quiet=as_json) as listener:
        from visionlora.pipelines.classify import classify

        result = classify(resolved, listener)
    if speaks():
        show(result, resolved, as_json)


def found_before(run: Path) -> dict[str, Any]:
    """What a finished run has found, under the keys under which it told them."""
    from visionlora.vision.metrics import Metrics, MultiLabelMetrics

    kept = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    several = "mean_average_precision" in kept
    metrics = {field.name: kept[field.name] for field in dataclasses.fields(MultiLabelMetrics if several else Metrics)}
    select = read_yaml(str(run / "config.yaml")).get("select_by") or ("map" if several else "top1")
    figure = "mean_average_precision" if select == "map" else select
    return {
        "adapter": str(run / "adapter.safetensors"),
        "report": str(run / "report.html"),
        "classes": [row["name"] for row in metrics["per_class"]],
        "contenders": {name: contender["metrics"][figure] for name, contender in kept["contenders"].items()},
        "metrics": metrics,
    }


def show(result: ClassifyResult, resolved: ClassifyConfig, as_json: bool) -> None:
    """Prints what a run has found."""
    select = resolved.select_by or ("map" if hasattr(result.metrics, "mean_average_precision") else "top1")
    from visionlora.vision.metrics import score

    if as_json:
        typer.echo(
            json.dumps(
                {
                    "adapter": str(result.adapter),
                    "report": str(result.report),
                    "classes": result.classes,
                    "contenders": {
                        c.name: None if c.test is None else abs(score(c.test, select)) for c in result.contenders
                    },
                    "metrics": result.metrics.to_dict(),
                }
            )
        )
        return
    typer.echo(f"Done in {duration(result.seconds)}. {select} on {result.metrics.pictures} held-out pictures:")
    width = max(len(c.name) for c in result.contenders)
    for c in result.contenders:
        found = "" if c.test is None else f"{abs(score(c.test, select)):.4f}"
        trained = f"{c.trained_parameters:,} parameters and the head" if c.trained_parameters else "the head alone"
        typer.echo(f"  {c.name:<{width}}  {found}  {trained}, {duration(c.seconds)}")
    typer.echo(f"  adapter  {result.adapter}")
    typer.echo(f"  report   {result.report}")


def predict(
    adapter: Annotated[Path, typer.Option(help="Adapter file or run folder of `visionlora classify`.")],
    files: Annotated[
        Optional[list[Path]], typer.Argument(help="Pictures, folders of pictures, and tables of them.")  # noqa: UP045
    ] = None,
    images: Annotated[
        Optional[list[Path]], typer.Option(help="Likewise; repeat for more.")  # noqa: UP045
    ] = None,
    output: Annotated[Optional[Path], typer.Option(help="A .csv, .json or .parquet file.")] = None,  # noqa: UP045
    top_k: Annotated[int, typer.Option(help="Classes per picture; of several labels so many in JSON's top.")] = 1,
    threshold: Annotated[
        float, typer.Option(help="Of several labels those above it apply: JSON's labels, the label columns of tables.")
    ] = 0.5,
    all_scores: Annotated[
        bool, typer.Option("--all-scores", help="Add every class's probability, in tables a column p_CLASS each.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Pictures per forward pass.")] = 32,
    model: Annotated[Optional[str], typer.Option(help="Another place of the backbone.")] = None,  # noqa: UP045
    weights: Annotated[Optional[str], typer.Option(help="Another place of its state dict.")] = None,  # noqa: UP045
    device: Annotated[
        str, typer.Option(help="auto (cuda, Intel's xpu or a Mac's mps where there is one), cpu, cuda, xpu, mps.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Accept other weights of the same architecture.")] = False,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out pictures that cannot be read.")] = False,
    path_column: Annotated[
        Optional[str], typer.Option(help="Of the pictures' paths in tables, if not path, file_name, image …")  # noqa: UP045
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all predictions for programs.")] = False,
) -> None:
    """Classify pictures with a finished adapter: `visionlora predict --adapter runs/pets ./new`."""
    with ConsoleListener(quiet=as_json) as listener:
        from visionlora.pipelines.predict import json_of, predict

        found = predict(
            adapter, [*(files or []), *(images or [])], output, top_k=top_k, threshold=threshold, batch_size=batch_size,
            model=model, device=device, force=force, weights=weights, skip_broken=skip_broken, overwrite=overwrite,
            all_scores=all_scores, path_column=path_column, listener=listener,
        )  # fmt: skip
    if not speaks():
        return
    if as_json:
        typer.echo(json_of(found))
        return
    if output is not None:
        typer.echo(f"Wrote {len(found)} predictions to {output}.")
        return
    for one in found[:SHOWN]:
        p = one.prediction
        pairs = sorted(p.scores, key=lambda s: -s[1]) or zip(p.labels, p.probabilities, strict=True)
        typer.echo(f"{one.shown}  " + (", ".join(f"{label} {p:.3f}" for label, p in pairs) or "none"))
    if len(found) > SHOWN:
        typer.echo(f"… and {len(found) - SHOWN} more: --output preds.csv writes all.")


def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter file or run folder of `visionlora classify`.")],
    to: Annotated[str, typer.Option(help="timm, transformers, state-dict, peft or onnx.")],
    output: Annotated[Path, typer.Option(help="The folder or file to write.")],
    model: Annotated[Optional[str], typer.Option(help="Another place of the backbone.")] = None,  # noqa: UP045
    weights: Annotated[Optional[str], typer.Option(help="Another place of its state dict.")] = None,  # noqa: UP045
    force: Annotated[bool, typer.Option("--force", help="Accept other weights of the same architecture.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write a classifier for another library and compare: `visionlora export runs/pets --to onnx --output pets.onnx`."""
    from visionlora.pipelines.export import export

    found = export(adapter, output, to, model, force, overwrite, weights)
    typer.echo(f"Wrote {found.path}. Open it with: {found.how}")
    if found.difference is None:
        typer.echo("Not compared: the library is not installed.")
    else:
        typer.echo(f"Opened again and compared: logits differ by at most {found.difference:.1e}.")
