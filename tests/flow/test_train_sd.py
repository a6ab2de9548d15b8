"""train-sd end to end through the real command, on small real parts."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from visionlora.loaders import load_adapter
from visionlora.training.checkpoint import STATE_FILE, read_state

SMALL = ("--rank", 2, "sample_steps=2", "sample_columns=2", "learning_rate=0.01")


def test_a_run_leaves_everything_and_its_config_runs_again_to_the_same_bytes(
    cli, tiny_model: Path, dogs: Path, tmp_path: Path
) -> None:
    code, out, err = cli("train-sd", "--images", dogs, "--model", tiny_model, "--steps", 4, "--alpha", 3,
                         "--output", tmp_path / "a", *SMALL)  # fmt: skip
    assert code == 0, err
    assert "sks dog" in out, "the made-up prompt is said"
    run = tmp_path / "a"
    found = {p.name for p in run.iterdir()}
    assert found == {"asked.yaml", "config.yaml", "metrics.jsonl", "adapter.safetensors", "checkpoints", "samples", "grid.png",
                     "loss.png", "README.md", "run.json"}  # fmt: skip
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "state-previous.pt",
        "state.pt",
        "step-000002.safetensors",
        "step-000004.safetensors",
    ]
    adapter = load_adapter(run)
    assert {m.rank for m in adapter.modules.values()} == {2}
    assert {m.alpha for m in adapter.modules.values()} == {3.0}
    assert any(m.tensors["lora_B"].abs().max() > 0 for m in adapter.modules.values()), "it trained"
    assert adapter.info["base"]["fingerprints"]["unet"]["weights"]
    assert json.loads((run / "run.json").read_text())["seed"] == 0
    assert "sks dog" in (run / "README.md").read_text()

    code, _, err = cli("train-sd", "--config", run / "config.yaml", "--output", tmp_path / "b")
    assert code == 0, err
    assert (tmp_path / "b" / "config.yaml").read_text() == (run / "config.yaml").read_text()
    again = load_adapter(tmp_path / "b")
    for name, module in adapter.modules.items():
        assert torch.equal(module.tensors["lora_A"], again.modules[name].tensors["lora_A"])
        assert torch.equal(module.tensors["lora_B"], again.modules[name].tensors["lora_B"])
    assert (tmp_path / "b" / "grid.png").read_bytes() == (run / "grid.png").read_bytes()


def test_the_base_column_shows_the_base(cli, tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    assert (
        cli("train-sd", "--images", dogs, "--model", tiny_model, "--steps", 3, "--output", tmp_path / "r", *SMALL)[0]
        == 0
    )
    code, _, err = cli(
        "generate", "--prompt", "sks dog", "--model", tiny_model, "--steps", 2, "--output", tmp_path / "g"
    )
    assert code == 0, err
    drawn = Image.open(next((tmp_path / "g").glob("*.png")))
    assert drawn.tobytes() == Image.open(tmp_path / "r" / "samples" / "base_00.png").tobytes()
    code, _, err = cli("generate", "--prompt", "sks dog", "--lora", tmp_path / "r", "--steps", 2,
                       "--output", tmp_path / "h", "--model", tiny_model)  # fmt: skip
    assert code == 0, err
    with_adapter = Image.open(next((tmp_path / "h").glob("*.png")))
    # `generate` merges the adapter, the training run draws with it beside the weights: the same to rounding.
    sample = np.asarray(Image.open(tmp_path / "r" / "samples" / "step-3_00.png"), dtype=int)
    assert np.abs(np.asarray(with_adapter, dtype=int) - sample).max() <= 1
    assert with_adapter.tobytes() != drawn.tobytes()


def test_bf16_and_accumulation_train(cli, tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    code, _, err = cli("train-sd", "--images", dogs, "--model", tiny_model, "--steps", 2, "--precision", "bf16",
                       "--gradient-accumulation", 2, "--batch-size", 2, "--output", tmp_path / "r", *SMALL)  # fmt: skip
    assert code == 0, err
    metrics = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [m["images_seen"] for m in metrics] == [4, 8]


IGNORING = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")
"""Starts a program as a script does in the background: Ctrl-C is not for it."""


@pytest.mark.parametrize(("number", "before"), [(signal.SIGINT, ()), (signal.SIGTERM, ()), (signal.SIGTERM, IGNORING),
                                                (signal.SIGHUP, ())])  # fmt: skip
def test_an_interrupt_keeps_the_adapter(
    tiny_model: Path, dogs: Path, tmp_path: Path, number: signal.Signals, before: tuple[str, ...]
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("under nohup, which the run respects")
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "visionlora", "train-sd", "--images", str(dogs), "--model", str(tiny_model),
         "--steps", "100000", "--output", str(tmp_path / "r"), *map(str, SMALL)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        metrics = tmp_path / "r" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_bytes()) > 200) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the adapter so far is in" in out and f"visionlora train-sd --resume {tmp_path / 'r'}" in out
    (kept,) = (tmp_path / "r" / "checkpoints").glob("*.safetensors")
    steps = len(metrics.read_text().splitlines())
    assert load_adapter(kept).info["training"]["steps"] == steps >= 1
    assert read_state(tmp_path / "r" / "checkpoints" / STATE_FILE)["fit"]["step"] == steps


def test_an_adapter_of_another_base_is_refused(cli, tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    assert (
        cli("train-sd", "--images", dogs, "--model", tiny_model, "--steps", 1, "--output", tmp_path / "r", *SMALL)[0]
        == 0
    )
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_model, tuned)
    weights = tuned / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 0.01 for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    arguments = ("generate", "--prompt", "sks dog", "--lora", tmp_path / "r", "--model", tuned, "--steps", 1)
    code, _, err = cli(*arguments)
    assert code == 2
    assert "has the same architecture but other weights" in err
    assert "--force" in err
    assert cli(*arguments, "--force")[0] == 0


def test_learning_on_from_an_adapter_of_any_trainer(cli, tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    words = ("train-sd", "--images", dogs, "--model", tiny_model, "sample_columns=0", "learning_rate=0.01", "alpha=3")
    assert cli(*words, "--steps", 2, "--rank", 2, "--output", tmp_path / "first")[0] == 0
    assert cli("convert", tmp_path / "first", tmp_path / "kohya.safetensors", "--to", "kohya")[0] == 0
    first = load_adapter(tmp_path / "first")
    found = []
    for source in ("first", "kohya.safetensors"):
        code, out, err = cli(*words, "--steps", 2, "--rank", 4, "--output", tmp_path / f"on-{Path(source).stem}",
                             f"start_from={tmp_path / source}")  # fmt: skip
        assert code == 0, err
        assert (
            f"Learning on from {tmp_path / source}, with its layers and ranks (rank=4, alpha=3.0 is left aside)." in out
        )
        found.append(load_adapter(tmp_path / f"on-{Path(source).stem}"))
        assert found[-1].info["training"]["start_from"] == source
    for name, m in first.modules.items():
        own, foreign = (adapter.modules[name] for adapter in found)
        assert own.rank == 2 and own.alpha == foreign.alpha == 3.0
        assert torch.equal(own.tensors["lora_B"], foreign.tensors["lora_B"])
        moved = (own.tensors["lora_B"] - m.tensors["lora_B"]).abs().max()
        assert 0 < moved <= 2 * 0.0101, "two steps of AdamW away from where the first run ended"


@pytest.mark.parametrize("method", ["dora", "adalora", "vera", "ia3", "lora-fa", "full"])
def test_every_method_trains_saves_and_loads(cli, tiny_model: Path, dogs: Path, tmp_path: Path, method: str) -> None:
    code, _, err = cli("train-sd", "--images", dogs, "--model", tiny_model, "--method", method, "--steps", 3,
                         "--rank", 2, "--output", tmp_path / "run", "sample_steps=2", "sample_columns=1")  # fmt: skip
    assert code == 0, err
    code, _, err = cli("generate", "--prompt", "dog", "--model", tiny_model, "--lora", tmp_path / "run",
                         "--steps", 2, "--output", tmp_path / "pictures")  # fmt: skip
    assert code == 0, err
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_the_budget_of_rank_auto_is_for_the_text_encoder_too(
    cli, tiny_model: Path, dogs: Path, tmp_path: Path, init: str
) -> None:
    code, _, err = cli("train-sd", "--images", dogs, "--model", tiny_model, "--rank", "auto", "rank_budget=0.02MB",
                         "--steps", 1, "--output", tmp_path / "run", "sample_columns=0", "train_text_encoder=true",
                         f"init={init}", "alpha=4")  # fmt: skip
    assert code == 0, err
    adapter = load_adapter(tmp_path / "run")
    held = sum(t.numel() for m in adapter.modules.values() for t in m.tensors.values())
    assert adapter.components == ["text_encoder", "unet"]
    assert 0.8 * 0.02 * 2**18 < held <= 0.02 * 2**18
    assert {m.scaling for m in adapter.modules.values()} == {0.5}
    card = (tmp_path / "run" / "README.md").read_text()
    assert "alpha 4 at rank 8 and the same scaling at others" in card
    code, _, err = cli("train-sd", "--images", dogs, "--model", tiny_model, "--rank", "auto",
                         "--steps", 1, "--output", tmp_path / "none", "sample_columns=0", "train_text_encoder=true",
                         "rank_budget=0.1k")  # fmt: skip
    assert code == 2 and "rank_budget is '0.1k', and the text encoders alone take 256 of it at rank 1" in err


def test_rank_auto_measures_and_says_what_it_chose(cli, tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    code, out, err = cli("train-sd", "--images", dogs, "--model", tiny_model, "--rank", "auto", "rank_budget=2",
                         "--steps", 2, "--output", tmp_path / "run", "sample_steps=2", "sample_columns=1")  # fmt: skip
    assert code == 0, err
    assert "Mean rank by block:" in out + err
    assert "(auto), alpha as the rank" in (tmp_path / "run" / "README.md").read_text()
    adapter = load_adapter(tmp_path / "run")
    ranks = {m.rank for m in adapter.modules.values()}
    assert len(ranks) > 1
    again = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert again["rank"] == "auto"
