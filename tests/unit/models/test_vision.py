"""Backbones of three libraries through one door."""

import copy
import hashlib
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from visionlora.errors import ModelError
from visionlora.models.heads import as_logits, heads_in
from visionlora.models.vision import open_backbone
from visionlora.training.learner import rates_by_depth

LAST = -1
"""The depth of a model's last block."""
SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


def timm_folder(path: Path, **more: object) -> Path:
    """A folder as timm's users save it."""
    torch.manual_seed(0)
    arguments = {**SMALL, **more}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **arguments)
    path.mkdir()
    save_file(model.state_dict(), path / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9,
            "classifier": "head", "num_classes": 7, "first_conv": "patch_embed.proj",
        },
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def transformers_folder(path: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(path)
    ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.3] * 3, resample=3
    ).save_pretrained(path)
    return path


def test_the_embedded_one_is_the_default_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    opened = open_backbone()
    assert (opened.id, opened.library, opened.head, opened.features) == ("emoji-vit", "timm", "head", 192)
    assert "no GPU" in opened.why and opened.small
    assert not opened.model.training and not any(p.requires_grad for p in opened.model.parameters())


@pytest.mark.parametrize("make", [timm_folder, transformers_folder])
def test_a_folder_opens_with_its_preprocessing_and_a_head_of_any_size(make, tmp_path: Path) -> None:
    opened = open_backbone(str(make(tmp_path / "model")))
    x = torch.randn(2, 3, 32, 32)
    features = as_logits(opened.model(x))
    assert features.shape == (2, 24) and opened.preprocessing.size == 32
    head = opened.new_head(5, seed=1)
    assert torch.allclose(as_logits(opened.model(x)), nn.functional.linear(features, head.weight, head.bias), atol=1e-5)
    again = opened.new_head(5, seed=1)
    assert torch.equal(head.weight, again.weight)


def test_preprocessing_comes_from_the_folder(tmp_path: Path) -> None:
    one = open_backbone(str(timm_folder(tmp_path / "a"))).preprocessing
    assert (one.crop_pct, one.interpolation, one.crop_mode) == (0.9, "bicubic", "center")
    two = open_backbone(str(transformers_folder(tmp_path / "b"))).preprocessing
    assert (two.mean, two.std, two.interpolation, two.crop_mode) == ((0.4,) * 3, (0.3,) * 3, "bicubic", "squash")


