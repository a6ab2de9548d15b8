"""Broken adapter files: our own error, never a crash."""

from hypothesis import given, settings
from hypothesis import strategies as st

from visionlora.errors import AdapterFileError
from visionlora.formats import native
from visionlora.lora.adapter import Adapter, AdapterModule


def whole() -> bytes:
    import torch

    module = AdapterModule.lora(torch.ones(2, 3), torch.ones(4, 2), 2.0)
    return native.to_bytes(Adapter({"unet.a": module}), {})


@settings(max_examples=400)
@given(st.data())
def test_flipped_and_cut_bytes_are_refused_or_read(tmp_path_factory, data: st.DataObject) -> None:
    original = bytearray(whole())
    for _ in range(data.draw(st.integers(0, 3))):
        original[data.draw(st.integers(0, len(original) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    path.write_bytes(bytes(original[: data.draw(st.integers(0, len(original)))]))
    try:
        adapter = native.read(path)
    except AdapterFileError as e:
        assert str(path) in str(e)
    else:
        assert all(m.rank >= 1 for m in adapter.modules.values())
