"""Which pictures an adapter has learned from: it says so in its header, so that they do not judge what learns on from it.

The first four bytes of each SHA-256, sorted and in base64: 53 kB for 10,000 pictures. One picture in 430,000 is taken for
one of 10,000 that it is not; nothing comes of it but that it trains.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = 4
"""Bytes kept of each SHA-256."""
MOST = 50_000
"""With more pictures none are named: the list would be larger than the adapter."""


@dataclass(frozen=True)
class Learned:
    """The pictures that an adapter has to do with, as prefixes of their SHA-256 in hexadecimal."""

    trained: frozenset[str]
    """That it was trained on."""
    chosen_by: frozenset[str] = frozenset()
    """That chose its best moment."""

    @classmethod
    def of(cls, trained: Iterable[str], chosen_by: Iterable[str] = ()) -> Learned:
        """From the SHA-256 of pictures, in hexadecimal."""
        return cls(*(frozenset(sha[: 2 * PREFIX] for sha in side) for side in (trained, chosen_by)))

    @classmethod
    def in_header(cls, info: Mapping[str, Any]) -> Learned | None:
        """What the header of an adapter says; None when it says nothing."""
        kept = info.get("training", {}).get("learned_from")
        if kept is None:
            return None
        return cls(*(frozenset(_unpacked(kept.get(side, ""))) for side in ("trained", "chosen_by")))

    def __or__(self, other: Learned) -> Learned:
        """What either has to do with; who was trained on a picture is not less so for having chosen by it."""
        trained = self.trained | other.trained
        return Learned(trained, (self.chosen_by | other.chosen_by) - trained)

    def to_header(self) -> dict[str, Any]:
        """The entry of a header's `training`; empty when there are more than `MOST` pictures."""
        if len(self.trained) + len(self.chosen_by) > MOST:
            return {}
        sides = {"trained": self.trained, "chosen_by": self.chosen_by}
        return {"learned_from": {side: _packed(found) for side, found in sides.items() if found}}

    def positions(self, sha256: Collection[str]) -> tuple[frozenset[int], frozenset[int]]:
        """Which of some pictures it was trained on, and which it was chosen by."""
        own = [sha[: 2 * PREFIX] for sha in sha256]
        trained, chosen = (
            frozenset(i for i, sha in enumerate(own) if sha in side) for side in (self.trained, self.chosen_by)
        )
        return trained, chosen


def history(own: Learned, start_from: str | None, first: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the header of an adapter says of the pictures that it has to do with, also before.

    Args:
        own: of its own training.
        start_from: the adapter that it learned on from.
        first: its header.
    """
    if start_from is None or first is None:
        return own.to_header()
    before = Learned.in_header(first)
    return {"start_from": Path(start_from).name, **({} if before is None else (own | before).to_header())}


def _packed(prefixes: Iterable[str]) -> str:
    return base64.b64encode(bytes.fromhex("".join(sorted(prefixes)))).decode()


def _unpacked(text: str) -> Iterable[str]:
    content = base64.b64decode(text)
    return (content[i : i + PREFIX].hex() for i in range(0, len(content), PREFIX))
