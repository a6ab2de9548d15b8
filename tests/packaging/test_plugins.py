"""A third-party package is built, installed and used; a broken part of it is named and skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "example_plugin"
USE = """
import warnings

import torch
from torch import nn

import visionlora as vl
from visionlora.lora.adapter import Adapter


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.toy_q, self.toy_v = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.toy_v(self.toy_q(x))


model, x = Toy(), torch.randn(2, 4)
base = model(x)
handle = vl.inject(model, vl.AdapterConfig(method="scaled-bias", targets="attn.qv"))
assert list(handle.methods) == ["toy_q", "toy_v"], "roles come from the plug-in's family"
assert torch.equal(model(x), base)
for m in handle.methods.values():
    m.change.data.fill_(0.5)
apart = model(x)
handle.merge()
torch.testing.assert_close(model(x), apart, rtol=1e-5, atol=1e-6)
handle.eject()
light = vl.inject(model, vl.AdapterConfig(init="ones", rank=1, targets="toy-light"))
assert list(light.methods) == ["toy_v"] and (light.methods["toy_v"].lora_A == 1).all()
light.eject()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        vl.inject(model, vl.AdapterConfig(method="broken", targets="attn.qv"))
    except vl.VisionLoRAError as e:
        assert "comes from a plug-in that cannot be imported" in str(e), e
    else:
        raise AssertionError
assert "'broken' of package visionlora-example" in str(caught[0].message), caught
from visionlora.lora.arithmetic import merge_adapters

one = vl.inject(model, vl.AdapterConfig(rank=1, targets="attn.qv"))
for m in one.methods.values():
    m.lora_B.data.normal_()
merged = merge_adapters([(one.adapter(), 1.0), (one.adapter(), 3.0)], "mean").adapter.delta_weights()
made = one.adapter()
for name, delta in made.delta_weights().items():
    torch.testing.assert_close(merged[name], 2 * delta)
one.eject()
first, second = (Adapter({n: m for n, m in one_of.modules.items()}) for one_of in (made, made))
mix = vl.attach(model, {"a": first, "b": second}, scales={"a": 1.0, "b": 5.0}, compose="first", mode="stacked")
assert [next(iter(p[0][1].methods.values())).scale for p in mix.handles.values()] == [1.0, 0.0]
print("used")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that sees the built package."""
    target = tmp_path_factory.mktemp("plugin")
    source = tmp_path_factory.mktemp("source") / "plugin"
    import shutil

    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target, source],
        check=True, capture_output=True,
    )  # fmt: skip
    return {**os.environ, "PYTHONPATH": str(target)}


def test_methods_inits_families_and_presets_are_used(installed: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", USE], env=installed, capture_output=True, text=True)
    assert done.stdout.endswith("used\n"), done.stderr


def test_the_command_lists_them_and_names_what_is_broken(installed: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "visionlora", "plugins"], env=installed, capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if "visionlora-example" in line]
    assert len(lines) == 7
    broken = next(line for line in lines if "broken" in line)
    assert broken.endswith("ModuleNotFoundError: No module named 'visionlora_example.missing'")
    assert all(line.endswith("ok") for line in lines if "broken" not in line)
