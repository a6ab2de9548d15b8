"""Folders whose weights, files or tokenizers are not those of their configuration, and folders in every layout that are."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from visionlora.errors import ModelError
from visionlora.models.base import open_base, open_controlnet

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def rewritten(model: Path, folder: Path, part: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
    """A copy of a model whose part has other tensors; the folder's name."""
    shutil.copytree(model, folder)
    file = folder / part / f"{WEIGHTS[part]}.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return str(folder)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"foo.{name}": t for name, t in tensors.items()}


def without_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    lost = next(n for n in sorted(tensors) if n.endswith("weight") and tensors[n].dim() > 1)
    return {n: t for n, t in tensors.items() if n != lost}


def shorter(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    cut = next(n for n in sorted(tensors) if n.endswith("weight") and tensors[n].dim() > 1)
    return {**tensors, cut: tensors[cut][:-1].clone()}


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, r"lacks \d+ tensors \(first '.+', '.+', '.+'\); has \d+ that the model has not \(first 'foo\."),
        (without_one, r"lacks 1 tensor \(first '.*weight'\)"),
        (shorter, r"has '.*weight' of .*shape.* where the model has \("),
    ],
)
def test_weights_of_another_model_are_refused(
    tiny_model: Path, tmp_path: Path, part: str, change: Callable[..., dict[str, Tensor]], said: str
) -> None:
    """The libraries fill what is missing with random values, and say so to a log alone."""
    with pytest.raises(
        ModelError, match=rf"cannot be opened: the weights of its {part} are not those .*{said}"
    ) as caught:
        open_base(rewritten(tiny_model, tmp_path / "m", part, change))
    assert "\n" not in str(caught.value)


def test_the_projection_of_sdxl_belongs_to_its_text_encoder(tiny_xl: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_xl, tmp_path / "m")
    file = tmp_path / "m" / "text_encoder_2" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "text_projection" not in n}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"of its text_encoder_2 .* lacks 1 tensor \(first 'text_projection.weight'\)"):
        open_base(str(tmp_path / "m"))


