"""The adapter methods, one file each, and their registry."""

from __future__ import annotations

from visionlora.lora.methods.adalora import AdaLoRA
from visionlora.lora.methods.base import Method
from visionlora.lora.methods.dora import DoRA
from visionlora.lora.methods.ia3 import IA3
from visionlora.lora.methods.lora import LoRA
from visionlora.lora.methods.oft import OFT
from visionlora.lora.methods.product import Product
from visionlora.lora.methods.tlora import TLoRA
from visionlora.lora.methods.vera import VeRA

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "rslora": LoRA,
    "lora+": LoRA,
    "lora-fa": LoRA,
    "tlora": TLoRA,
    "dora": DoRA,
    "adalora": AdaLoRA,
    "vera": VeRA,
    "ia3": IA3,
}
"""By the word that a configuration uses."""

KINDS: dict[str, type[Method]] = {
    "lora": LoRA,
    "tlora": TLoRA,
    "dora": DoRA,
    "vera": VeRA,
    "ia3": IA3,
    "oft": OFT,
    "loha": Product,
    "lokr": Product,
    "diff": Product,
}
"""By the kind that an adapter file names."""
