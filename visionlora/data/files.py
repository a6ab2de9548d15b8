"""The files of a data set: which lie in a folder, what their bytes hash to, what their text is.

In: a folder or a file. Out: names, a hash, a text. No picture is opened and no table is understood here.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from visionlora.data.images import IMAGE_SUFFIXES, printable

OTHER_SUFFIXES = (".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".psd", ".svg")
"""Pictures too, but of kinds that Pillow cannot read; they are mentioned, not ignored."""

ASKED_FILE = "asked.yaml"
"""What a run writes before anything else, and no other folder holds."""

# What macOS adds to archives, what Synology's and Windows' drives keep beside files.
_OF_SYSTEMS = frozenset(("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"))


@dataclass(frozen=True)
class Listing:
    """What lies in a folder and below; posix paths relative to it, sorted, hidden ones left out."""

    pictures: list[str] = field(default_factory=list)
    """Linked files count."""
    others: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    """Linked folders. They are not entered: they may lead in circles."""
    runs: list[str] = field(default_factory=list)
    """Folders of runs, which hold samples and charts. They are not entered, but for the root itself."""
    problems: list[str] = field(default_factory=list)
    """One line for each folder that cannot be opened."""

    def other_pictures(self) -> list[str]:
        """The pictures among the other files."""
        return [name for name in self.others if suffix_of(name) in OTHER_SUFFIXES]


class Unusable(Exception):
    """A row or a file that cannot be used; the text goes after its name in a message."""


def list_folder(root: Path, tops: Collection[str] | None = None) -> Listing:
    """Lists a folder and all below.

    Args:
        root: the folder.
        tops: the only names in it to list, also those that have an ending besides; all when not given.
    """
    listing = Listing()
    wanted = None if tops is None else {composed(top) for top in tops}
    stack = [""]
    while stack:
        prefix = stack.pop()
        try:
            with os.scandir(root / prefix) as scanned:
                entries = list(scanned)
                if prefix and any(entry.name == ASKED_FILE for entry in entries):
                    listing.runs.append(prefix.rstrip("/"))
                    listing.folders.remove(prefix.rstrip("/"))
                    continue
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    whole = composed(entry.name)
                    if not prefix and wanted is not None and wanted.isdisjoint((whole, without_suffix(whole))):
                        continue
                    name = prefix + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        listing.folders.append(name)
                        stack.append(f"{name}/")
                    elif entry.is_dir():
                        listing.links.append(name)
                    elif entry.is_file() or entry.is_symlink():  # a link to nothing is reported when it is opened
                        kind = listing.pictures if suffix_of(name) in IMAGE_SUFFIXES else listing.others
                        kind.append(name)
        except OSError as error:
            name = printable(prefix.rstrip("/") or ".")
            listing.problems.append(f"{name} cannot be opened ({error.strerror}); check its permissions")
    for names in (listing.pictures, listing.others, listing.folders, listing.links, listing.runs):
        names.sort()
    return listing


class Names:
    """The names of files, found also where a wanted one differs in how accents are encoded (Unicode normal form), or in spaces
    around it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """Takes the names as they are; the order does not matter."""
        self.exact = frozenset(names)
        self.alike = {_without_spaces(name): name for name in sorted(self.exact, reverse=True)}

    def find(self, name: str) -> str | None:
        """The name that is exactly so, else the one that looks the same."""
        return name if name in self.exact else self.alike.get(_without_spaces(name))


def _without_spaces(name: str) -> str:
    """A path without the spaces around its parts, which no eye sees; composed."""
    return "/".join(part.strip() for part in composed(name).split("/"))


def composed(name: str) -> str:
    r"""A name with its accents composed, as most systems write them; macOS and archives from it often do not.

    >>> composed("cafe\u0301.png")
    'café.png'
    """
    return unicodedata.normalize("NFC", name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over."""
    return name.startswith(".") or name in _OF_SYSTEMS


def suffix_of(name: str) -> str:
    """The ending of a file name, in lower case.

    >>> suffix_of("cats/Tom.JPG"), suffix_of("LICENSE")
    ('.jpg', '')
    """
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a Path for each of 50,000 names takes longer than the scan


def without_suffix(name: str) -> str:
    """A file name, or path, without its ending.

    >>> without_suffix("cats/Tom.JPG"), without_suffix("v1.2/LICENSE")
    ('cats/Tom', 'v1.2/LICENSE')
    """
    return os.path.splitext(name)[0]  # noqa: PTH122 - as above


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        Unusable: when it cannot be read or is in another encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror}); check that it is there and readable") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Unusable("is UTF-16 text; save it as UTF-8")
    if b"\0" in content:
        raise Unusable("holds zero bytes, as UTF-16 text does; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable(f"is not UTF-8 text (at byte {error.start}); save it as UTF-8") from None


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    r"""The lines of a JSONL text that are not empty, with their numbers from 1.

    >>> list(numbered_lines("a\n\nb\n"))
    [(1, 'a'), (3, 'b')]
    """
    # Not splitlines: that would also break at the line separators that JSON allows inside a string.
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