def test_a_convolutional_classifier_of_transformers(tmp_path: Path) -> None:
    """Its config names no size, and its head is the last layer of several."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    opened = open_backbone(str(tmp_path / "model"))
    assert (opened.head, opened.features, opened.preprocessing.size) == ("classifier.1", 16, 224)
    opened.new_head(5, 0)
    assert as_logits(opened.model(torch.zeros(2, 3, 64, 64))).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnetv2_18", "head.fc"),  # a convolution before the flatten
        ("dla46_c", "fc"),
        ("dpn48b", "classifier"),
        ("efficientvit_m0", "head.linear"),  # a part of what timm takes off without classes
        ("shvit_s1", "head.l"),
        ("levit_128s", "class_head"),  # several heads
        ("repvit_m0_9", "class_head"),
        ("efficientvim_m1", "class_head"),
        ("deit_tiny_distilled_patch16_224", "class_head"),
        ("torchvision/squeezenet1_1", "class_head"),  # layers after its convolution
        ("torchvision/mobilenet_v3_small", "classifier.3"),
        ("resnet18", "fc"),
    ],
)
def test_each_family_learns_other_classes(name: str, head: str) -> None:
    opened = open_backbone(name, "random")
    assert opened.head == head
    x = torch.randn(2, 3, opened.preprocessing.size, opened.preprocessing.size)
    with torch.no_grad():
        features = as_logits(opened.model(x))
        before = opened.fingerprints()
        new = opened.new_head(5, seed=1)
        logits = as_logits(opened.model(x))
    assert torch.allclose(logits, nn.functional.linear(features, new.weight, new.bias), atol=1e-4)
    assert features.shape == (2, opened.features) and opened.fingerprints() == before
    assert type(opened.model).forward is type(copy.deepcopy(opened.model)).forward


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SEES = {**TINY, "image_size": 48, "patch_size": 16}
TEXTS = {**TINY, "vocab_size": 32}
LEVIT = {
    "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
    "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2],
}  # fmt: skip
SWIFT = {"image_size": 64, "depths": [1, 1], "embed_dims": [8, 16], "mlp_ratio": 2}
HGNET = {
    "embedding_size": 8, "depths": [1, 1], "hidden_sizes": [8, 16], "stem_channels": [3, 8, 8], "stage_in_channels": [8, 8],
    "stage_mid_channels": [4, 4], "stage_out_channels": [8, 16], "stage_num_blocks": [1, 1], "stage_numb_of_layers": [2, 2],
    "stage_downsample": [False, True], "stage_light_block": [False, True], "stage_kernel_size": [3, 3],
}  # fmt: skip
TEXTNET = {"image_size": [64, 64], "stem_out_channels": 8, "hidden_sizes": [8] * 5}


@pytest.mark.parametrize(
    ("name", "settings", "head", "size"),
    [
        ("CLIP", {"vision_config": SEES, "text_config": TEXTS}, "classifier", 48),
        ("Siglip", {"vision_config": SEES, "text_config": TEXTS}, "classifier", 48),
        ("HGNetV2", HGNET, "fc", 224),
        ("TextNet", TEXTNET, "fc", 64),
        ("Levit", LEVIT, "classifier.linear", 64),
        ("DeiTWithTeacher", {**SEES, "image_size": 32}, "class_head", 32),  # two heads, of which the mean is taken
        ("LevitWithTeacher", LEVIT, "class_head", 64),
        ("SwiftFormer", SWIFT, "class_head", 64),
    ],
)
def test_classifiers_of_transformers_learn_other_classes(
    name: str, settings: dict, head: str, size: int, tmp_path: Path
) -> None:
    import transformers

    name, _, teacher = name.partition("With")
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForImageClassification{teacher and 'With' + teacher}")(config).eval()
    model.save_pretrained(tmp_path / "model")
    opened = open_backbone(str(tmp_path / "model"))
    assert (opened.head, opened.preprocessing.size) == (head, size)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = as_logits(opened.model(x))
        new = opened.new_head(5, seed=1)
        logits = as_logits(opened.model(x))
    torch.testing.assert_close(logits, nn.functional.linear(features, new.weight, new.bias), rtol=1e-4, atol=1e-5)
    own = torch.stack([m(features) for n, m in model.named_modules() if n in heads_in(model)]).mean(0)
    torch.testing.assert_close(own, as_logits(model(x)), rtol=1e-4, atol=1e-5)
    if name in ("Levit", "SwiftFormer"):  # others are saved under the names before version 5.9
        again = open_backbone(str(tmp_path / "model"), str(tmp_path / "model" / "model.safetensors"))
        assert torch.equal(as_logits(again.model(x)), features)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("PPLCNet", "BGR.*--model lcnet_100"),
        ("Siglip2", "any shape.*google/siglip2-base-patch16-224"),
        ("ImageGPT", "words for 512 colours.*--model vit_small_patch16_224"),
    ],
)
def test_classifiers_that_read_no_rgb_squares_are_refused(name: str, said: str, tmp_path: Path) -> None:
    import transformers

    getattr(transformers, f"{name}Config")().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        open_backbone(str(tmp_path), "random")


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("DINOv3ViTConfig", SEES, r"is a dinov3_vit.* timm has such a model: --model vit_small_patch16_dinov3\.lvd1689m\."),
        ("CLIPVisionConfig", SEES, r"is a clip_vision_model, .* --model vit_base_patch32_clip_224\.openai\."),
        ("SiglipVisionConfig", SEES, r"is a siglip_vision_model, .* --model vit_base_patch16_siglip_224\.webli\."),
        ("ViTMAEConfig", SEES, r"is a vit_mae, .* --model vit_base_patch16_224\.mae\."),
        ("BertConfig", TINY, r"is a bert, of which transformers has no image classifier\. Choose another model, such as"),
    ],
)  # fmt: skip
def test_kinds_of_transformers_without_a_classifier_are_named(
    name: str, settings: dict, said: str, tmp_path: Path
) -> None:
    import transformers

    getattr(transformers, name)(**settings).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        open_backbone(str(tmp_path))
    suggested = said.replace("\\", "").rpartition("--model ")[2].rstrip(".")
    assert "bert" in said or suggested in timm.list_models(pretrained=True)


def test_a_model_that_only_looks_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sees(nn.Module):
        pretrained_cfg: ClassVar = {"classifier": None, "input_size": (3, 32, 32)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("patches and positions are needed")

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: Sees())
    with pytest.raises(ModelError, match=r"no features without its own head.*patches and positions are needed"):
        open_backbone("vit_tiny_patch16_224", "random")


def test_torchvision_by_name_without_weights() -> None:
    opened = open_backbone("torchvision/vit_b_16", weights="random")
    assert (opened.head, opened.features, opened.library) == ("heads.head", 768, "torchvision")
    assert opened.preprocessing.size == 224
    assert [opened.depth_of(n) for n in ("conv_proj", "encoder.layers.encoder_layer_10.mlp.0.weight", "encoder.ln.bias")] == [
        None, 10, 11,
    ]  # fmt: skip


def test_the_fingerprint_does_not_depend_on_the_head(tmp_path: Path) -> None:
    opened = open_backbone(str(timm_folder(tmp_path / "a")))
    before = opened.fingerprints()
    head = opened.new_head(3, 0)
    assert opened.fingerprints() == before
    assert opened.model.get_submodule("head") is head, "asking leaves the model as it is"
    deeper = open_backbone(str(timm_folder(tmp_path / "b", depth=3)))
    assert deeper.fingerprints()["model"]["architecture"] != before["model"]["architecture"]


def test_a_state_dict_replaces_the_weights_and_its_head_is_left_out(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "a")
    state = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL).state_dict()
    save_file({f"model.{n}": t for n, t in state.items()}, tmp_path / "own.safetensors")
    torch.save(state, tmp_path / "own.pt")
    for name in ("own.safetensors", "own.pt"):
        opened = open_backbone(str(folder), weights=str(tmp_path / name))
        got = opened.model.state_dict()
        assert all(torch.equal(t, got[n]) for n, t in state.items() if not n.startswith("head."))


def test_a_state_dict_in_the_names_of_an_older_transformers(tmp_path: Path) -> None:
    """Those of the Hub's files, and of what transformers saves."""
    folder = transformers_folder(tmp_path / "a")
    state = {n: t + 1 for n, t in load_file(folder / "model.safetensors").items()}
    older = "vit.encoder.layer.1.attention.attention.query.weight"
    if older not in state:
        pytest.skip("this transformers has one spelling")
    save_file(state, tmp_path / "own.safetensors")
    torch.save({f"module.{n}": t for n, t in state.items()}, tmp_path / "own.pt")
    got = open_backbone(str(folder), weights=str(tmp_path / "own.safetensors")).model.state_dict()
    own = open_backbone(str(folder)).model.state_dict()
    assert all(torch.equal(t, own[n] + 1) for n, t in got.items() if not n.startswith("classifier."))
    again = open_backbone(str(folder), weights=str(tmp_path / "own.pt")).model.state_dict()
    assert all(torch.equal(t, got[n]) for n, t in again.items())
    del state["vit.layernorm.weight"]
    save_file(state, tmp_path / "own.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 tensor \(first 'vit.layernorm.weight'\)"):
        open_backbone(str(folder), weights=str(tmp_path / "own.safetensors"))


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("prefix", ["", "vit."])
def test_a_state_dict_of_a_model_without_a_head(tmp_path: Path, pooler: bool, prefix: str) -> None:
    """Its names do not begin with what a classifier's do; from within a larger model they may."""
    from transformers import ViTConfig, ViTModel

    folder = transformers_folder(tmp_path / "a")
    model = ViTModel(ViTConfig.from_pretrained(folder), add_pooling_layer=pooler)
    model.save_pretrained(tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    save_file({prefix + n: t for n, t in load_file(file).items()}, file)
    classifier = (
        {} if not prefix else {n: t for n, t in load_file(folder / "model.safetensors").items() if "classifier" in n}
    )
    save_file({**load_file(file), **classifier}, file)
    opened = open_backbone(str(folder), weights=str(file))
    got = opened.model.vit.state_dict()
    assert all(torch.equal(t, got[n]) for n, t in model.state_dict().items() if not n.startswith("pooler."))
    assert opened.why.endswith("the pooler was left out, which a classifier has not (2 tensors).") == pooler


def test_a_model_without_a_head_lacks_the_norm_of_its_classifier(tmp_path: Path) -> None:
    from transformers import CvtConfig, CvtModel

    model = CvtModel(CvtConfig(embed_dim=[8, 8, 8], num_heads=[1, 1, 1], depth=[1, 2, 10])).eval()
    model.save_pretrained(tmp_path)
    opened = open_backbone(str(tmp_path))
    got = opened.model.cvt.state_dict()
    assert all(torch.equal(t, got[n]) for n, t in model.state_dict().items())
    assert bool((opened.model.layernorm.weight == 1).all()) and not opened.model.layernorm.bias.any()


def test_models_of_timm_that_transformers_saved(tmp_path: Path) -> None:
    from transformers import AutoModel, TimmWrapperConfig, TimmWrapperModel

    folder = timm_folder(tmp_path / "a")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "b")
    assert open_backbone(str(tmp_path / "b")).fingerprints() == open_backbone(str(folder)).fingerprints()
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=SMALL)
    TimmWrapperModel(config).save_pretrained(tmp_path / "c")
    said = r"c/config.json has no pretrained_cfg, .* --model vit_tiny_patch16_224 --weights .*c/model.safetensors"
    with pytest.raises(ModelError, match=said):
        open_backbone(str(tmp_path / "c"))


