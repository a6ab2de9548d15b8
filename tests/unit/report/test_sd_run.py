"""What a run says of itself; that its Python runs is in tests/flow/test_model_card.py."""

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from visionlora.data.folder import ImageFolder, ImageItem
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.models.base import EMBEDDED, BaseModel
from visionlora.report.sd_run import pictures_per_step, shared_tags, trigger, usage
from visionlora.training.loop import LoopConfig


def folder(*captions: str) -> ImageFolder:
    return ImageFolder(Path(), tuple(ImageItem(Path(str(k)), c, "") for k, c in enumerate(captions)), (), "")


def test_tags_that_pictures_share_are_told() -> None:
    told = shared_tags(folder("sks dog, at the beach with Ann", "sks dog, {red|red}", "red,  sks  dog, red"))
    assert told == {"sks dog": 3, "red": 2}
    assert len(shared_tags(folder(*[", ".join(map(str, range(300)))] * 2))) == 100


def test_the_trigger_is_a_caption_that_was_learned() -> None:
    """And not the braces around several: nobody could draw with these."""

    def said(*captions: str) -> str | None:
        return trigger(folder(*captions))

    assert said("a {red|blue} dog", "a {red|blue} dog") in ("a red dog", "a blue dog")
    assert [said("sks dog, sitting"), said(r"\{x\}"), said("a", "b")] == ["sks dog, sitting", "{x}", None]


class StableDiffusionPipeline:
    """Whose name is printed."""


BASE = BaseModel("base", "base", "", StableDiffusionPipeline())
LORA = AdapterModule.lora(torch.ones(1, 2), torch.ones(2, 1), 1.0)
PLAIN = Adapter({"unet.a": LORA})


def test_the_snippet_draws_as_it_was_trained() -> None:
    text = usage(BASE, replace(PLAIN, info={"training": {"zero_terminal_snr": True}}), Path("run"), "a dog")
    assert "rescale_betas_zero_snr=True" in text and ast.parse(text)
    assert "from diffusers import DDPMScheduler, StableDiffusionPipeline\n" in text
    assert "rescale" not in usage(BASE, PLAIN, Path("run"), "a dog")


@pytest.mark.parametrize(("base", "adapter", "why"), [
    (replace(BASE, clip_skip=2), PLAIN, "the text 2 layers from the end"),
    (replace(BASE, id=EMBEDDED), PLAIN, "the base comes with visionlora"),
    (replace(BASE, source=__file__), PLAIN, "what the base says of its noise"),
    (BASE, replace(PLAIN, embeddings={"<it>": {}}), "the word <it> in the file"),
    (BASE, replace(PLAIN, modules={"unet.a": AdapterModule("ia3", {"vector": torch.ones(2)}, 1.0)}), "not take ia3 as"),
    (BASE, replace(PLAIN, modules={"unet.a": LORA, "unet.b": replace(LORA, kind="dora")}), "not take lora and dora as"),
])  # fmt: skip
def test_what_diffusers_alone_draws_otherwise_is_said(base: BaseModel, adapter: Adapter, why: str) -> None:
    text = usage(base, adapter, Path("run"), "a dog")
    assert ast.parse(text) and why in text and "from_pretrained" not in text


@pytest.mark.parametrize("adapter", [PLAIN, replace(PLAIN, embeddings={"<it>": {}})], ids=["diffusers", "visionlora"])
def test_the_snippet_is_python_for_every_name(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / 'a "b" c\'s'
    folder.mkdir()
    monkeypatch.chdir(folder)
    text = usage(replace(BASE, source='C:\\new\\"x"'), adapter, Path(), 'a "dog"')
    found = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    assert {'C:\\new\\"x"', folder.name, 'a "dog"'} <= set(found)


def test_a_step_has_the_pictures_of_all_processes(monkeypatch) -> None:
    """The card and the header told those of one."""
    monkeypatch.setattr("visionlora.report.sd_run.process_state", lambda: SimpleNamespace(num_processes=2))
    loop = LoopConfig(steps=1, batch_size=3, gradient_accumulation=4, learning_rate=1.0, warmup_steps=0,
                      weight_decay=0.0, max_grad_norm=1.0, seed=0)  # fmt: skip
    assert pictures_per_step(loop) == 24
