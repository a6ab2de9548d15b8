"""Adapters in memory."""

import pytest
import torch

from visionlora.errors import AdapterFileError
from visionlora.lora.adapter import Adapter, AdapterModule


@pytest.mark.parametrize(("name", "meant"), [("0", "model.0"), ("to_q.", "model.to_q"), (".to_q", "model.to_q")])
def test_a_module_without_a_component_is_refused(name: str, meant: str) -> None:
    """It was attached with 0 modules used, and nothing was said."""
    with pytest.raises(AdapterFileError, match=f"has a module '{name}', which is not a component.* such as '{meant}'"):
        Adapter({name: AdapterModule.lora(torch.ones(1, 2), torch.ones(2, 1), 1.0)})


def test_an_adapter_is_shown_in_a_line() -> None:
    module = AdapterModule.lora(torch.zeros(2, 4), torch.zeros(4, 2), 2)
    assert repr(Adapter({"unet.a": module, "unet.b": module})) == "<Adapter of 2 modules of unet, format 'visionlora'>"
    assert repr(Adapter({})) == "<Adapter of 0 modules, format 'visionlora'>"
