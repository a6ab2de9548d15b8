"""A device is one that is there."""

import os

import pytest
import torch
from visionlora.pipelines.generate import place_of

from visionlora.cli.console import speaks
from visionlora.config import GenerateConfig
from visionlora.errors import ConfigError, ModelError, ProcessLost
from visionlora.models.devices import leave_launch, process_lost, process_of, usable_device

from ...doubles import LAUNCH, become_process, environment_of


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, mps: bool = False, xpu: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: xpu > 0)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: xpu)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    assert usable_device() == usable_device("cpu") == torch.device("cpu")
    with_gpus(monkeypatch, 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert usable_device() == torch.device("cuda") and usable_device(torch.device("cuda:1")) == torch.device("cuda:1")


def test_auto_is_the_gpu_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0, mps=True)
    assert usable_device() == torch.device("mps") and usable_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"but there is no GPU that torch can use. Take mps."):
        usable_device("cuda")
    assert place_of(GenerateConfig(["a"])) == (torch.device("mps"), "fp32")
    with_gpus(monkeypatch, 1, mps=True)
    assert usable_device() == torch.device("cuda")


def test_auto_is_the_gpu_of_intel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, by accelerate, took it; drawing and predicting took the CPU."""
    with_gpus(monkeypatch, 0, mps=True, xpu=2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert usable_device() == torch.device("xpu")
    assert place_of(GenerateConfig(["a"])) == (torch.device("xpu"), "fp32"), "auto takes no risk in precision"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert usable_device() == torch.device("xpu:1")
    with_gpus(monkeypatch, 1, xpu=2)
    assert usable_device("cuda") == usable_device() == torch.device("cuda")


def test_each_process_of_several_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    for rank, expected in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda"), ("", "cuda")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert usable_device() == usable_device("cuda") == torch.device(expected), rank
        assert usable_device("cuda:0") == torch.device("cuda:0") and usable_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("foo", "device is 'foo'; it must be auto, cpu, mps, xpu or cuda"),
        ("meta", "device is 'meta'; it must be auto, cpu, mps, xpu or cuda"),
        ("cuda", "device is 'cuda', but there is no GPU that torch can use. Take cpu."),
        ("mps", "device is 'mps', but there is no mps device that torch can use. Take cpu."),
    ],
)
def test_others_are_refused(word: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    with pytest.raises(ConfigError) as caught:
        usable_device(word)
    assert message in str(caught.value)


def test_a_gpu_too_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    with pytest.raises(ConfigError, match="device is 'cuda:2', but the last one is cuda:1"):
        usable_device("cuda:2")


def test_which_process_of_a_launch_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    assert process_of() == (0, 1) and speaks()
    become_process(monkeypatch, 1)
    assert process_of() == (1, 2) and not speaks()


@pytest.mark.parametrize(
    "said",
    [{"RANK": "1"}, {"RANK": ""}, {"WORLD_SIZE": ""}, {"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "a"},
     {**environment_of(1), "LOCAL_RANK": "-1"}, environment_of(1, 1), environment_of(-1)],
)  # fmt: skip
def test_an_environment_that_is_of_no_launch(said: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pod of a cluster, where one process is started by hand: commands ended in a traceback, or did nothing."""
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert process_of() == (0, 1)


def test_a_process_that_ends_leaves_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ended while gloo still ran was aborted now and then, and the launcher then ended the first as it wrote."""
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    for rank, ended in ((0, []), (1, [0])):
        become_process(monkeypatch, rank)
        leave_launch()
        assert left == ended


def test_an_error_that_another_process_has_caused_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = torch.distributed.DistBackendError("NCCL timed out")
    assert process_lost(broken) is None, "there is no other"
    become_process(monkeypatch, 0)
    lost = process_lost(
        RuntimeError("[gloo/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:42374. This is typically\n…")
    )
    assert lost is not None and str(lost).endswith(
        "([gloo/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:42374)."
    )
    assert isinstance(process_lost(broken), ProcessLost)
    for other in (RuntimeError("shapes do not fit"), ValueError(), OSError("no igloo/unet.bin"), ModelError("gloo/x")):
        assert process_lost(other) is None
