"""The bytes of an adapter file: safetensors, or a pickle read with ``weights_only=True``. Nothing is ever unpickled freely."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from visionlora.config.choices import WEIGHT_SUFFIXES
from visionlora.errors import AdapterFileError

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
          "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes that torch can store and not calculate with; fp16 holds every value of both exactly."""
LARGEST_HEADER = 100_000_000
"""Bytes; what the safetensors library allows."""


class NotKept:
    """Stands for a value that trainings save beside weights, such as their arguments: nothing of it is made, no code runs."""

    def __new__(cls, *values: object) -> NotKept:
        """The same whatever was given."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Takes nothing."""


PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
BESIDE_WEIGHTS = (
    "argparse.Namespace", "types.SimpleNamespace", "datetime.datetime", "datetime.timedelta", "numpy.dtype",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in PATHS),
)  # fmt: skip
"""Classes of what trainings save beside weights; `NotKept` stands for them. No arrays: they may be weights."""


@dataclass(frozen=True)
class Contents:
    """What a file holds, before anyone asks what it means."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


class Entry(NamedTuple):
    """One tensor as the header names it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors header says."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]


PEFT_CONFIG = "adapter_config.json"
"""In each folder of PEFT's, which has several adapters in folders of their names."""


def missing(path: Path) -> AdapterFileError:
    """What a path without a file gets."""
    found = [p.name for p in sorted(path.glob("*.safetensors"))] if path.is_dir() else []
    hint = f" It is a folder with {', '.join(found[:5])}: name the file." if found else ""
    if several := sorted(config.parent.name for config in path.glob(f"*/{PEFT_CONFIG}")):
        hint = (
            f" It is a folder with adapters of PEFT's in {', '.join(several)}: name one, such as {path / several[0]}."
        )
    if not path.exists() and path.parent.is_dir():
        beside = {p.stem: p for p in sorted(path.parent.iterdir()) if p.is_dir() or p.suffix in WEIGHT_SUFFIXES}
        close = [n for n in (path.stem, path.name) if n in beside]
        close = close or [n for n in beside if n.startswith(path.stem)] or get_close_matches(path.stem, beside, n=1)
        hint = f" Did you mean {beside[close[-1]]}?" if close else ""  # of runs the newest
    return AdapterFileError(f"There is no adapter file at {path}.{hint}")


def open_file(path: Path, mapped: bool = False) -> Contents:
    """Every tensor and the text of the header. Tensors are copies: what later happens to the file does not reach them.

    Args:
        path: of the file.
        mapped: leave the tensors in the file, for whole models that are read once: whatever writes into it changes them.

    Raises:
        AdapterFileError: when the file is missing, broken, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise missing(path)
    try:
        if is_pickle(path):
            return Contents(path, {name: calculable(t) for name, t in pickled(path)}, {})
        with safe_open(str(path), framework="pt") as file:
            metadata = {str(k): str(v) for k, v in dict(file.metadata() or {}).items()}
            # The library maps the file: writing into it would change its tensors, and cutting it end the process.
            found = {name: calculable(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            tensors = found if mapped else {name: t.clone() for name, t in found.items()}
            return Contents(path, tensors, metadata)
    except AdapterFileError:
        raise
    except Exception as e:  # safetensors raises its own, undocumented kinds on broken bytes
        raise AdapterFileError(f"{path} is not a whole safetensors file ({e}). Copy or download it again.") from None


def calculable(tensor: Tensor) -> Tensor:
    """The same values in a dtype that torch calculates with."""
    return tensor.to(torch.float16) if tensor.dtype in EIGHT_BITS else tensor


def read_header(path: Path) -> Header:
    """The header alone, however large the file.

    Raises:
        AdapterFileError: when the file is missing or its header cannot be read.
    """
    if not path.is_file():
        raise missing(path)
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(LARGEST_HEADER, path.stat().st_size - 8):
                raise ValueError(f"its header claims {length:,} bytes")
            found = json.loads(file.read(length))
        metadata = {str(k): str(v) for k, v in dict(found.pop("__metadata__", {})).items()}
        body = path.stat().st_size - 8 - length
        tensors = {name: entry_of(name, e, body) for name, e in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError) as e:
        raise AdapterFileError(f"{path} is not a whole safetensors file ({e}). Copy or download it again.") from None
    return Header(tensors, metadata)


def entry_of(name: str, entry: Mapping[str, Any], body: int) -> Entry:
    """A tensor's entry, checked against itself and the bytes there are.

    Raises:
        ValueError: when its size, offsets and the file do not agree.
    """
    found = Entry(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
    start, end = (int(n) for n in entry["data_offsets"])
    width = WIDTHS.get(found.dtype)
    if min((0, *found.shape)) < 0 or not 0 <= start <= end <= body or (width and found.size * width != end - start):
        raise ValueError(f"{name[:80]!r} does not fit the bytes of the file")
    return found


def is_pickle(path: Path) -> bool:
    """Whether a file is one of torch's: told by its first bytes, not by its name."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # after the length of a safetensors header, which may begin with any byte
        return False
    return start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"


def pickled(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file of torch's, by their path inside it.

    Raises:
        AdapterFileError: when loading it safely fails.
    """
    try:
        beside: list[Any] = [(NotKept, name) for name in BESIDE_WEIGHTS]
        # As a file: torch takes the suffix .safetensors for the format.
        with path.open("rb") as file, torch.serialization.safe_globals(beside):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # pickle, zip and torch each raise their own
        named = re.search(r"GLOBAL (\S+) ", str(e))
        what = named[1] if named else re.sub(r"\x1b\[[\d;]*m", "", str(e)).partition("\n")[0][:120].rstrip(" .")
        why = "it is damaged" if is_damaged(path) else f"it holds more than tensors ({what})"
        raise AdapterFileError(
            f"{path} cannot be opened safely: {why}. visionlora reads such files with weights_only=True alone, as a pickle "
            "can run any code. Ask its author for a .safetensors file, or save its state_dict() alone."
        ) from None
    yield from flattened(found, "")


def is_damaged(path: Path) -> bool:
    """Whether a file of torch's is no whole archive."""
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        return zipped and not zipfile.is_zipfile(path)
    except OSError:
        return True


def flattened(found: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested dicts and lists; a `state_dict` on the way adds no name."""
    if isinstance(found, Tensor):
        yield prefix.rstrip("."), found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from flattened(value, prefix if key == "state_dict" else f"{prefix}{key}.")
    elif isinstance(found, (list, tuple)):
        for i, value in enumerate(found):
            yield from flattened(value, f"{prefix}{i}.")


def file_hashes(path: Path) -> dict[str, str]:
    """The hashes that tools show for a file.

    Returns:
        sha256: of the whole file. AutoV2: its first ten digits. AutoV3: SHA-256 of the bytes after the header, as far as
        the file is a safetensors file; its first twelve digits are what A1111 calls the short hash.
    """
    whole, body = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        fits = not is_pickle(path) and length <= path.stat().st_size - 8
        header = file.read(length) if fits else b""
        whole.update(start + header)
        for chunk in iter(lambda: file.read(1 << 20), b""):
            whole.update(chunk)
            body.update(chunk)
    digest = whole.hexdigest()
    return {"sha256": digest, "AutoV2": digest[:10]} | ({"AutoV3": body.hexdigest()} if fits else {})
