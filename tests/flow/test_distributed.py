"""Two processes do what one does: an adapted model under DistributedDataParallel, and whole runs under accelerate."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import visionlora as vl


def built():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(2), nn.LayerNorm(16), nn.Linear(16, 8))
    handle = vl.inject(model, vl.AdapterConfig(method="METHOD", rank=2, targets=("0", "3")))
    for m in handle.methods.values():
        for p in m.parameters():
            p.data += 0.1
    return model, handle


dist.init_process_group("gloo")
torch.set_num_threads(1)
x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
alone, handle = built()
alone(x).square().mean().backward()
expected = [p.grad.clone() for p in handle.parameters()]
model, handle = built()
wrapped = DistributedDataParallel(model)
rank = dist.get_rank()
for _ in range(2):  # twice: buckets are rebuilt after the first pass
    for p in handle.parameters():
        p.grad = None
    wrapped(x[2 * rank : 2 * rank + 2]).square().mean().backward()
for a, p in zip(expected, handle.parameters(), strict=True):
    torch.testing.assert_close(p.grad, a, rtol=1e-4, atol=1e-6)
dist.destroy_process_group()
print("agreed")
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_two_processes_give_the_gradients_of_one(tmp_path: Path, method: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("METHOD", method))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("agreed") == 2, done.stdout + done.stderr


def launched(
    tmp_path: Path, *words: object, processes: int, program: tuple[str, ...] = ("-m", "visionlora")
) -> subprocess.CompletedProcess[str]:
    """Runs the command line as one process, or as several over gloo (`accelerate launch --cpu` would start but one)."""
    command = [sys.executable, *program, *words]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, env=env, timeout=300)


def errors_in(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What our processes, not the launcher, say of what went wrong."""
    return [line for line in done.stderr.splitlines() if line.startswith(("Error", "Interrupted", "[rank"))]


