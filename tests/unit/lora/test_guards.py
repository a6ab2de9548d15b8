"""A model with adapters on it is not saved, and nothing is loaded into what they have changed."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import attach, inject

SAID = r"Adapters are on this .* \(default\): .*handle.eject\(\).* handle.save\(path\)"


class Saved(nn.Module):
    """A model that writes its names as a library would."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))

    def save_pretrained(self, names: list[str]) -> None:
        names += self.state_dict()


def vit() -> ViTForImageClassification:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=8))


def lora(**more: AdapterModule) -> Adapter:
    own = {"model.last": AdapterModule.lora(torch.ones(1, 3), torch.ones(3, 1), 1.0)}
    return Adapter(own | {f"model.{n.replace('__', '.')}": m for n, m in more.items()})


def shift() -> AdapterModule:
    return AdapterModule("shift", {"shift": torch.ones(3)}, 1.0)


def test_a_model_with_an_adapter_is_not_saved() -> None:
    model, names = Saved(), []
    plain = set(vars(model))
    handle = attach(model, lora())
    trained = inject(model, AdapterConfig(rank=2, targets=("first",)), name="trained")
    for saved in (model, copy.deepcopy(model)):
        with pytest.raises(ConfigError, match=r"Adapters are on this Saved \(default, trained\)"):
            saved.save_pretrained(names)
    handle.eject()
    with pytest.raises(ConfigError, match=r"on this Saved \(trained\): .*call handle.save\(path\)"):
        model.save_pretrained(names)
    trained.eject()
    model.save_pretrained(names)
    assert names == list(Saved().state_dict()) and vars(model).keys() == plain
    assert not model._load_state_dict_pre_hooks


def test_what_a_pipeline_has_written_before_is_named(tmp_path: Path) -> None:
    model = vit()
    inject(model, AdapterConfig(rank=2, targets=("attn",)))
    with pytest.raises(ConfigError, match=r"with their files\.$"):
        model.save_pretrained(tmp_path / "unet")
    (tmp_path / "vae").mkdir()
    with pytest.raises(ConfigError, match=r"What .* holds by now \(vae\) is no whole model\.$"):
        model.save_pretrained(tmp_path / "unet")
    (tmp_path / "model_index.json").touch()
    with pytest.raises(ConfigError, match=r"with their files\.$"):
        model.save_pretrained(tmp_path / "unet")


def test_what_trains_in_full_is_a_model_to_save() -> None:
    model, names = Saved(), []
    inject(model, AdapterConfig(method="linear-probe", train="last"))
    model.save_pretrained(names)
    assert names == list(Saved().state_dict())


def test_a_vision_transformer_and_a_compiled_model(tmp_path: Path) -> None:
    model = vit()
    handle = inject(torch.compile(model), AdapterConfig(rank=2, targets=("attn",)))
    with pytest.raises(ConfigError, match=SAID):
        model.save_pretrained(tmp_path / "m")
    handle.eject()
    model.save_pretrained(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 1


class Pictures(Dataset[dict[str, object]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, object]:
        return {"pixel_values": torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)), "labels": i % 2}


CHECKPOINTS = r"Adapters are on this .* \(default\): its checkpoints hold .* no model .* handle.save\(path\)"


def trained(folder: Path, from_checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    """What an adapter learns by the Trainer of transformers in four steps, with a checkpoint after each second."""
    torch.manual_seed(0)
    handle = inject(vit(), AdapterConfig(rank=2, targets=("attn",), train="classifier"))
    args = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.1, "per_device_train_batch_size": 4}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    Trainer(handle.model, TrainingArguments(str(folder), **args, **quiet), train_dataset=Pictures()).train(
        None if from_checkpoint is None else str(from_checkpoint)
    )
    return handle.model.state_dict()


