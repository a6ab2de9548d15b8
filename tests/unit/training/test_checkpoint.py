"""Checkpoints are streamed to their file, whole or not at all."""

import contextlib
import errno
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from visionlora import atomic
from visionlora.errors import WriteError
from visionlora.training.checkpoint import read_state, write_state


def test_a_state_is_never_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes were put together first: a checkpoint took its size again."""
    written: list[int] = []
    opened = Path.open

    def watched(self: Path, *arguments: Any, **more: Any) -> Any:
        file = opened(self, *arguments, **more)
        if self.suffix != ".tmp":
            return file

        class Watched:
            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: Any) -> int:
                written.append(len(data))
                return file.write(data)

        return Watched()

    monkeypatch.setattr(Path, "open", watched)
    state = {str(i): torch.full((1000,), float(i)) for i in range(20)}
    write_state(tmp_path / "state.pt", state)
    assert max(written) < 0.2 * sum(written)
    assert torch.equal(read_state(tmp_path / "state.pt")["7"], state["7"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="limits of files are of Linux")
def test_a_full_disk_leaves_the_state_before(tmp_path: Path) -> None:
    import resource
    import signal

    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(WriteError, match=r"it is the first one\. .* start anew: --resume auto --output"):
            write_state(tmp_path / "state.pt", {"step": 0, "values": torch.zeros(100_000)})
        write_state(tmp_path / "state.pt", {"step": 1})
        with pytest.raises(WriteError, match=r"cannot be written .*the last one is still whole"):
            write_state(tmp_path / "state.pt", {"step": 2, "values": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert read_state(tmp_path / "state.pt")["step"] == 1
    assert atomic.is_full(OSError(errno.EFBIG, "")) and [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_ctrl_c_while_a_state_is_written_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch made a RuntimeError of it, which was a traceback."""
    write_state(tmp_path / "state.pt", {"step": 1})

    class Interrupted(io.BytesIO):
        def write(self, content: bytes) -> int:
            if self.tell() > 1000:
                raise KeyboardInterrupt
            return super().write(content)

    @contextlib.contextmanager
    def replacing(path: Path, previous: Path | None = None):
        yield Interrupted()

    monkeypatch.setattr("visionlora.training.checkpoint.replacing", replacing)
    with pytest.raises(KeyboardInterrupt):
        write_state(tmp_path / "state.pt", {"step": 2, "values": [torch.zeros(1000) for _ in range(9)]})
    assert read_state(tmp_path / "state.pt")["step"] == 1
