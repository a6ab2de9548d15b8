"""Learned words in files of their own."""

from pathlib import Path

from visionlora.formats.embeddings import files_beside


def test_each_word_has_a_file_of_its_own() -> None:
    found = files_beside(Path("a/dog.safetensors"), ["<rex>", "rex", "<my cat>", "<rex-2>"])
    names = ("dog-rex", "dog-rex-2", "dog-mycat", "dog-rex-2-2")
    assert list(found.values()) == [Path(f"a/{name}.safetensors") for name in names]
