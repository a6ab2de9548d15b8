"""What a training step sees."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from visionlora.data.cache import TensorCache
from visionlora.data.folder import read_image_folder
from visionlora.diffusion.denoiser import Denoiser, LearnedWord, Tokens
from visionlora.diffusion.encode import Encoded, Plan, encode_dataset
from visionlora.diffusion.objective import Batch, Objective, denoising_losses, predict
from visionlora.diffusion.task import DenoisingTask, Preservation
from visionlora.diffusion.validation import Validation
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import inject
from visionlora.models.base import BaseModel, open_base
from visionlora.training.learner import JointLearner, Part
from visionlora.training.order import generator_at

ALL = torch.tensor([0, 1, 2])


def encoded(base: BaseModel, dogs: Path, cache: Path, **more: object) -> Encoded:
    return encode_dataset(base, read_image_folder(dogs).items, 32, TensorCache(cache / "c"), **more)


def task_of(base: BaseModel, data: Encoded, **more: object) -> DenoisingTask:
    return DenoisingTask(data, base.noise_scheduler, **{"caption_dropout": 0.0, **more})


def losses(task: DenoisingTask, model: torch.nn.Module, part: slice = slice(None)) -> torch.Tensor:
    return task.losses(model, ALL, generator_at(0, 0), part)


@pytest.mark.parametrize("family", ["tiny_model", "tiny_sd2", "tiny_xl"])
def test_a_picture_draws_the_same_whoever_takes_it(
    family: str, request: pytest.FixtureRequest, dogs: Path, tmp_path: Path
) -> None:
    base = open_base(str(request.getfixturevalue(family)))
    more = Objective(noise_offset=0.1, input_perturbation=0.1, min_snr_gamma=5)
    task = task_of(base, encoded(base, dogs, tmp_path), caption_dropout=0.5, objective=more)
    whole = losses(task, base.pipe.unet)
    parts = torch.cat([losses(task, base.pipe.unet, slice(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    assert len(set(whole.tolist())) == 3


def test_what_is_dropped_and_drawn(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    base = open_base(str(tiny_model))
    data = encoded(base, dogs, tmp_path, captions=[("a dog", "the dog")] * 3)
    drawn = [task_of(base, data, caption_dropout=0.3).drawn(0, seed) for seed in range(600)]
    counts = [sum(d.caption == c for d in drawn) for c in range(3)]
    assert [c / 600 for c in counts] == pytest.approx([0.3, 0.35, 0.35], abs=0.06)
    assert all(d.caption == 0 for d in (task_of(base, data, caption_dropout=1.0).drawn(0, s) for s in range(20)))
    offset = task_of(base, data, objective=Objective(noise_offset=0.5)).drawn(0, 1)
    plain = task_of(base, data).drawn(0, 1)
    shift = offset.noise - plain.noise
    assert torch.allclose(shift, shift[:, :1, :1].expand_as(shift), atol=1e-6) and shift.abs().max() > 0
    assert plain.perturbation is None


def test_a_picture_partly_masked_learns_the_rest(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for i in range(3):
        mask = Image.new("L", (32, 32), 0)
        mask.paste(255, (0, 0, 32, 16))
        mask.save(tmp_path / "masks" / f"{i}.png")
    base = open_base(str(tiny_model))
    folder = read_image_folder(dogs, masks=str(tmp_path / "masks"))
    data = encode_dataset(base, folder.items, 32, TensorCache(tmp_path / "c"))
    task = task_of(base, data, unmasked_weight=0.25)
    masks = data.masks([0, 1], [0, 0], 0.25)
    assert torch.equal(masks[:, :4], torch.ones(2, 4, 8)) and torch.equal(masks[:, 4:], torch.full((2, 4, 8), 0.25))
    batch = task.batch([task.drawn(0, 0)], [1])
    error = (predict(base.pipe.unet, task.noise_scheduler, batch) - batch.noise).square().mean(1)[0]
    expected = (error * masks[0]).sum() / masks[0].sum()
    torch.testing.assert_close(denoising_losses(base.pipe.unet, task.noise_scheduler, batch)[0], expected)


def learner_on(base: BaseModel) -> JointLearner:
    handle = inject(base.pipe.unet, AdapterConfig(rank=2))
    return JointLearner(base.pipe.unet, [Part("unet", handle)])


def test_the_base_holds_its_class_without_pictures_of_it(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    base = open_base(str(tiny_model))
    data = encoded(base, dogs, tmp_path, more_captions=["a dog"])
    assert data.captions[1] == "a dog"
    learner = learner_on(base)
    held = task_of(base, data, preservation=Preservation(2.0, 1, learner))
    torch.testing.assert_close(losses(held, base.pipe.unet), losses(task_of(base, data), base.pipe.unet))
    for part in learner.parts:
        for m in part.learning.methods.values():
            torch.nn.init.normal_(m.lora_B)
    with_adapter = losses(task_of(base, data), base.pipe.unet)
    found = losses(held, base.pipe.unet)
    seeds = torch.randint(2**62, (3,), generator=generator_at(0, 0)).tolist()
    drawn = [held.drawn(i, seed) for i, seed in enumerate(seeds)]
    batch = held.batch(drawn, [1, 1, 1])
    now = predict(base.pipe.unet, held.noise_scheduler, batch)
    with learner.without_adapter():
        before = predict(base.pipe.unet, held.noise_scheduler, batch)
    expected = with_adapter + 2.0 * (now - before).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (now - before).abs().max() > 0.01


def test_pictures_of_the_class_have_their_weight(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    base = open_base(str(tiny_model))
    items = read_image_folder(dogs).items
    data = encode_dataset(base, items[:1], 32, TensorCache(tmp_path / "c"), class_items=items[1:])
    assert data.sides == (0, 1, 1) and {g.turns for g in data.groups} == {2}
    plain = losses(task_of(base, data), base.pipe.unet)
    weighted = losses(task_of(base, data, preservation=Preservation(0.5)), base.pipe.unet)
    torch.testing.assert_close(weighted, plain * torch.tensor([1.0, 0.5, 0.5]))


@pytest.mark.parametrize("family", ["tiny_model", "tiny_xl"])
def test_text_that_is_encoded_anew_gives_the_same(
    family: str, request: pytest.FixtureRequest, dogs: Path, tmp_path: Path
) -> None:
    base = open_base(str(request.getfixturevalue(family)))
    data = encoded(base, dogs, tmp_path)
    tokens, model = Tokens.of(base, data), Denoiser(base)
    cached = task_of(base, data, caption_dropout=0.5)
    anew = task_of(base, data, caption_dropout=0.5, tokens=tokens)
    torch.testing.assert_close(losses(anew, model), losses(cached, base.pipe.unet), rtol=1e-4, atol=1e-5)
    one = Validation(data, base.noise_scheduler, 0).evaluate(base.pipe.unet, 0)
    two = Validation(data, base.noise_scheduler, 0, tokens).evaluate(model, 0)
    assert two.loss == pytest.approx(one.loss, rel=1e-4)


def test_text_encoders_and_a_new_word_get_gradients(tiny_xl: Path, dogs: Path, tmp_path: Path) -> None:
    base = open_base(str(tiny_xl))
    word = LearnedWord(base, "<dog>", 2, "dog")
    data = encoded(base, dogs, tmp_path, captions=[("a <dog>",)] * 3)
    handle = inject(base.pipe.text_encoder, AdapterConfig(rank=2, exclude=(r"re:.*layers\.1\..*",)))
    model = Denoiser(base, word)
    task = task_of(base, data, tokens=Tokens.of(base, data))
    losses(task, model).sum().backward()
    handle.check_gradients()
    for name in ("text_encoder", "text_encoder_2"):
        gradient = word.vectors[name].grad
        assert gradient.shape[0] == 2 and (gradient.abs().sum(1) > 0).all(), "both vectors stand in the prompt"
    assert base.pipe.text_encoder.get_input_embeddings().weight.grad is None


def test_batches_have_pictures_of_one_size(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    for i in range(3):
        Image.effect_noise((48, 24), 90).convert("RGB").save(dogs / f"wide-{i}.png")
    base = open_base(str(tiny_model))
    data = encode_dataset(base, read_image_folder(dogs).items, Plan(32, 8), TensorCache(tmp_path / "c"))
    assert sorted(g.turns for g in data.groups) == [3, 3]
    task = task_of(base, data)
    for group in data.groups:
        found = task.losses(base.pipe.unet, torch.tensor(group.positions), generator_at(0, 0), slice(None))
        assert torch.isfinite(found).all() and found.shape == (3,)
    assert isinstance(task.batch([task.drawn(0, 0)], [0]), Batch)
    evaluation = Validation(data, base.noise_scheduler, 0).evaluate(base.pipe.unet, 0)
    assert evaluation.loss > 0
