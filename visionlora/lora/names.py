"""Finds the layers of a model under the names that adapter files use: in other spellings, or flattened with underscores.

transformers dropped `text_model.` and `vision_model.` from CLIP's and SigLIP's encoders in 5.6, and renamed the layers of its
ViTs (DINOv2, DINOv3, Swin, SegFormer …) in 5.9; kohya and LyCORIS join the parts of a name with `_`. A flat name is looked
up in the table of the model's own names, never taken apart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

SPELLINGS = tuple(
    (re.compile(rf"(?<![^_]){older}(?![^_])"), newer)
    for older, newer in (
        (r"encoder_layer_(\d+)", r"layers_\1"),
        (r"encoder_block_(\d+)_(\d+)", r"stages_\1_blocks_\2"),
        (r"encoder_patch_embeddings_(\d+)", r"stages_\1_patch_embeddings"),
        (r"^model(?=_(?:layer|stages)_\d)", ""),
        (r"attention_(?:attention|self)_query", "attention_q_proj"),
        (r"attention_(?:attention|self)_key", "attention_k_proj"),
        (r"attention_(?:attention|self)_value", "attention_v_proj"),
        (r"attention_self_sr", "attention_sequence_reduction_sequence_reduction"),
        (r"attention_output_dense", "attention_o_proj"),
        (r"intermediate_dense", "mlp_fc1"),
        (r"output_dense", "mlp_fc2"),
        (r"mlp_dense([12])", r"mlp_fc\1"),
        (r"mlp_weights_out", "mlp_down_proj"),
    )
)
"""From the older names to the newer ones, both flat."""
GATED = re.compile(r"(?<![^._])mlp([._])weights_in(?=\.(?:weight|bias)$|$)")
HALVES = ("gate_proj", "up_proj")
"""What was one layer, `GATED`, by its outputs."""
TOWER = re.compile(r"(text|vision)_model[._]")
EMBEDDINGS = {"embeddings.token_embedding": "text", "embeddings.patch_embedding": "vision"}
"""What CLIP's and SigLIP's encoders begin with."""


@lru_cache(maxsize=2**16)
def spelling_key(name: str) -> str:
    """The same for every spelling of a layer's name.

    >>> spelling_key("text_model.encoder.layers.0.mlp.fc1") == spelling_key("encoder_layers_0_mlp_fc1")
    True
    >>> old, new = "vit.encoder.layer.3.attention.attention.query", "vit.layers.3.attention.q_proj"
    >>> spelling_key(old) == spelling_key(new) == spelling_key(old.replace(".", "_"))
    True
    """
    name = name.replace(".", "_").removeprefix("text_model_").removeprefix("vision_model_")
    for pattern, replacement in SPELLINGS:
        name = pattern.sub(replacement, name)
    return name.removeprefix("_")


def halves_of(name: str) -> tuple[str, str] | None:
    """The two layers, or parameters of theirs, that transformers has made of a layer of the gated MLP of DINOv2; None for
    any other.

    >>> halves_of("layer.0.mlp.weights_in"), halves_of("layer.0.mlp.fc1")
    (('layer.0.mlp.gate_proj', 'layer.0.mlp.up_proj'), None)
    """
    if GATED.search(name) is None:
        return None
    gate, up = (GATED.sub(rf"mlp\1{half}", name) for half in HALVES)
    return gate, up


def tower_of(name: str) -> str:
    """text or vision, where a layer's name says in which of a model's two encoders it is.

    >>> tower_of("vision_model.encoder.layers.0.mlp.fc1"), tower_of("layers.0.mlp.fc1")
    ('vision', '')
    """
    found = TOWER.match(name)
    return found[1] if found else ""


def tower_of_model(known: Iterable[str]) -> str:
    """text or vision, for the names of a model that is one of these encoders alone."""
    embedded = {tower for name in known for word, tower in EMBEDDINGS.items() if name.endswith(word)}
    return embedded.pop() if len(embedded) == 1 else ""


def resolve_names(given: Iterable[str], known: Iterable[str]) -> Mapping[str, str]:
    """{given name: the model's name}, for those that the model has.

    Args:
        given: names of layers and parameters as a file has them.
        known: the model's own names. Two that differ only in what a flat name loses are found by their exact names alone.
    """
    exact = set(known)
    flat, table = (unambiguous(exact, key) for key in (lambda name: name.replace(".", "_"), spelling_key))
    model = tower_of_model(exact)
    found = {}
    for name in given:
        match = name if name in exact else flat.get(name) or table.get(spelling_key(name))
        # The layers of a model's two encoders are called alike; without its prefix a name may be of either.
        if match is not None and len({tower_of(name), tower_of(match) or model} - {""}) < 2:
            found[name] = match
    return found


def unambiguous(names: Iterable[str], key: Callable[[str], str]) -> dict[str, str]:
    """{key: name}, for keys that one name alone has."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return {k: own[0] for k, own in found.items() if len(own) == 1}


def common_names(files: Sequence[Iterable[str]]) -> dict[str, str]:
    """{name: the one to use for it}, for layers that several files spell in different ways: the one with the most dots.

    Args:
        files: the names in each. Two of one file that differ in spelling alone are two layers, and stay as they are; so do
            those of a text and of a vision encoder.

    >>> common_names([["encoder.layers.0.mlp.fc1"], ["text_model.encoder.layers.0.mlp.fc1"]])
    {'encoder.layers.0.mlp.fc1': 'text_model.encoder.layers.0.mlp.fc1'}
    """
    spellings: dict[str, set[str]] = {}
    apart: set[str] = set()
    for names in files:
        keys = {name: spelling_key(name) for name in names}
        apart |= {key for key, count in Counter(keys.values()).items() if count > 1}
        for name, key in keys.items():
            spellings.setdefault(key, set()).add(name)
    apart |= {key for key, names in spellings.items() if len({tower_of(name) for name in names} - {""}) > 1}
    found: dict[str, str] = {}
    for key, names in spellings.items():
        chosen = max(sorted(names), key=lambda name: name.count("."))
        found |= {name: chosen for name in names if name != chosen and key not in apart}
    return found
