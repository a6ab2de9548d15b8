"""Adapters kept in memory up to a limit."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch

import visionlora as vl
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.mixing.pool import AdapterPool, bytes_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(5):
        module = AdapterModule.lora(torch.full((2, 50), float(k)), torch.ones(50, 2), 2.0)
        vl.save_adapter(Adapter({"unet.conv_in": module}), tmp_path / f"a{k}.safetensors")
    return tmp_path


SIZE = 2 * 2 * 50 * 4


def test_the_least_recently_used_go_first(folder: Path) -> None:
    pool = AdapterPool(folder, limit=3 * SIZE)
    assert list(pool) == [f"a{k}" for k in range(5)] and pool.kept == [] and "a0" in pool
    first = pool.get("a0")
    assert bytes_of(first) == SIZE and pool.get("a0") is first
    for name in ("a1", "a2", "a0", "a3"):
        pool.get(name)
    assert pool.kept == ["a2", "a0", "a3"] and pool.used == 3 * SIZE
    assert float(pool.get("a4").modules["unet.conv_in"].tensors["lora_A"][0, 0]) == 4
    assert pool.kept == ["a0", "a3", "a4"]


def test_one_that_is_too_large_is_given_out_and_not_kept(folder: Path) -> None:
    pool = AdapterPool(folder, limit=SIZE - 1)
    assert bytes_of(pool.get("a0")) == SIZE and pool.kept == [] and pool.used == 0


def test_a_new_file_under_an_old_name_is_read(folder: Path) -> None:
    pool = AdapterPool({"dog": folder / "a1.safetensors"})
    pool.get("dog")
    pool.add("dog", folder / "a3.safetensors")
    assert float(pool.get("dog").modules["unet.conv_in"].tensors["lora_A"][0, 0]) == 3


@pytest.mark.parametrize("limit", [2 << 30, 1])
def test_a_new_file_that_comes_while_the_old_one_is_read(
    limit: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, added = Event(), Event()

    def slow(path: Path) -> Adapter:
        adapter = vl.load_adapter(path)
        reading.set()
        assert added.wait(60)
        return adapter

    monkeypatch.setattr("visionlora.mixing.pool.load_adapter", slow)
    pool = AdapterPool({"dog": folder / "a1.safetensors"}, limit)
    with ThreadPoolExecutor(1) as threads:
        early = threads.submit(pool.get, "dog")
        assert reading.wait(60)
        pool.add("dog", folder / "a3.safetensors")
        added.set()
        found = [early.result(60), pool.get("dog")]
    assert [float(a.modules["unet.conv_in"].tensors["lora_A"][0, 0]) for a in found] == [3, 3]


def test_many_threads(folder: Path) -> None:
    pool = AdapterPool(folder, limit=2 * SIZE)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(pool.get, [f"a{k % 5}" for k in range(200)]))
    assert [float(a.modules["unet.conv_in"].tensors["lora_A"][0, 0]) for a in found] == [k % 5 for k in range(200)]
    assert pool.used == SIZE * len(pool.kept) <= 2 * SIZE


def test_refusals(folder: Path) -> None:
    with pytest.raises(vl.VisionLoRAError, match=r"There is no adapter 'a9'\. Allowed: a0, a1"):
        AdapterPool(folder).get("a9")
    with pytest.raises(vl.VisionLoRAError, match="is not a folder of adapters"):
        AdapterPool(folder / "none")
    with pytest.raises(vl.VisionLoRAError, match="limit is 0; it must be a positive number of bytes"):
        AdapterPool(folder, 0)
    with pytest.raises(vl.VisionLoRAError, match="limit is '2GB'; it must be a positive number of bytes"):
        AdapterPool(folder, "2GB")  # type: ignore[arg-type]
