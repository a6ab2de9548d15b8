"""Which pictures are drawn together, and with which adapters."""

import torch

from visionlora.diffusion.recipe import LoraUse, Recipe
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.mixing.batches import adapters_of, batches_of, differs, in_pieces
from visionlora.mixing.scales import Scale, Window


def recipe(prompt: str = "a dog", **more: object) -> Recipe:
    return Recipe(prompt, "m", 32, 32, **more)  # type: ignore[arg-type]


def adapter(kind: str = "lora") -> Adapter:
    if kind == "full":
        return Adapter({"unet.norm": AdapterModule("full", {"value": torch.ones(2)}, 1.0)}, {})
    module = AdapterModule.lora(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    return Adapter({"unet.q": AdapterModule(kind, module.tensors, module.alpha, module.options)}, {})


DOG, INK = LoraUse("dog", "dog.safetensors", 0.7), LoraUse("ink", "ink.safetensors", 0.4, {"up": 0.0})
ADAPTERS = {DOG.path: adapter(), INK.path: adapter("full")}


def sizes(recipes: list[Recipe], size: int = 8) -> list[int]:
    return [len(b) for b in batches_of(recipes, size, lambda prompt: "(" not in prompt, ADAPTERS)]


def test_prompts_seeds_and_summed_adapters_may_differ() -> None:
    free = [recipe(), recipe("a cat", seed=1), recipe(loras=(DOG,))]
    assert sizes(free) == [3] and sizes(free, 2) == [2, 1] and sizes(free, 1) == [1, 1, 1]


def test_everything_else_is_shared() -> None:
    for change in ({"steps": 3}, {"scheduler": "ddim"}, {"negative_prompt": "grey"}, {"guidance_scale": 2.0}):
        assert sizes([recipe(), recipe(**change)]) == [1, 1], change
    switch = {"compose": "switch", "compose_options": {"tau": 2}}
    assert sizes([recipe(loras=(DOG,), **switch), recipe("a cat", loras=(DOG,), **switch)]) == [2]
    assert sizes([recipe(loras=(DOG,), **switch), recipe(**switch)]) == [1, 1], "a composition is of all its adapters"
    assert sizes([recipe(loras=(INK,)), recipe("a cat", loras=(INK,)), recipe()]) == [2, 1], "norms are one for all"
    weighted = recipe("a (red:1.2) dog")
    assert sizes([weighted, recipe("a (red:1.2) dog", seed=1), recipe("a (red:1.3) dog")]) == [2, 1]


def test_a_word_counts_as_its_vectors_before_it_is_known() -> None:
    """Prompts that are too long with it are not drawn with others."""
    rex = LoraUse("rex", "rex.safetensors")
    vectors = {"text_encoder": torch.ones(9, 4)}
    brought = {rex.path: Adapter({}, {}, {"<rex>": vectors, "<rex>2": {"text_encoder": torch.ones(1, 4)}})}
    several = [recipe(p, loras=(rex,)) for p in ("a b c d e f g <rex>", "z <rex>", "y <rex>", "a b c d e f g <rex>2")]

    def grouped(recipes: list[Recipe]) -> list[list[str]]:
        found = batches_of(recipes, 8, lambda prompt: len(prompt.split()) <= 14, brought)
        return [[one.prompt for one in batch] for batch in found]

    assert grouped(several) == [["a b c d e f g <rex>"], ["z <rex>", "y <rex>", "a b c d e f g <rex>2"]]
    assert in_pieces("a <rex>, <rex>2", list(brought.values())).split() == ["a"] * 10 + [",", "a"]
    assert in_pieces("a <rex>", []) == "a <rex>"


def test_what_is_one_for_all_pictures_or_large_for_each_cannot_differ() -> None:
    kinds = {
        kind: differs(adapter(kind)) for kind in ("lora", "dora", "ia3", "vera", "full", "tlora", "loha", "diff", "oft")
    }
    assert [kind for kind, may in kinds.items() if may] == ["lora", "dora", "ia3", "vera"]
    module = AdapterModule("dora", {}, 1.0, {"product": "loha"})
    assert not differs(Adapter({"unet.q": module}, {})), "a DoRA over a LoHa is as large"


def test_equal_pictures_have_plain_scales_and_others_a_factor_each() -> None:
    assert adapters_of([recipe(loras=(DOG, INK)), recipe("a cat", loras=(DOG, INK))]) == {
        "dog": (DOG.path, Scale(0.7)),
        "ink": (INK.path, Scale(0.4, {"up": 0.0})),
    }
    early = LoraUse("dog", DOG.path, 0.3, {"end": 0.5})
    batch = [recipe(loras=(DOG,)), recipe(), recipe(loras=(early, INK)), recipe(loras=(DOG, INK))]
    assert adapters_of(batch) == {
        "dog": (DOG.path, Scale(1.0, images=(0.7, 0.0, 0.0, 0.7))),
        "dog (2)": (DOG.path, Scale(1.0, steps=Window(0.0, 0.5), images=(0.0, 0.0, 0.3, 0.0))),
        "ink": (INK.path, Scale(1.0, {"up": 0.0}, images=(0.0, 0.0, 0.4, 0.4))),
    }
