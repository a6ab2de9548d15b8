"""What fits in memory at once."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from visionlora.training import memory
from visionlora.training.loop import LoopConfig
from visionlora.training.memory import (
    SPARE,
    Room,
    at_once,
    available,
    bytes_for_steps,
    bytes_kept,
    free_memory,
    left_in_group,
)
from visionlora.training.optimizers import build_optimizer


def test_what_a_pass_keeps_is_counted_once_and_without_weights() -> None:
    layer = nn.Linear(8, 4)
    x = torch.randn(16, 8, requires_grad=True)
    assert bytes_kept(layer, lambda: layer(x)) == 16 * 8 * 4
    assert bytes_kept(layer, lambda: layer(x) + layer(x)) == 16 * 8 * 4
    with torch.no_grad():
        assert bytes_kept(layer, lambda: layer(x)) == 0


@given(st.integers(1, 64), st.integers(1, 10**6), st.integers(0, 10**8))
def test_the_largest_share_that_fits(together: int, per_picture: int, free: int) -> None:
    found = at_once(together, Room(per_picture, free))
    assert together % found == 0
    assert found == 1 or found * per_picture <= SPARE * free
    larger = [n for n in range(found + 1, together + 1) if together % n == 0]
    assert all(n * per_picture > SPARE * free - per_picture for n in larger)


def test_free_memory_is_told_where_it_can_be() -> None:
    found = free_memory(torch.device("cpu"))
    assert found is None or found > 2**20


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory, "available", lambda: 1000)
    monkeypatch.setattr(memory, "left_in_group", lambda: None)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_memory(torch.device("cpu")) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == 250


@pytest.mark.parametrize("word", ["adamw", "adafactor", "prodigy", "lion", "schedulefree", "sgd"])
def test_what_the_first_step_takes_for_good(word: str) -> None:
    layer = nn.Linear(64, 64, bias=False)
    optimizer = build_optimizer(
        [{"params": [layer.weight], "lr": 0.1}], LoopConfig(1, 1, 1, 0.1, 0, 0.0, 1.0, 0, optimizer=word)
    )
    layer(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    states = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    weight = layer.weight.nbytes
    found = bytes_for_steps([layer.weight], word, averaged=False)
    assert weight + states == pytest.approx(found, rel=0.05)
    assert bytes_for_steps([layer.weight], word, averaged=True) == found + weight


def group(folder: Path, **files: object) -> None:
    """A control group as the kernel shows it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.mark.parametrize("line", ["0::/", "0::/slice/job"], ids=["seen as the root", "below others"])
def test_a_containers_limit_counts(tmp_path: Path, line: str) -> None:
    own = tmp_path / "self"
    own.write_text(line)
    stat = "anon 5\ninactive_file 30"
    group(tmp_path / "root", memory__max=1000, memory__current=400, memory__stat=stat)
    group(tmp_path / "root" / "slice", memory__max="max", memory__current=10)
    assert left_in_group(tmp_path / "root", own) == 630
    group(tmp_path / "root" / "slice" / "job", memory__max=500, memory__current=450, memory__stat=stat)
    assert left_in_group(tmp_path / "root", own) == (630 if line == "0::/" else 80), "the tightest counts"


def test_groups_of_the_first_version(tmp_path: Path) -> None:
    own = tmp_path / "self"
    own.write_text("5:cpu:/x\n4:memory:/job\n0::/\n")
    unlimited = {"memory__limit_in_bytes": 2**63 - 4096, "memory__usage_in_bytes": 5}
    group(tmp_path / "root" / "memory" / "job", **unlimited)
    assert left_in_group(tmp_path / "root", own) is None
    group(tmp_path / "root" / "memory", memory__limit_in_bytes=100, memory__usage_in_bytes=70,
          memory__stat="total_inactive_file 20")  # fmt: skip
    assert left_in_group(tmp_path / "root", own) == 50


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert left_in_group(tmp_path / "none", tmp_path / "neither") is None
    assert available(tmp_path / "none") is None