def test_a_controlnet_of_other_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    base = open_base(str(tiny_model))
    net = ControlNetModel.from_unet(base.pipe.unet, conditioning_embedding_out_channels=(8, 8))
    net.save_pretrained(tmp_path / "net")
    file = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    save_file(renamed(load_file(file)), file, {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"The ControlNet .* cannot be opened: its weights are not those .*lacks \d+ tensors"
    ):
        open_controlnet(str(tmp_path / "net"), base)


def same(a: str | Path, b: str | Path) -> bool:
    """Whether two folders open as the same model."""
    one, two = (open_base(str(x)) for x in (a, b))
    parts = zip((*one.components().values(), one.pipe.vae), (*two.components().values(), two.pipe.vae), strict=True)
    return all(
        torch.equal(t, other.state_dict()[n]) for part, other in parts for n, t in part.state_dict().items()
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["shards", "bin", "older", "older bin"])
def test_every_layout_of_a_folder_opens(
    layout: str, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    base = open_base(str(tiny_model))
    if layout == "shards":
        for name, part in {**base.components(), "vae": base.pipe.vae}.items():
            shutil.rmtree(folder / name)
            part.save_pretrained(folder / name, max_shard_size="20KB")
        assert len(list(folder.rglob("*-of-*"))) > 3
    else:
        for part, name in WEIGHTS.items():
            file = folder / part / f"{name}.safetensors"
            tensors = load_file(file)
            if part == "text_encoder" and "older" in layout:
                tensors = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in tensors.items()}
                tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
            file.unlink()
            if "bin" in layout:
                torch.save(tensors, file.with_name("pytorch_model.bin" if part == "text_encoder" else f"{name}.bin"))
            else:
                save_file(tensors, file, {"format": "pt"})
    capfd.readouterr()
    assert same(folder, tiny_model)
    assert "error" not in "".join(capfd.readouterr()).lower()


@pytest.mark.parametrize("layout", ["bin", "fp16", "fp16 bin"])
def test_the_libraries_keep_their_errors_when_another_file_will_do(
    layout: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    more = {"variant": "fp16"} if "fp16" in layout else {}
    pipe.save_pretrained(tmp_path / "m", safe_serialization="bin" not in layout, **more)
    said: list[str] = []
    monkeypatch.setattr(logging.Logger, "handle", lambda _, record: said.append(record.getMessage()))
    assert open_base(str(tmp_path / "m")).variant == more.get("variant")
    assert said == []


def test_a_hub_id_of_fp16_files_alone_is_fetched_as_such(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fetched without a variant has no weights then."""
    import json

    from diffusers import DiffusionPipeline

    DiffusionPipeline.from_pretrained(tiny_model, safety_checker=None).save_pretrained(
        tmp_path / "fp16", variant="fp16"
    )
    shutil.copytree(tmp_path / "fp16", tmp_path / "None", ignore=shutil.ignore_patterns("*.safetensors"))
    asked: list[str | None] = []

    def download(source: str, variant: str | None = None, **_: object) -> str:
        asked.append(variant)
        return str(tmp_path / str(variant))

    index = json.loads((tmp_path / "fp16" / "model_index.json").read_text())
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda source, **_: index)
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    base = open_base("somebody/something")
    assert (asked, base.variant, base.id) == ([None, "fp16"], "fp16", "somebody/something")


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("unet", r"its unet is missing: there is no folder .*m/unet\."),
        ("scheduler", r"its scheduler is missing: there is no folder .*m/scheduler\."),
        ("unet/config.json", r"its unet has no configuration: .*m/unet has no config\.json \(there: diffusion_pytorch_model"),
        ("text_encoder/config.json", r"its text_encoder has no configuration: .*m/text_encoder has no config\.json"),
        ("scheduler/scheduler_config.json", r"its scheduler has no configuration: .* has no scheduler_config\.json\."),
        ("vae/diffusion_pytorch_model.safetensors", r"its vae has no weights: .* has no diffusion_pytorch_model\.safetensors, "
         r"nor such weights as \.fp16 or \.bin, nor an index of their parts \(there: config\.json\)\."),
        ("text_encoder/model.safetensors", r"its text_encoder has no weights: .*m/text_encoder has no model\.safetensors, nor"),
    ],
)  # fmt: skip
def test_a_folder_without_a_file_says_which(tiny_model: Path, tmp_path: Path, gone: str, said: str) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    remove(tmp_path / "m" / gone)
    with pytest.raises(ModelError, match=f"m cannot be opened: {said}"):
        open_base(str(tmp_path / "m"))


def test_shards_without_their_index_or_with_one_too_few(tiny_model: Path, tmp_path: Path) -> None:
    unet = open_base(str(tiny_model)).pipe.unet
    shutil.copytree(tiny_model, tmp_path / "m")
    shutil.rmtree(folder := tmp_path / "m" / "unet")
    unet.save_pretrained(folder, max_shard_size="60KB")
    shard = sorted(folder.glob("*-of-*"))[1]
    shard.rename(tmp_path / "kept")
    with pytest.raises(ModelError, match=rf"unet/{shard.name}") as caught:
        open_base(str(tmp_path / "m"))
    assert "connection" not in str(caught.value)
    (tmp_path / "kept").rename(shard)
    next(folder.glob("*.index.json")).unlink()
    with pytest.raises(ModelError, match=r"its unet has no weights: .* nor an index of their parts \(there: .*-of-"):
        open_base(str(tmp_path / "m"))


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


VOCABULARY = ("tokenizer.json", "vocab.json")


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ((".",), r"its {} is missing: there is no folder .*m/{}\. Copy"),
        (VOCABULARY, r"its {} has no vocabulary: .*m/{} has neither tokenizer\.json nor vocab\.json with merges\.txt"),
        (("tokenizer.json", "merges.txt"), r"its {} has no vocabulary: .* has neither tokenizer\.json nor vocab\.json with"),
        (("tokenizer_config.json",), r"its {} does not say how long a text may be .*reads 16\).*tokenizer_config"),
    ],
)  # fmt: skip
def test_a_tokenizer_without_its_files_is_refused(
    tiny_xl: Path, tmp_path: Path, part: str, gone: tuple[str, ...], said: str
) -> None:
    """transformers makes an empty one, to which all prompts are the same."""
    shutil.copytree(tiny_xl, tmp_path / "m")
    for name in gone:
        remove(tmp_path / "m" / part / name)
    with pytest.raises(ModelError, match="cannot be opened: " + said.format(part, part)):
        open_base(str(tmp_path / "m"))


def test_a_tokenizer_that_knows_no_letters_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    import json

    shutil.copytree(tiny_model, tmp_path / "m")
    for name, inside in (("tokenizer.json", ("model", "vocab")), ("vocab.json", ())):
        if not (file := tmp_path / "m" / "tokenizer" / name).exists():
            continue
        whole = json.loads(file.read_text())
        vocabulary = whole
        for key in inside:
            vocabulary = vocabulary[key]
        for word in [w for w in vocabulary if not w.startswith("<|")]:
            del vocabulary[word]
        file.write_text(json.dumps(whole))
    with pytest.raises(ModelError, match=r"its tokenizer knows no letters, so that all prompts .*\(2 tokens\)"):
        open_base(str(tmp_path / "m"))
