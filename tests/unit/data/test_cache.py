"""The cache: exact, atomic, recomputed when broken."""

import shutil
from pathlib import Path

import pytest
import torch

from visionlora.data.cache import TensorCache, default_cache_folder, key_of


def test_an_entry_comes_back_exactly(tmp_path: Path) -> None:
    cache, value = TensorCache(tmp_path / "new"), torch.randn(2, 3)
    assert cache.get("k") is None
    cache.put("k", {"v": value})
    assert torch.equal(cache.get("k")["v"], value)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["k.safetensors"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts the mappings of a Linux process")
def test_entries_are_not_mapped(tmp_path: Path) -> None:
    """A process may have 65,530 mappings, at which a cache of more captions ended the run."""
    cache, before = TensorCache(tmp_path), len(Path("/proc/self/maps").read_text().splitlines())
    for key in range(100):
        cache.put(str(key), {"x": torch.zeros(8)})
    kept = [cache.get(str(key)) for key in range(100)]
    assert len(kept) == 100 and len(Path("/proc/self/maps").read_text().splitlines()) < before + 50


def test_a_broken_entry_is_computed_again(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    (tmp_path / "k.safetensors").write_bytes(b"half")
    entries, computed = cache.fill(["k"], lambda part: [{"v": torch.ones(1)} for _ in part], batches=4)
    assert computed == 1
    assert torch.equal(cache.get("k")["v"], entries[0]["v"])


def test_an_entry_of_which_the_disk_lost_a_bit_is_computed_again(tmp_path: Path) -> None:
    cache, value = TensorCache(tmp_path), torch.arange(6.0).view(2, 3)
    cache.put("k", {"v": value, "half": value.to(torch.bfloat16), "whole": torch.tensor(3)})
    assert torch.equal(cache.get("k")["v"], value)
    file = tmp_path / "k.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    assert cache.get("k") is None
    assert cache.fill(["k"], lambda part: [{"v": value}], batches=1)[1] == 1 and torch.equal(cache.get("k")["v"], value)


def test_fill_computes_only_what_is_missing_in_bounded_batches(tmp_path: Path) -> None:
    cache, calls = TensorCache(tmp_path), []

    def compute(part: list[int]) -> list[dict[str, torch.Tensor]]:
        calls.append(part)
        return [{"v": torch.tensor([float(i)])} for i in part]

    cache.put("b", {"v": torch.tensor([1.0])})
    entries, computed = cache.fill(["a", "b", "c", "d"], compute, batches=2)
    assert calls == [[0, 2], [3]]
    assert computed == 3
    assert [e["v"].item() for e in entries] == [0, 1, 2, 3]
    assert cache.fill(["a", "b", "c", "d"], compute, batches=2)[1] == 0


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = TensorCache(tmp_path / "file" / "cache")
    entries, computed = cache.fill(["a"], lambda part: [{"v": torch.ones(1)}], batches=1)
    assert (len(entries), computed) == (1, 1)
    assert cache.problem in ("Not a directory", "File exists") and not TensorCache(tmp_path).problem


def test_room_is_that_of_memory_and_disk(monkeypatch, tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "not" / "there")
    assert 0 < cache.free <= shutil.disk_usage(tmp_path).total
    monkeypatch.setattr(TensorCache, "free", 2**32)
    assert cache.has_room(2**32) and not cache.has_room(2**32 + 1)
    monkeypatch.setattr(TensorCache, "free", 0)
    assert cache.has_room(2**31) and not cache.has_room(2**31 + 1), "what cannot be written is kept in memory"


def test_keys_tell_their_parts_apart() -> None:
    assert key_of("ab", "c") != key_of("a", "bc")


def test_the_folder_follows_the_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VISIONLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "visionlora"
    monkeypatch.setenv("VISIONLORA_CACHE", "~/of its own")
    assert default_cache_folder() == Path.home() / "of its own"
    monkeypatch.delenv("VISIONLORA_CACHE")
    for unset in ("", None):
        monkeypatch.setenv("XDG_CACHE_HOME", "") if unset == "" else monkeypatch.delenv("XDG_CACHE_HOME")
        assert default_cache_folder() == Path.home() / ".cache" / "visionlora"
