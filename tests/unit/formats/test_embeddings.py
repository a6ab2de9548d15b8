"""Learned words in files of their own."""

from pathlib import Path

from visionlora.formats.embeddings import files_beside


def test_each_word_has_a_file_of_its_own() -> None:
    found = files_beside(Path("a/dog.safetensors"), ["<rex>", "rex", "<my cat>", "<rex-2>"])
    names = ("dog-rex", "dog-rex-2", "dog-mycat", "dog-rex-2-2")
    assert list(found.values()) == [Path(f"a/{name}.safetensors") for name in names]


def test_names_that_differ_in_case_alone_are_told_apart() -> None:
    """Windows and macOS take them for one file."""
    found = files_beside(Path("dog.safetensors"), ["<Rex>", "<rex>", "<REX-2>"])
    assert [file.stem for file in found.values()] == ["dog-Rex", "dog-rex-2", "dog-REX-2-2"]
