"""Pictures drawn in one batch, each with its own prompt, seed and adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from visionlora.diffusion.recipe import LoraUse, Recipe
from visionlora.lora.adapter import Adapter
from visionlora.mixing.scales import Scale, scale_from

SMALL = ("lora", "vera", "ia3")
"""What a ΔW is made of where its factors are small; in a DoRA too."""


def batches_of(
    recipes: Sequence[Recipe], size: int, words: Callable[[str], bool], adapters: Mapping[str, Adapter]
) -> list[list[Recipe]]:
    """Recipes that can be drawn together, in the order of the first of each batch.

    The pictures of a batch agree in everything but prompt, seed and adapters. In the adapters they agree too where these are
    composed otherwise than summed, or cannot differ from picture to picture; in the prompt where it is read as embeddings.

    Args:
        recipes: what to draw.
        size: the most pictures of a batch.
        words: whether a prompt is given to the pipeline in words.
        adapters: by path; they need not be on the pipeline, which then does not know the words that they bring.
    """
    groups: dict[Recipe | str, list[Recipe]] = {}
    for recipe in recipes:
        own = [adapters[use.path] for use in recipe.loras]
        plain = words(in_pieces(recipe.prompt, own)) and words(in_pieces(recipe.negative_prompt, own))
        free = plain and recipe.compose == "sum" and all(map(differs, own))
        shared = replace(
            recipe, seed=0, prompt="" if plain else recipe.prompt, loras=() if free else recipe.loras, batch_size=1
        )
        groups.setdefault(shared.to_json(), []).append(recipe)
    return [group[k : k + size] for group in groups.values() for k in range(0, len(group), size)]


def in_pieces(prompt: str, adapters: Iterable[Adapter]) -> str:
    """A prompt with a letter for each vector of the words that adapters bring: as long as it is once these are known."""
    counts = {w: max(map(len, parts.values())) for a in adapters for w, parts in a.embeddings.items()}
    for word in sorted(counts, key=len, reverse=True):
        prompt = prompt.replace(word, " a" * counts[word] + " ")
    return prompt


def differs(adapter: Adapter) -> bool:
    """Whether an adapter can act on one picture of a batch and not on another, and takes little memory for each.

    Its words, and norms and biases that it changes, are one for all, and a T-LoRA follows one timestep. The factors of other
    kinds, such as LoHa and full differences, are as large as the weights, and each picture would have its own.
    """
    return not adapter.embeddings and all(m.product in SMALL for m in adapter.modules.values())


def adapters_of(batch: Sequence[Recipe]) -> dict[str, tuple[str, Scale]]:
    """Name -> file and scale of every adapter of a batch; a factor per picture where the pictures differ."""
    first = batch[0]
    if all(recipe.loras == first.loras for recipe in batch):
        return {use.name: (use.path, scale_from(use.scale, use.blocks)) for use in first.loras}
    uses: dict[str, LoraUse] = {}
    images: dict[str, list[float]] = {}
    for k, recipe in enumerate(batch):
        for use in recipe.loras:
            key = replace(use, scale=1.0).word()
            uses.setdefault(key, use)
            images.setdefault(key, [0.0] * len(batch))[k] += use.scale
    found: dict[str, tuple[str, Scale]] = {}
    for key, use in uses.items():
        taken = sum(name == use.name or name.startswith(f"{use.name} (") for name in found)
        name = f"{use.name} ({taken + 1})" if taken else use.name
        found[name] = (use.path, replace(scale_from(1.0, use.blocks), images=tuple(images[key])))
    return found
