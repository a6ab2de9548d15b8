"""Settings of one folder of pictures among several."""

from __future__ import annotations

from dataclasses import dataclass

from visionlora.config.reading import raise_all, take
from visionlora.errors import nearest

CAPTIONS = ("auto", "filename")
"""Where captions come from: files in the folder, or the names of the pictures."""
ALPHA = "alpha"
"""The word that takes masks from the pictures themselves."""


@dataclass(frozen=True)
class FolderConfig:
    """A folder of pictures and how it is read, checked at construction.

    Raises:
        ConfigError: naming every setting that cannot be used, in one message.
    """

    path: str = ""
    """Folder, or parquet file; relative to the working directory, as all paths are."""
    prompt: str | None = None
    """One caption for every picture of it; without it captions come from the folder."""
    repeats: int = 1
    """How often each of its pictures counts in one pass."""
    captions: str = "auto"
    """auto, or filename: a picture's name is its caption."""
    masks: str | None = None
    """What of each picture is learned: `alpha` (what is not transparent), or a folder of grey pictures, white where to; of a
    parquet table the column that holds them."""

    def __post_init__(self) -> None:
        take(self)
        raise_all([f"{name} is {getattr(self, name)!r}; {rule}" for name, fine, rule in self.rules() if not fine])

    def rules(self) -> list[tuple[str, bool, str]]:
        """What must hold: a setting, whether its value is fine, and what it must be."""
        return [
            ("path", bool(self.path.strip()), "name a folder of pictures"),
            ("repeats", self.repeats >= 1, "it must be at least 1"),
            *reading_rules(self.prompt, self.captions, self.masks),
        ]


def reading_rules(prompt: str | None, captions: str, masks: str | None) -> list[tuple[str, bool, str]]:
    """What must hold of these settings, whether of one folder or of all."""
    return [
        ("prompt", prompt is None or bool(prompt.strip()), "write a caption, or leave it out"),
        ("captions", captions in CAPTIONS, nearest(captions, CAPTIONS)),
        ("captions", captions != "filename" or prompt is None, "a prompt is given: leave one of them out"),
        ("masks", masks is None or bool(masks.strip()), "write alpha, the path of a folder or the column of a table"),
    ]
