"""What adapter files are called."""

import pytest

from visionlora.formats.called import name_of, names_of


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("loras/ink.v2.safetensors", "ink.v2"),
        ("runs/ink-v1.5", "ink-v1.5"),
        ("runs/ink-v1.5/adapter.safetensors", "ink-v1.5"),
        ("out/dog/pytorch_lora_weights.safetensors", "dog"),
        ("out/dog.peft/adapter_model.bin", "dog.peft"),
        ("adapter.safetensors", "adapter"),
    ],
)
def test_the_folder_names_what_every_run_calls_alike(path: str, name: str) -> None:
    assert name_of(path) == name


def test_each_has_another_name() -> None:
    ink = ["a/ink.safetensors", "b/ink.safetensors", "c/b/ink.safetensors", "a/ink.safetensors"]
    assert names_of(ink) == ["ink", "b/ink", "b/ink-2", "a/ink"]