def test_the_trainer_of_transformers_goes_on_from_its_checkpoints(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=CHECKPOINTS):
        whole = trained(tmp_path)
    assert load_file(tmp_path / "checkpoint-4" / "model.safetensors").keys() == whole.keys()
    with pytest.warns(UserWarning, match=CHECKPOINTS):
        again = trained(tmp_path, tmp_path / "checkpoint-2")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_checkpoint_with_adapters_in_its_weights_is_refused(tmp_path: Path) -> None:
    model = vit()
    handle = inject(model, AdapterConfig(rank=2, targets=("attn",)))
    handle.merge()
    with pytest.raises(ConfigError, match=SAID):
        model.save_pretrained(tmp_path / "m", state_dict=None)
    handle.unmerge()
    tied = model.state_dict() | {"again": model.classifier.weight}
    with pytest.warns(UserWarning, match=CHECKPOINTS):
        model.save_pretrained(tmp_path / "m", state_dict=tied, is_main_process=False)
    assert not (tmp_path / "m").exists()
    with pytest.warns(UserWarning, match=CHECKPOINTS):
        model.save_pretrained(save_directory=tmp_path / "m", state_dict=tied)
    assert torch.equal(load_file(tmp_path / "m" / "model.safetensors")["again"], model.classifier.weight)


def test_one_that_cannot_be_put_on_leaves_nothing() -> None:
    model, names = Saved(), []
    attach(model, lora()).eject()
    handle = attach(model, lora())
    with pytest.raises(ConfigError, match="on this model already"):
        attach(model, lora())
    handle.eject()
    model.save_pretrained(names)
    assert len(names) == 6 and not model._load_state_dict_pre_hooks


# ------------------------------------------------------------------------------------------------------------- loading


def test_nothing_is_loaded_before_it_is_refused() -> None:
    model = nn.ModuleDict({"inner": Saved()})
    before = copy.deepcopy(model.state_dict())
    handle = attach(model["inner"], lora())
    handle.merge()
    lost = {n: torch.full_like(t, 7.0) for n, t in before.items()}
    for there in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        said = r"Adapters are merged into inner.last.weight, .* handle.unmerge.* around inner may be loaded by now\.$"
        with pytest.raises(ConfigError, match=said):
            there.load_state_dict(lost, strict=False)
        assert all(torch.equal(there.state_dict()[n], t) for n, t in before.items() if n != "inner.last.weight")
    handle.unmerge()
    model.load_state_dict(lost, strict=False)
    handle.eject()
    assert all(bool((t == 7).all()) for t in model.state_dict().values())


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_nothing_is_loaded_into_values_that_will_be_put_back(scale: float) -> None:
    model = Saved()
    before = copy.deepcopy(model.state_dict())
    handle = attach(model, lora(norm__bias=shift()))
    handle.set_scale(scale)
    for there, prefix in ((model, "norm."), (model.norm, "")):
        with pytest.raises(ConfigError, match=f"Adapters are in the values of {prefix}bias, .* handle.eject"):
            there.load_state_dict({"first.weight": torch.zeros(3, 3), f"{prefix}bias": torch.zeros(3)}, strict=False)
    assert torch.equal(model.first.weight, before["first.weight"])
    model.load_state_dict({"norm.weight": torch.full((3,), 7.0)}, strict=False)  # which no adapter has changed
    handle.eject()
    assert torch.equal(model.norm.bias, before["norm.bias"]) and bool((model.norm.weight == 7).all())
    model.load_state_dict({"norm.bias": torch.full((3,), 7.0)}, strict=False)
    assert bool((model.norm.bias == 7).all()) and not model.norm._load_state_dict_pre_hooks


def test_what_trains_in_full_takes_values() -> None:
    model = Saved()
    before = copy.deepcopy(model.state_dict())
    trained = inject(model, AdapterConfig(rank=2, targets=("first",), train="last"))
    model.load_state_dict({"last.bias": torch.full((3,), 7.0)}, strict=False)
    assert bool((trained.modules("model")["model.last.bias"].tensors["value"] == 7).all())
    other = attach(model, Adapter({"model.last.bias": shift()}), name="other")
    with pytest.raises(ConfigError, match=r"Adapters are in the values of last.bias"):
        model.load_state_dict({"last.bias": torch.zeros(3)}, strict=False)
    other.eject()
    trained.eject()
    assert torch.equal(model.last.bias, before["last.bias"])


def test_a_mix_refuses_both() -> None:
    model = Saved()
    with vl.attach(model, {"default": lora(norm__bias=shift())}):
        with pytest.raises(ConfigError, match=SAID):
            model.save_pretrained([])
        with pytest.raises(ConfigError, match=r"values of norm.bias, .*mix.detach"):
            model.load_state_dict({"norm.bias": torch.zeros(3)}, strict=False)
    assert "save_pretrained" not in vars(model) and not model._load_state_dict_pre_hooks