def gated_folder(path: Path) -> Path:
    """DINOv2 with a gated MLP, as the largest one has: transformers has made two layers of its first."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8,
        use_swiglu_ffn=True,
    )  # fmt: skip
    Dinov2ForImageClassification(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("folder", [transformers_folder, gated_folder])
def test_the_fingerprint_in_the_names_of_an_older_transformers(tmp_path: Path, folder: Callable[[Path], Path]) -> None:
    opened = open_backbone(str(folder(tmp_path / "a")))
    state = load_file(tmp_path / "a" / "model.safetensors")  # in these names
    names = sorted(n for n in state if not n.startswith("classifier."))
    lines = [f"{n} {tuple(state[n].shape)}" for n in names]
    told = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    assert opened.fingerprints(older=True)["model"]["architecture"] == told
    assert open_backbone(str(timm_folder(tmp_path / "b"))).fingerprints(older=True) == {}, "timm renames nothing"


def test_the_older_names_of_a_classifier_keep_their_prefix(tmp_path: Path) -> None:
    """transformers adds it to those of a backbone (ViTMSN); back, it was taken off, and no older adapter fitted."""
    from transformers import ViTMSNConfig, ViTMSNForImageClassification

    other = open_backbone(str(transformers_folder(tmp_path / "vit")))
    config = ViTMSNConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    ViTMSNForImageClassification(config).save_pretrained(tmp_path / "msn")
    told, same = (model.fingerprints(older=True)["model"] for model in (open_backbone(str(tmp_path / "msn")), other))
    assert told["architecture"] == same["architecture"] and told["weights"] != same["weights"]


def around(prefix: str, state: dict) -> dict:
    return {prefix + n: t for n, t in state.items()}


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (lambda good, bad: {"state_dict": bad, "state_dict_ema": good, "optimizer": {"state": bad}}, "state_dict_ema"),
        (lambda good, bad: {"model": bad, "model_ema": around("module.", good)}, "model_ema"),
        (lambda good, bad: {"state_dict": good, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, ""),
        (lambda good, bad: {"model": good, "scaler": {"scale": torch.ones(1)}}, ""),
        (lambda good, bad: {"model": around("module.", good), "loss": torch.ones(1)}, ""),
        (lambda good, bad: around("_orig_mod.", good), ""),
        (lambda good, bad: around("timm_model.", good), ""),
        (lambda good, bad: around("module._orig_mod.", good), ""),
        (lambda good, bad: {"state_dict": around("model.backbone.", good)}, ""),
        (lambda good, bad: {**around("backbone.", good), "head.mlp.0.weight": torch.zeros(3)}, ""),
        (lambda good, bad: {"student": around("module.backbone.", bad), "teacher": {
            **around("backbone.", good), "dino_head.mlp.0.weight": torch.zeros(3)}, "args": Namespace(lr=1.0)}, "(teacher)"),
        (lambda good, bad: {**around("module.", good), "n_averaged": torch.ones(())}, ""),
        (lambda good, bad: {"model": {**good, "mask_token": torch.zeros(1), "decoder_blocks.0.norm1.weight": torch.zeros(2),
                                      "decoder_pos_embed": torch.zeros(3)}}, "masked pretraining needs was left out (3"),
    ],
)  # fmt: skip
def test_what_trainings_save_is_read(tmp_path: Path, saved, said: str) -> None:
    folder = timm_folder(tmp_path / "a")
    good = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL).state_dict()
    torch.save(saved(good, {n: t + 1 for n, t in good.items()}), tmp_path / "own.pt")
    opened = open_backbone(str(folder), weights=str(tmp_path / "own.pt"))
    got = opened.model.state_dict()
    assert all(torch.equal(t, got[n]) for n, t in good.items() if not n.startswith("head."))
    assert said in opened.why and ("weights file" in opened.why) is bool(said)


def test_a_state_dict_of_a_model_with_several_heads(tmp_path: Path) -> None:
    torch.save(timm.create_model("levit_128s").state_dict(), tmp_path / "own.pt")
    assert open_backbone("levit_128s", weights=str(tmp_path / "own.pt")).head == "class_head"


@pytest.mark.parametrize(
    ("name", "depths"),
    [
        ("emoji-vit", {"blocks.4.attn.qkv.q": 4, "blocks.4": 4, "patch_embed.proj.weight": None, "pos_embed": None,
                       "fc_norm.weight": LAST, "fc_norm": LAST, "head.weight": None}),
        ("resnet18", {"conv1": None, "bn1.weight": None, "layer1.0.conv1": 0, "layer1.1.conv1": 1, "layer4.0.conv1": 6,
                      "layer4.1.bn2": LAST, "layer4.0.downsample.0": 6}),
        ("cait_xxs24_224", {"blocks.0.attn.qkv": 0, "blocks.23.mlp.fc1": 23, "blocks_token_only.0.attn.q": 24,
                            "blocks_token_only.1.attn.q": LAST, "norm.bias": LAST}),
        ("vit_tiny_patch16_224", {"norm_pre.weight": None, "blocks.0.norm1": 0, "norm.weight": LAST}),
        ("efficientnet_b0", {"conv_stem.weight": None, "blocks.6.0.conv_pw": LAST, "conv_head": LAST, "bn2.weight": LAST}),
        ("convnext_atto", {"stem.0": None, "stem.1.weight": None, "stages.0.blocks.0": 0, "stages.0.blocks.1": 1,
                           "stages.1.downsample.1": 2, "stages.2.blocks.5.mlp.fc1": 11, "stages.3.blocks.1": LAST}),
        ("swin_tiny_patch4_window7_224", {"layers.0.blocks.1.attn.qkv": 1, "layers.1.downsample.norm": 2,
                                          "layers.2.blocks.0": 6, "layers.2.blocks.5": 11, "layers.3.blocks.1": LAST}),
        ("torchvision/swin_t", {"features.1.0.attn.qkv": 2, "features.1.1.mlp.0": 3, "features.7.1": LAST}),
        ("vit_tiny_patch16_224", {"blocks.11": LAST, "attn_pool.latent": LAST, "attn_pool.kv.k": LAST,
                                  "attn_pool.mlp.fc1": LAST, "patch_embed.proj": None}),
        ("torchvision/alexnet", {"features.0": 0, "classifier.4": LAST, "classifier.6.weight": None}),
    ],
)  # fmt: skip
def test_depth_of_layers(name: str, depths: dict[str, int | None]) -> None:
    opened = open_backbone(name, None if name == "emoji-vit" else "random")
    if "norm_pre.weight" in depths:  # of CLIP's, before all blocks
        opened.model.norm_pre = nn.LayerNorm(192)
    if "attn_pool.latent" in depths:  # of SigLIP's, after all
        opened.model.attn_pool = timm.layers.AttentionPoolLatent(192, num_heads=3)
    last = max(opened.depth_of(n) or 0 for n, _ in opened.model.named_parameters())
    assert {n: opened.depth_of(n) for n in depths} == {n: last if d == LAST else d for n, d in depths.items()}


def test_rates_by_depth() -> None:
    """Block by block slower; what stands before them slowest, a norm before them too."""
    opened = open_backbone("resnet18", "random")
    rate = rates_by_depth(opened.depth_of, 8, 0.5, opened.head, 3.0)
    names = ("fc.weight", "layer4.1.conv1.weight", "layer4.0.conv1.weight", "layer1.0.bn1.weight", "bn1.weight")
    assert [rate(n) for n in names] == [3.0, 1.0, 0.5, 0.5**7, 0.5**8]


def test_blocks_without_numbers_are_none() -> None:
    assert open_backbone("regnety_002", "random").blocks == 0


@pytest.mark.parametrize(
    ("model", "weights", "said"),
    [
        ("vit_smal_patch16_224", None, "Did you mean 'vit_small_patch16_224'"),
        ("torchvision/vit_b_61", None, "Did you mean 'vit_b_16'"),
        ("nothing like it", None, "Give a timm name such as"),
        ("emoji-vit", "nowhere.pt", "There is no file nowhere.pt with weights"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(model: str, weights: str | None, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        open_backbone(model, weights)


def test_a_state_dict_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "a")
    save_file({"blocks.0.norm1.weight": torch.zeros(3)}, tmp_path / "own.safetensors")
    with pytest.raises(ModelError, match=r"lacks \d+ tensors .* of shape \(3,\) where the model has \(24,\)"):
        open_backbone(str(folder), weights=str(tmp_path / "own.safetensors"))


@pytest.mark.parametrize("weights", [None, "random"])
def test_code_that_a_model_brings_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str | None
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    (tmp_path / "own.py").write_text("raise SystemExit")
    classes = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    with pytest.raises(
        ModelError, match=r"which brings its code with it; visionlora runs no code of models\. Choose another"
    ):
        open_backbone(str(tmp_path), weights)


def test_weights_that_hold_nan_are_refused(tmp_path: Path) -> None:
    """Every answer would be NaN, and training would blame its learning rate."""
    folder = timm_folder(tmp_path / "a")
    own = load_file(folder / "model.safetensors")
    save_file({**own, "norm.weight": own["norm.weight"] * torch.nan}, tmp_path / "own.safetensors")
    with pytest.raises(
        ModelError, match=r"own\.safetensors hold NaN or infinite values: 1 tensor .* \(first 'norm\.weight'\)"
    ):
        open_backbone(str(folder), weights=str(tmp_path / "own.safetensors"))
    (tmp_path / "own.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"The weights of .*a hold NaN or infinite values: 1 tensor"):
        open_backbone(str(folder))


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        open_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="neither timm's"):
        open_backbone(str(tmp_path))
