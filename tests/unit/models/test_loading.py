"""Backbones whose weights are not those of their configuration, which the libraries fill with random values."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from visionlora.errors import ModelError
from visionlora.models.vision import open_backbone

HEADS = ("head.", "classifier.")


@pytest.fixture(params=["timm", "transformers"])
def backbone(request: pytest.FixtureRequest, tiny_vit: Path, tmp_path: Path) -> Path:
    """A folder with a small vision transformer, to be spoilt."""
    import shutil

    folder = tmp_path / "backbone"
    if request.param == "timm":
        shutil.copytree(tiny_vit, folder)
    else:
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    return folder


def rewrite(folder: Path, change: Callable[[str, Tensor], tuple[str, Tensor] | None]) -> str:
    """The folder with its tensors changed one by one; None takes one away."""
    file = folder / "model.safetensors"
    kept = (change(name, t) for name, t in load_file(file).items())
    save_file({name: t.contiguous() for name, t in filter(None, kept)}, file, {"format": "pt"})
    return str(folder)


def renamed(name: str, t: Tensor) -> tuple[str, Tensor]:
    return f"foo.{name}", t


def without_the_last_block(name: str, t: Tensor) -> tuple[str, Tensor] | None:
    return None if any(part in name for part in ("blocks.1.", "layer.1.", "layers.1.")) else (name, t)


def with_narrow_mlps(name: str, t: Tensor) -> tuple[str, Tensor]:
    return name, t[:-1] if "fc1.weight" in name or "intermediate.dense.weight" in name else t


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, r"lacks \d+ tensors \(first '.*'\); has \d+ that the model has not \(first 'foo\."),
        (without_the_last_block, r"lacks 1\d tensors \(first '.*\.1\..*'\)\. Copy"),
        (with_narrow_mlps, r"has '.*weight' of shape .+ where the model has \((96|48), 24\)\. Copy"),
    ],
)
def test_weights_of_another_backbone_are_refused(backbone: Path, change: Callable[..., tuple], said: str) -> None:
    with pytest.raises(ModelError, match=rf"cannot be opened: its weights are not those .*: the file {said}") as caught:
        open_backbone(rewrite(backbone, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "said"), [(renamed, "lacks 30 tensors.*has 30 that"), (with_narrow_mlps, "shape")])
def test_timm_is_strict_with_models_that_never_had_a_head(
    tiny_vit: Path, tmp_path: Path, change: Callable[..., tuple], said: str
) -> None:
    """It raises a list of lines, of which the first says nothing."""
    import json
    import shutil

    shutil.copytree(tiny_vit, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["num_classes"] = config["pretrained_cfg"]["num_classes"] = 0
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    rewrite(tmp_path / "m", lambda name, t: None if name.startswith(HEADS) else (name, t))
    assert open_backbone(str(tmp_path / "m")).features == 24
    with pytest.raises(ModelError, match=rf"its weights are not those .*{said}"):
        open_backbone(rewrite(tmp_path / "m", change))


@pytest.mark.parametrize(
    "change",
    [
        lambda name, t: None if name.startswith(HEADS) else (name, t),
        lambda name, t: (name, t[:-1] if name.startswith(HEADS) else t),
        lambda name, t: (name, t),
    ],
)
def test_any_head_will_do(backbone: Path, change: Callable[..., tuple]) -> None:
    """It is replaced."""
    before = open_backbone(str(backbone)).fingerprints()
    assert open_backbone(rewrite(backbone, change)).fingerprints() == before


def test_what_a_backbone_has_beside_is_left_out(
    tiny_vit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(tiny_vit, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    save_file({**load_file(file), "decoder.weight": torch.zeros(2)}, file)
    assert open_backbone(str(tmp_path / "m")).fingerprints() == open_backbone(str(tiny_vit)).fingerprints()
    assert "decoder" not in capfd.readouterr().err


def test_the_norm_after_pooling_is_new_after_masked_pretraining(tmp_path: Path) -> None:
    from transformers import BeitConfig, BeitForMaskedImageModeling

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = BeitConfig(**sizes, image_size=32, patch_size=8, vocab_size=20)
    BeitForMaskedImageModeling(config).save_pretrained(tmp_path / "m")
    norm = open_backbone(str(tmp_path / "m")).model.beit.pooler.layernorm
    assert torch.equal(norm.weight, torch.ones(24)) and not norm.bias.any()


def test_the_norm_before_the_head_is_new_after_masked_pretraining(tmp_path: Path) -> None:
    """timm's weights `fcmae` of ConvNeXt V2 lack it."""
    import json

    sizes = {"depths": [1] * 4, "dims": [8] * 4}
    tensors = timm.create_model("convnextv2_atto", num_classes=0, **sizes).state_dict()
    save_file({n: t for n, t in tensors.items() if "head." not in n}, tmp_path / "model.safetensors")
    about = {"input_size": [3, 64, 64], "classifier": "head.fc", "num_classes": 7, "first_conv": "stem.0"}
    config = {"architecture": "convnextv2_atto", "num_classes": 7, "model_args": sizes, "pretrained_cfg": about}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_backbone(str(tmp_path)).features == 8


def test_a_backbone_in_half_precision_is_read_in_fp32(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).half().save_pretrained(tmp_path / "m")
    assert {p.dtype for p in open_backbone(str(tmp_path / "m")).model.parameters()} == {torch.float32}


def test_what_timm_logs_is_heard_and_not_changed(backbone: Path) -> None:
    """The check reads timm's words, and puts its log back as it was."""
    import logging

    log = logging.getLogger("timm.models._builder")
    before = log.level, list(log.filters)
    open_backbone(str(backbone))
    assert (log.level, list(log.filters)) == before
    assert timm.models._builder._logger is log