def launch(tmp_path: Path, *words: object, processes: int, once: str = "Done in") -> str:
    """What is said where all goes well, some of it by one process alone."""
    done = launched(tmp_path, *words, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(once) == 1, f"one process speaks for all: {done.stdout}"
    return done.stdout


def losses_in(file: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


def check_same_adapter(one: Path, two: Path) -> None:
    """The factors agree to what the order of a sum can change, and so does every loss on the way."""
    first, second = (load_file(f / "adapter.safetensors") for f in (one, two))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-6)
    assert losses_in(two / "metrics.jsonl") == pytest.approx(losses_in(one / "metrics.jsonl"), rel=1e-6)


@pytest.mark.slow
def test_classify_on_two_processes(shapes: Path, tiny_vit: Path, tmp_path: Path) -> None:
    words = ["classify", "--images", shapes, "--model", tiny_vit, "--steps", 6, "--rank", 2, "--baselines", "none"]
    launch(tmp_path, *words, "--batch-size", 8, "--output", "one", processes=1)
    launch(tmp_path, *words, "--batch-size", 4, "--output", "two", processes=2)
    check_same_adapter(tmp_path / "one", tmp_path / "two")
    figures = [json.loads((tmp_path / n / "metrics.json").read_text())["top1"] for n in ("one", "two")]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_train_sd_on_two_processes(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    words = ["train-sd", "--images", dogs, "--model", tiny_model, "--steps", 4, "--rank", 2, "sample_steps=1",
             "sample_columns=1", "learning_rate=0.001"]  # fmt: skip
    launch(tmp_path, *words, "--batch-size", 4, "--output", "one", processes=1)
    launch(tmp_path, *words, "--batch-size", 2, "--output", "two", processes=2)
    check_same_adapter(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train-sd", "classify"])
def test_rank_auto_on_two_processes(
    tiny_model: Path, dogs: Path, tiny_vit: Path, shapes: Path, tmp_path: Path, command: str
) -> None:
    """Each measured on its own part of a batch alone, so that ranks hung on the number of processes."""
    sd = ["--images", dogs, "--model", tiny_model, "sample_columns=0", "learning_rate=0.001"]
    vit = ["--images", shapes, "--model", tiny_vit, "--baselines", "none"]
    words = [command, *(sd if command == "train-sd" else vit), "--steps", 3, "--rank", "auto", "rank_budget=2"]
    launch(tmp_path, *words, "--batch-size", 4, "--output", "one", processes=1)
    launch(tmp_path, *words, "--batch-size", 2, "--output", "two", processes=2)
    check_same_adapter(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_sizes_and_text_encoders_on_two_processes(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    from PIL import Image

    for i in range(3):
        Image.effect_noise((64, 32), 40 + 20 * i).convert("RGB").save(dogs / f"wide{i}.png")
    judges = tmp_path / "judges"
    judges.mkdir()
    for i, size in enumerate([(32, 32), (32, 32), (64, 32)]):
        Image.effect_noise(size, 30 + 20 * i).convert("RGB").save(judges / f"{i}.png")
    words = ["train-sd", "--images", dogs, "--model", tiny_model, "--steps", 6, "--rank", 2, "sample_steps=1",
             "sample_columns=1", "learning_rate=0.001", "train_text_encoder=true", "text_encoder_stop=0.5",
             "token=<it>", "--prompt", "a <it> dog", "prior_prompt=a dog", f"validation={judges}"]  # fmt: skip
    launch(tmp_path, *words, "--batch-size", 4, "--output", "one", processes=1)
    launch(tmp_path, *words, "--batch-size", 2, "--output", "two", processes=2)
    check_same_adapter(tmp_path / "one", tmp_path / "two")
    one, two = (losses_in(tmp_path / n / "validation.jsonl") for n in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


ALONE = """
import os
from visionlora.cli import console
from visionlora.errors import ModelError
from visionlora.pipelines import predict

def opened(*words):
    if os.environ["RANK"] == "1":
        raise ModelError("My disk is broken.")
    return found(*words)

found, predict.load_classifier, console.PATIENCE = predict.load_classifier, opened, 1.0
from visionlora.cli.main import main
main()
"""


@pytest.mark.slow
def test_predict_on_two_processes(shapes: Path, tiny_vit: Path, tmp_path: Path) -> None:
    words = ["--images", shapes, "--model", tiny_vit, "--steps", 2, "--rank", 2, "--baselines", "none"]
    launch(tmp_path, "classify", *words, "--output", "run", processes=1)
    broken = shutil.copytree(shapes, tmp_path / "broken")
    (broken / "cross" / "07.png").write_bytes(b"no picture")
    (broken / "square" / "11.png").write_bytes(b"no picture")
    predict = ["predict", "--adapter", "run", "--batch-size", 8, "--all-scores"]
    for processes, name in ((1, "one.csv"), (2, "two.csv")):
        launch(tmp_path, *predict, shapes, "--output", name, processes=processes, once="Wrote 60 predictions")
        refused = launched(tmp_path, *predict, broken, "--output", f"broken-{name}", processes=processes)
        assert refused.returncode != 0 and not (tmp_path / f"broken-{name}").exists()
        assert errors_in(refused) == ["Error: 2 of 60 pictures cannot be read:"], refused.stderr
        assert refused.stderr.index("cross/07.png") < refused.stderr.index("square/11.png")
        said = launch(
            tmp_path, *predict, broken, "--skip-broken", "--output", f"broken-{name}", processes=processes, once="Left out"
        )  # fmt: skip
        assert said.count("square/11.png") == 1 and "Wrote 58 predictions" in said
    for name in ("one.csv", "broken-one.csv"):
        assert (tmp_path / name).read_text() == (tmp_path / name.replace("one", "two")).read_text()

    (tmp_path / "alone.py").write_text(ALONE)
    done = launched(tmp_path, *predict, shapes, "--output", "none.csv", processes=2, program=("alone.py",))
    assert done.returncode != 0 and not (tmp_path / "none.csv").exists()
    assert errors_in(done)[0] == "Error on rank 1: My disk is broken.", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("train-sd", "--images", "nowhere"), "Error: There is no folder nowhere"),
        (("train-sd", "--images", ".", "--resume", "nowhere"), "Error: nowhere is no run that can be resumed"),
        (("classify", "--rnak", 4), "Error: No such option: --rnak"),
        (("inspect", "nothing.safetensors"), "Error: There is no adapter file at nothing.safetensors."),
    ],
)
def test_mistakes_are_told_once(tmp_path: Path, words: tuple[object, ...], line: str) -> None:
    done = launched(tmp_path, *words, processes=2)
    assert done.returncode != 0 and "exitcode  : 2 " in done.stderr
    (told,) = errors_in(done)
    assert told.startswith(line)


CUT = """
import os, signal
from visionlora.cli.main import main
from visionlora.report.logbook import Logbook

add = Logbook.add

def add_and_end(self, progress, *more):
    add(self, progress, *more)
    if progress.step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGNAL)

Logbook.add = add_and_end
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal", "said"),
    [("SIGTERM", "Interrupted at step 3 of 6"), ("SIGKILL", "Another process of this launch has ended")],
)
@pytest.mark.parametrize("command", ["train-sd", "classify"])
def test_what_ends_one_process_ends_all_and_nothing_is_lost(
    tiny_model: Path, dogs: Path, tiny_vit: Path, shapes: Path, tmp_path: Path, command: str, signal: str, said: str
) -> None:
    """A process that was asked to end left the others waiting for it, and what they had learned was lost with them."""
    sd = ["--images", dogs, "--model", tiny_model, "sample_steps=1", "sample_columns=0", "checkpoints=1"]
    vit = ["--images", shapes, "--model", tiny_vit, "--baselines", "none", "evaluations=1"]
    words = [*(sd if command == "train-sd" else vit), "--steps", 6, "--rank", 2, "--batch-size", 2]
    launch(tmp_path, command, *words, "--output", "whole", processes=2)
    (tmp_path / "cut.py").write_text(CUT.replace("SIGNAL", signal))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "cut.py"]
    done = subprocess.run(
        [*map(str, (sys.executable, *torchrun, command, *words, "--output", "cut"))], cwd=tmp_path, capture_output=True,
        text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert done.returncode != 0 and told.count(said) == 1 and "training/loop.py" not in told, told
    assert told.count(f"Go on with: visionlora {command} --resume cut") == 1, told
    out = launch(tmp_path, command, "--resume", "cut", processes=2)
    assert "Going on at step 3 of 6." in out
    first, second = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
