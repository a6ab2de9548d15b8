"""Several adapters on one pipeline: every mode gives the same, everything comes off bit for bit."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.mixing import attached as attached_module
from visionlora.mixing.compose import COMPOSITIONS
from visionlora.mixing.holder import mix_on
from visionlora.mixing.mix import Mix
from visionlora.models.base import open_base

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("lora", "dora", "loha", "lokr", "vera")


def module(kind: str, weight: torch.Tensor, seed: int) -> AdapterModule:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.25

    o, *rest = weight.shape
    n, ones = weight[0].numel(), (1,) * (len(rest) - 1)
    lora = {"lora_A": random(2, *rest), "lora_B": random(o, 2, *ones)}
    if kind == "dora":
        norm = weight.flatten(1).norm(dim=1)
        return AdapterModule("dora", {**lora, "magnitude": norm * (1 + random(o))}, 3.0)
    if kind == "loha":
        sides = {f"hada_w{k}_{s}": random(*((o, 2) if s == "a" else (2, n))) for k in (1, 2) for s in "ab"}
        return AdapterModule("loha", sides, 8.0)
    if kind == "lokr":
        return AdapterModule("lokr", {"lokr_w1": random(2, 2), "lokr_w2": random(o // 2, rest[0] // 2, *rest[1:])}, 1.0)
    if kind == "vera":
        return AdapterModule("vera", {"lambda_b": random(o), "lambda_d": random(4)}, 1.0, {"projection_seed": seed})
    return AdapterModule("lora", lora, 3.0)


def adapter(pipe, seed: int, kinds: tuple[str, ...] = KINDS, text: bool = True) -> Adapter:
    """Every linear layer and convolution of UNet and text encoder, the kinds in turn."""
    modules = {}
    for component in ("unet", "text_encoder") if text else ("unet",):
        layers = [(n, m) for n, m in getattr(pipe, component).named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        for k, (name, layer) in enumerate(layers):
            kind = kinds[(k + seed) % len(kinds)]
            if kind == "lokr" and (layer.weight.shape[0] % 2 or layer.weight.shape[1] % 2):
                kind = "lora"
            modules[f"{component}.{name}"] = module(kind, layer.weight, 100 * seed + k)
    return Adapter(modules)


@pytest.fixture
def pipe(tiny_model: Path):
    return open_base(str(tiny_model)).pipe


@torch.no_grad()
def run(pipe, pictures: int = 2, t: int = 500) -> torch.Tensor:
    """The UNet's prediction for text that the text encoder reads, under classifier-free guidance."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (2 * pictures, 16), generator=generator)
    x = torch.randn(pictures, 4, 8, 8, generator=generator)
    return pipe.unet(torch.cat([x, x]), torch.tensor(t), pipe.text_encoder(ids)[0]).sample


def bits(pipe) -> dict[str, torch.Tensor]:
    return {n: p.clone() for part in (pipe.unet, pipe.text_encoder) for n, p in part.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_all_modes_agree_on_every_layer_kind_and_come_off_bit_for_bit(pipe, kind: str) -> None:
    """Linear layers, 1x1 and 3x3 convolutions, time embedding, conv_in, text encoder."""
    adapters = {"a": adapter(pipe, 0, (kind,)), "b": adapter(pipe, 1, ("lora",))}
    plain, before = run(pipe), bits(pipe)
    scales = {"a": 0.7, "b": vl.Scale(-0.4, blocks={"up": 0.5, "text_encoder": 2.0})}
    outputs = {}
    for mode in ("merged", "stacked", "batched"):
        mix = vl.attach(pipe, adapters, scales=scales, mode=mode)
        assert mix.running == mode
        outputs[mode] = run(pipe)
        mix.detach()
        assert torch.equal(run(pipe), plain)
    assert all(torch.equal(p, before[n]) for n, p in bits(pipe).items())
    spread = (outputs["merged"] - plain).abs().max()
    assert spread > 0.05
    for mode in ("stacked", "batched"):
        torch.testing.assert_close(outputs[mode], outputs["merged"], rtol=1e-3, atol=float(2e-4 * max(1, spread)))


def test_auto_chooses_by_use(pipe) -> None:
    mix = vl.attach(pipe, {"a": adapter(pipe, 0), "b": adapter(pipe, 1)})
    assert mix.running == "merged"
    mix.set_scales({"a": vl.Scale(steps=vl.Window(0, 0.5))})
    assert mix.running == "stacked"
    mix.set_scales({"b": vl.Scale(images=[0.0, 1.0])})
    assert mix.running == "batched"
    mix.set_scales({"a": 1.0, "b": 0.5})
    assert mix.running == "merged"


def test_an_adapter_at_scale_0_is_added_and_removed_without_a_weight_being_written(layers: nn.Module) -> None:
    """Every file that was added wrote all weights anew."""
    mix = vl.attach(layers, {"a": lora_on("0"), "b": lora_on("1", 1)})

    def versions() -> list[int]:
        return [layer.weight._version for layer in layers]

    one, two = versions()
    mix.add("c", lora_on("0", 2), 0.0)
    mix.add("d", lora_on("1", 3), 0.0)
    mix.remove("c")
    assert versions() == [one, two]
    mix.remove("a")
    assert versions() == [one + 1, two], "its layer alone"
    mix.set_scales({"d": 0.5})
    assert versions() == [one + 1, two + 1]
    mix.detach()


def test_a_part_whose_last_adapter_is_removed_is_free_for_another_mix(pipe) -> None:
    before = bits(pipe)
    mix = vl.attach(pipe, {"a": adapter(pipe, 0, text=False), "b": adapter(pipe, 1)})
    mix.remove("b")
    assert mix_on(pipe.text_encoder) is None and mix_on(pipe.unet) is mix
    encoder = adapter(pipe, 2).component("text_encoder")
    other = vl.attach(pipe.text_encoder, {"c": Adapter({f"text_encoder.{n}": m for n, m in encoder.items()})})
    mix.detach()
    other.detach()
    assert all(torch.equal(before[n], now) for n, now in bits(pipe).items())


def test_fifty_changes_later_the_base_is_the_same_bits(pipe) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pipe.to(dtype)
        before = bits(pipe)
        mix = vl.attach(pipe, {"a": adapter(pipe, 0, ("lora",)), "b": adapter(pipe, 1, ("lora",))})
        for k in range(50):
            mix.set_scales({"a": k / 25 - 1, "b": 1 - k / 50})
        mix.remove("a")
        mix.add("c", adapter(pipe, 2, ("lora",)), 0.3)
        mix.detach()
        assert all(torch.equal(p, before[n]) for n, p in bits(pipe).items())


def test_a_scale_of_zero_everywhere_is_the_base(pipe) -> None:
    plain = run(pipe)
    for mode in ("merged", "stacked", "batched"):
        mix = vl.attach(pipe, {"a": adapter(pipe, 0)}, scales={"a": 0.0}, mode=mode)
        assert torch.equal(run(pipe), plain)
        mix.detach()
    mix = vl.attach(pipe, {"a": adapter(pipe, 0)}, scales={"a": {"unet": 0.0, "text_encoder": 0.0}})
    assert torch.equal(run(pipe), plain)
    mix.detach()
    three = {n: adapter(pipe, k) for k, n in enumerate("abc")}
    for options in ({"compose": "composite"}, {"compose": "regional", "regions": dict.fromkeys("abc", (0, 0, 0.3, 1))}):
        mix = vl.attach(pipe, three, scales=dict.fromkeys(three, 0.0), **options)
        assert torch.equal(run(pipe), plain)
        mix.detach()


@pytest.mark.parametrize(
    "block", ["down", "mid", "up", "in", "out", "down.1", "up.0", "text_encoder", "up_blocks.1.resnets.0"]
)
def test_a_block_reaches_all_its_layers_and_no_other(pipe, block: str) -> None:
    mix = vl.attach(pipe, {"a": adapter(pipe, 0)}, scales={"a": {block: 0.0}}, mode="stacked")
    silent = {f"{c}.{n}" for c, h in mix.handles["a"] for n, m in h.methods.items() if m.scale == 0}
    starts = {
        "down": "unet.down_blocks.", "mid": "unet.mid_block.", "up": "unet.up_blocks.", "down.1": "unet.down_blocks.1.",
        "up.0": "unet.up_blocks.0.", "text_encoder": "text_encoder.", "in": ("unet.conv_in", "unet.time_embedding"),
        "out": "unet.conv_out", "up_blocks.1.resnets.0": "unet.up_blocks.1.resnets.0.",
    }  # fmt: skip
    assert silent == {f"{c}.{n}" for c, n in mix.layers("a") if f"{c}.{n}".startswith(starts[block])} and silent


def test_lists_of_a1111(pipe) -> None:
    values = [0.1 * k for k in range(26)]
    mix = vl.attach(pipe, {"a": adapter(pipe, 0)}, scales={"a": values}, mode="stacked")
    found = {f"{c}.{n}": m.scale for c, h in mix.handles["a"] for n, m in h.methods.items()}
    assert found["unet.conv_in"] == pytest.approx(0.1)  # IN00
    assert found["unet.down_blocks.0.attentions.0.proj_in"] == pytest.approx(0.2)  # IN01
    assert found["unet.mid_block.resnets.0.conv1"] == pytest.approx(1.3)  # MID
    assert found["unet.up_blocks.0.resnets.0.conv1"] == pytest.approx(1.4)  # OUT00
    assert {v for n, v in found.items() if n.startswith("text_encoder")} == {0.0}  # BASE
    mix.set_scales({"a": [1.0] * 17})
    found = {f"{c}.{n}": m.scale for c, h in mix.handles["a"] for n, m in h.methods.items()}
    assert found["unet.conv_in"] == 0 and found["unet.down_blocks.0.attentions.0.proj_in"] == 1


def test_words_of_blocks_reach_a_unet_by_itself(pipe) -> None:
    """Under the name that `handle.save(path)` gives it."""
    made = adapter(pipe, 0, ("lora",), text=False)
    by_itself = Adapter({n.replace("unet.", "model.", 1): m for n, m in made.modules.items()})
    with torch.no_grad():
        for blocks in ({"up": 0.0, "in": 0.5}, [0.0] + [1.0] * 12 + [0.5] * 13):
            mix = vl.attach(pipe, {"a": made}, scales={"a": blocks})
            wanted = run(pipe)
            mix.detach()
            mix = vl.attach(pipe.unet, {"a": by_itself}, scales={"a": blocks})
            assert torch.equal(run(pipe), wanted)
            mix.detach()


def test_a_module_by_itself_takes_the_part_that_fits(pipe) -> None:
    made, plain = adapter(pipe, 0, ("lora",)), run(pipe)
    for part in ("unet", "text_encoder"):
        mix = vl.attach(getattr(pipe, part), {"a": made}, allow_partial=True)
        assert [c for c, _ in mix.handles["a"]] == [part] and not torch.equal(run(pipe), plain)
        mix.detach()
    with pytest.raises(ConfigError, match="has a part for 'text_encoder'; here there is UNet2DConditionModel"):
        vl.attach(pipe.unet, {"a": made})
    foreign = Adapter({"text_encoder_2.a": next(iter(made.modules.values()))})
    with pytest.raises(ConfigError, match="has a part for 'text_encoder_2'; here there is unet, text_encoder"):
        vl.attach(pipe, {"a": foreign}, allow_partial=True)
    assert torch.equal(run(pipe), plain)


def test_on_weights_in_few_bits_auto_keeps_adapters_beside_them() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False).eval(), torch.randn(2, 64)
    vl.pack(model, "nf4")
    lora = AdapterModule.lora(torch.randn(2, 64), torch.randn(64, 2), 2.0)
    with torch.no_grad():
        plain = model(x)
        mix = vl.attach(model, {"a": Adapter({"model.0": lora})})
        assert mix.running == "stacked"
        torch.testing.assert_close(model(x), plain + x @ lora.delta_weight().t(), rtol=1e-4, atol=1e-3)


def test_each_picture_of_a_batch_has_its_own(pipe) -> None:
    adapters = {"a": adapter(pipe, 0), "b": adapter(pipe, 1)}
    one = {"a": [1.0, 0.0, 0.5], "b": [0.0, 0.8, -0.5]}
    mix = vl.attach(pipe, adapters, scales={n: vl.Scale(images=v) for n, v in one.items()})
    together = run(pipe, 3)
    mix.detach()
    for k in range(3):
        mix = vl.attach(pipe, adapters, scales={n: v[k] for n, v in one.items()})
        alone = run(pipe, 3)
        mix.detach()
        torch.testing.assert_close(together[[k, k + 3]], alone[[k, k + 3]], rtol=1e-3, atol=2e-4)


class Steps:
    """Runs a pipeline and notes the scale of the first layer at every call of the UNet."""

    def __init__(self, pipe, mix: Mix) -> None:
        self.seen: list[tuple[float, ...]] = []

        def note(*_: object) -> None:
            self.seen.append(tuple(next(iter(dict(p)["unet"].methods.values())).scale for p in mix.handles.values()))

        hook = pipe.unet.conv_out.register_forward_hook(note)
        pipe("dog", num_inference_steps=6, height=32, width=32, output_type="np", guidance_scale=3.0)
        hook.remove()


def test_scales_change_from_step_to_step(pipe) -> None:
    adapters = {"a": adapter(pipe, 0), "b": adapter(pipe, 1), "c": adapter(pipe, 2)}
    mix = vl.attach(pipe, adapters, scales={
        "a": vl.Scale(2.0, steps=vl.Window(0.5, 1.0)), "b": vl.Scale(steps=vl.Ramp(1.0, 0.0)),
        "c": vl.Scale(steps=[1.0, 0.5, 0.25]),
    })  # fmt: skip
    seen = Steps(pipe, mix).seen
    assert [a for a, _, _ in seen] == [0, 0, 0, 2, 2, 2]
    assert [b for _, b, _ in seen] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    assert [c for _, _, c in seen] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    mix.set_scales({n: vl.Scale(steps=lambda p: p) for n in adapters})
    assert [a for a, _, _ in Steps(pipe, mix).seen] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_text_encoders_have_their_strength_throughout(pipe) -> None:
    """They run before the first step, and must not keep what the last step of the picture before left them."""
    adapters = {"a": adapter(pipe, 0), "b": adapter(pipe, 1)}
    for scales, compose in (({"a": vl.Scale(0.7, steps=vl.Window(0.5, 1.0))}, "sum"), ({}, "switch")):
        mix = vl.attach(pipe, adapters, scales=scales, compose=compose)
        first, second = (
            pipe("dog", num_inference_steps=4, height=32, width=32, output_type="latent",
                 generator=torch.Generator().manual_seed(0)).images for _ in range(2)
        )  # fmt: skip
        assert torch.equal(first, second)
        (text,) = (h for c, h in mix.handles["a"] if c == "text_encoder")
        assert {m.scale for m in text.methods.values()} == {0.7 if scales else 1.0}
        mix.detach()


def test_new_scales_by_picture_are_never_taken_for_old_ones() -> None:
    """A new tensor may lie where a freed one did."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    lora = AdapterModule.lora(torch.randn(2, 4), torch.randn(4, 2), 2.0)
    mix, x = (
        vl.attach(model, {"a": Adapter({"model.0": lora})}, scales={"a": vl.Scale(images=[1.0, 0.0])}),
        torch.ones(2, 4),
    )
    with torch.no_grad():
        plain, full = (
            model[0].weight.sum(1) + model[0].bias,
            (model[0].weight + lora.delta_weight()).sum(1) + model[0].bias,
        )
        for _ in range(60):
            for images in ([0.0, 1.0], [0.0, 1.0], [1.0, 0.0]):
                mix.set_scales({"a": vl.Scale(images=images)})
            for images in ([1.0, 0.0], [0.0, 1.0]):
                mix.set_scales({"a": vl.Scale(images=[0.5, 0.5])})
                mix.set_scales({"a": vl.Scale(images=images)})
                torch.testing.assert_close(model(x), torch.stack([full if v else plain for v in images]))


def test_moments_of_a_picture_to_start_from(pipe) -> None:
    """Its strength leaves out the first timesteps: 0 is the first step that is done."""
    from diffusers import StableDiffusionImg2ImgPipeline
    from PIL import Image

    changed = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    mix = vl.attach(changed, {"a": adapter(pipe, 0, text=False)}, scales={"a": vl.Scale(steps=vl.Ramp(1.0, 0.0))})
    seen: list[float] = []
    hook = pipe.unet.conv_out.register_forward_hook(
        lambda *_: seen.append(next(iter(mix.handles["a"][0][1].methods.values())).scale)
    )
    changed("dog", image=Image.new("RGB", (32, 32)), strength=0.4, num_inference_steps=10, output_type="latent")
    hook.remove()
    assert seen == pytest.approx([1, 2 / 3, 1 / 3, 0])


@pytest.mark.parametrize("compose", ["knots", "iso-c"])
@pytest.mark.parametrize(
    "scale", [vl.Scale(blocks={"up": 0.0}), vl.Scale(steps=vl.Window(0.9, 1.0)), vl.Scale(images=[1.0])]
)
def test_what_a_composition_of_one_would_lose_is_refused(pipe, compose: str, scale: vl.Scale) -> None:
    two, before = {"a": adapter(pipe, 0, ("lora",)), "b": adapter(pipe, 1, ("lora",))}, bits(pipe)
    with pytest.raises(
        ConfigError, match="has blocks, steps or pictures, but this composition makes one adapter of all"
    ):
        vl.attach(pipe, two, scales={"a": scale}, compose=compose)
    mix = vl.attach(pipe, two, scales={"a": 0.5}, compose=compose)
    with pytest.raises(ConfigError, match="this composition makes one adapter of all"):
        mix.set_scales({"a": scale})
    assert mix.members["a"].scale.strength == 0.5 and mix.handles
    mix.detach()
    assert all(torch.equal(p, before[n]) for n, p in bits(pipe).items())


def test_adapters_evaluated_one_by_one_on_a_bare_module() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    loras = [AdapterModule.lora(torch.randn(2, 4), torch.randn(4, 2), 2.0) for _ in range(2)]
    alone = []
    with torch.no_grad():
        for lora in loras:
            mix = vl.attach(model, {"a": Adapter({"model.0": lora})})
            alone.append(model(x))
            mix.detach()
        vl.attach(
            model, {n: Adapter({"model.0": lora}) for n, lora in zip("ab", loras, strict=True)}, compose="composite"
        )
        torch.testing.assert_close(model(x), torch.stack(alone).mean(0))


def test_words_come_and_go_with_their_adapters(pipe) -> None:
    def ids(text: str) -> list[int]:
        return list(pipe.tokenizer(text).input_ids)

    width, before = pipe.text_encoder.get_input_embeddings().weight.shape[1], bits(pipe)
    plain = ids("a <rex>")
    rex, max_ = (
        Adapter({}, embeddings={w: {"text_encoder": torch.randn(n, width)}}) for w, n in (("<rex>", 2), ("<max>", 1))
    )
    mix = vl.attach(pipe, {"rex": rex})
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[-2:], rex.embeddings["<rex>"]["text_encoder"]) and not table.requires_grad
    assert len(table) - 2 in ids("a <rex>")
    mix.add("max", max_)
    again = Adapter({}, embeddings={"<rex>": {"text_encoder": torch.randn(1, width)}})
    with pytest.raises(ConfigError, match="brings the word '<rex>', which means something else here already"):
        mix.add("other", again)
    assert mix.names == ["rex", "max"] and ids("a <rex>") != plain
    mix.replace("rex", again)
    assert any(
        torch.equal(row, again.embeddings["<rex>"]["text_encoder"][0])
        for row in pipe.text_encoder.get_input_embeddings().weight
    )
    mix.detach()
    for word, wide, said in (
        ("dog", width, r"'d', which the tokenizer has already"),
        ("d", width + 1, "made for another family"),
    ):
        strange = Adapter({}, embeddings={"d": {"text_encoder": torch.randn(1, wide)}})
        with pytest.raises(vl.VisionLoRAError, match=said):
            vl.attach(pipe, {word: strange})
    assert ids("a <rex>") == plain and all(torch.equal(p, before[n]) for n, p in bits(pipe).items())
    with pytest.raises(
        ConfigError, match="brings the word '<rex>' for text_encoder, for which there is no tokenizer here"
    ):
        vl.attach(pipe.unet, {"rex": rex})
    vl.attach(pipe.unet, {"rex": rex}, allow_partial=True).detach()


def test_words_are_off_again_for_whoever_saves_or_has_lost_the_mix(pipe, tmp_path: Path) -> None:
    width, size = pipe.text_encoder.get_input_embeddings().weight.shape[1], len(pipe.tokenizer)
    vl.attach(pipe, {"rex": Adapter({}, embeddings={"<rex>": {"text_encoder": torch.randn(2, width)}})})
    with pytest.raises(ConfigError, match=r"earlier vl.attach are on this CLIPTextModel \(rex\)"):
        vl.attach(pipe, {"max": Adapter({}, embeddings={"<max>": {"text_encoder": torch.randn(1, width)}})})
    assert len(pipe.tokenizer) == size + 2
    vl.detach(pipe)
    assert len(pipe.tokenizer) == size == pipe.text_encoder.config.vocab_size
    assert not any(m.training for m in pipe.text_encoder.modules())
    pipe.save_pretrained(tmp_path / "m")
    table = open_base(str(tmp_path / "m")).pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(table, pipe.text_encoder.get_input_embeddings().weight)


def test_on_a_vit_and_a_bare_module() -> None:
    import timm

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval().requires_grad_(False)
    made = {}
    for seed in range(2):
        handle = vl.inject(vit, vl.AdapterConfig(rank=2, targets="attn.qv,mlp"), seed=seed)
        for m in handle.methods.values():
            m.lora_B.data.normal_()
        made[f"a{seed}"] = handle.adapter()
        handle.eject()
    vit.requires_grad_(False)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = vit(x)
        mix = vl.attach(vit, made, scales={"a0": 0.5, "a1": {"blocks.1": 0.0}})
        merged = vit(x)
        mix.set_scales({"a0": vl.Scale(0.5, images=[1.0, 1.0])})
        torch.testing.assert_close(vit(x), merged, rtol=1e-4, atol=1e-5)
        mix.set_scales(
            {"a0": vl.Scale(0.5, images=[1.0, 0.0]), "a1": vl.Scale(images=[1.0, 0.0], blocks={"blocks.1": 0.0})}
        )
        found = vit(x)
        torch.testing.assert_close(found[0], merged[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], plain[1], rtol=1e-4, atol=1e-5)
        mix.detach()
        assert torch.equal(vit(x), plain)


def test_one_adapter_as_before_and_from_a_file(pipe, tmp_path: Path) -> None:
    vl.save_adapter(adapter(pipe, 0, ("lora",), text=False), tmp_path / "a.safetensors")
    handle = vl.attach(pipe.unet, tmp_path / "a.safetensors")
    assert handle.report.hits
    handle.eject()
    mix = vl.attach(
        pipe, {"dog": tmp_path / "a.safetensors", "ink": str(tmp_path / "a.safetensors")}, scales={"ink": 0.6}
    )
    assert mix.names == ["dog", "ink"]


def test_what_merging_gives_is_attached_as_it_is(pipe) -> None:
    made = adapter(pipe, 0, ("lora",))
    found = []
    for given in (made, vl.merge_adapters([made])):
        with vl.attach(pipe, {"a": given}, scales=0.5):
            found.append(run(pipe))
    torch.testing.assert_close(*found, rtol=1e-3, atol=2e-4)


# -------------------------------------------------------------------------------------------------------- bad input

REFUSALS = {
    "unknown name": (lambda m, a: m.set_scales({"agg": 1.0}), "No adapter named 'agg' is attached. Allowed: a."),
    "unknown block": (
        lambda m, a: m.set_scales({"a": {"dwn": 0.5}}),
        "No adapted layer is in block 'dwn'. Did you mean 'down'?",
    ),
    "NaN": (lambda m, a: m.set_scales({"a": float("nan")}), "A scale is nan; it must be a finite number."),
    "no number": (lambda m, a: m.set_scales({"a": "loud"}), "A scale is 'loud'; it must be a finite number."),
    "too large": (
        lambda m, a: m.set_scales({"a": vl.Scale(1e30, blocks={"up": 1e30})}), "must be a finite number",
    ),
    "list": (lambda m, a: m.set_scales({"a": [1.0, 2.0]}), "has 12, 17, 20 or 26 numbers, as in A1111; this one has 2."),
    "images": (lambda m, a: vl.Scale(images=[]), "images is empty: give one number per picture of the batch."),
    "steps": (lambda m, a: vl.Scale(steps=[]), "steps is empty: give at least one number."),
    "same name": (lambda m, a: m.add("a", a), "An adapter named 'a' is in this mix already; remove it first"),
    "replace": (lambda m, a: m.replace("b", a), "No adapter named 'b' is attached."),
    "replaced by none": (
        lambda m, a: m.replace("a", Adapter({"text_encoder_2.a": next(iter(a.modules.values()))})),
        "The adapter has a part for 'text_encoder_2'",
    ),
    "remove": (lambda m, a: m.remove("b"), "No adapter named 'b' is attached."),
    "mode": (lambda m, a: Mix(m.target, "marged"), "mode is 'marged'. Did you mean 'merged'?"),
    "composition": (lambda m, a: m.set_composition("swich"), "There is no composition 'swich'. Did you mean 'switch'?"),
    "option": (lambda m, a: m.set_composition("switch", tua=3), "Composition 'switch' has no option 'tua'."),
    "target": (lambda m, a: Mix(3), "int is neither a module nor a pipeline with a UNet"),
    "scale of none": (
        lambda m, a: vl.attach(m.target, {"x": a}, scales={"y": 1.0}),
        "There is a scale for 'y', which is not attached.",
    ),
    "number for a name": (lambda m, a: m.add(3, a), "An adapter is named 3; a name must be a text, such as 'dog'."),
    "number for a known name": (lambda m, a: m.set_scales({3: 1.0}), "An adapter is named 3; a name must be a text"),
    "numbers for names": (lambda m, a: vl.attach(m.target, {3: a}), "An adapter is named 3; a name must be a text"),
    "no adapter": (lambda m, a: m.add("b", 5), "A int is no adapter: give an Adapter"),
    "composition of no name": (lambda m, a: m.set_composition(3), "compose is 3; give the name of a composition (sum, "),
    "part": (
        lambda m, a: m.add("b", Adapter({"text_encoder_2.a": next(iter(a.modules.values()))})),
        "The adapter has a part for 'text_encoder_2'; here there is unet, text_encoder.",
    ),
    "step scale": (
        lambda m, a: (m.set_scales({"a": vl.Scale(steps=lambda p: float("inf"))}), run(m.target)),
        "of the sampling; it must give a finite number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_leave_the_mix_as_it_was(pipe, name: str) -> None:
    action, message = REFUSALS[name]
    made = adapter(pipe, 0, ("lora",))
    mix = vl.attach(pipe, {"a": made}, scales={"a": 0.5})
    before = run(pipe)
    with pytest.raises(vl.VisionLoRAError) as caught:
        action(mix, made)
    assert message in str(caught.value)
    assert torch.equal(run(pipe), before) and mix.names == ["a"]


def test_another_family_is_refused_and_the_pipeline_unchanged(pipe) -> None:
    before = run(pipe)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    foreign = Adapter({name: AdapterModule.lora(torch.ones(1, 2048), torch.ones(32, 1), 1.0)})
    with pytest.raises(vl.VisionLoRAError, match="This is an adapter for Stable Diffusion XL"):
        vl.attach(pipe, {"a": adapter(pipe, 0), "b": foreign})
    assert torch.equal(run(pipe), before)


def test_one_takes_the_place_of_another(pipe) -> None:
    made = [adapter(pipe, k) for k in range(3)]
    mix = vl.attach(pipe, {"a": made[0], "b": made[1]}, scales={"a": 0.7, "b": 0.4})
    mix.replace("a", made[2])
    assert mix.names == ["a", "b"] and mix.members["a"].scale.strength == 0.7
    found = run(pipe)
    mix.detach()
    mix = vl.attach(pipe, {"a": made[2], "b": made[1]}, scales={"a": 0.7, "b": 0.4})
    assert torch.equal(found, run(pipe))
    mix.replace("a", made[2], 0.0)
    mix.set_scales({"b": 0.0})
    rest = run(pipe)
    mix.detach()
    assert torch.equal(rest, run(pipe))


@pytest.mark.parametrize("mode", ["merged", "stacked"])
def test_compiled_code_is_not_traced_again_when_scales_or_adapters_change(mode: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(2), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
    model.requires_grad_(False).eval()
    made = {
        n: Adapter({f"model.{k}": module("lora", model[k].weight, seed) for k in (0, 2, 4)})
        for seed, n in enumerate("abc")
    }
    mix = vl.attach(model, {n: made[n] for n in "ab"}, scales={"a": 1.0, "b": 0.0}, mode=mode)
    traces = []

    def backend(graph, inputs):
        traces.append(graph)
        return graph.forward

    compiled, x = torch.compile(model, backend=backend), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        found = {1: compiled(x)}
        count = len(traces)
        mix.set_scales({"a": 0.0, "b": 1.0})
        found[2] = compiled(x)
        mix.set_scales({"a": 0.5, "b": 0.25})
        found[3] = compiled(x)
        assert len(traces) == count >= 1
        torch.testing.assert_close(found[3], model(x), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[1], found[2])
        mix.replace("a", made["c"])
        found[4] = compiled(x)
        assert len(traces) == count
        torch.testing.assert_close(found[4], model(x), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[3], found[4])


@pytest.fixture
def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)


def lora_on(name: str, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(2, 4, generator=generator), torch.randn(4, 2, generator=generator)
    return Adapter({f"model.{name}": AdapterModule.lora(*factors, 2.0)})


def test_a_mix_that_is_no_longer_at_hand_is_found_and_taken_off(layers: nn.Module) -> None:
    x, before = torch.randn(2, 4), copy.deepcopy(layers.state_dict())
    vl.attach(layers, {"dog": lora_on("0")})
    wanted = layers(x)
    with pytest.raises(
        ConfigError, match=r"an earlier vl.attach are on this Sequential \(dog\): add to that mix .* vl.detach"
    ):
        vl.attach(layers, {"ink": lora_on("1")})
    assert torch.equal(layers(x), wanted)
    for other in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert torch.equal(other(x), wanted) and mix_on(other) is None
    vl.detach(layers)
    assert layers.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    vl.detach(layers)
    with vl.attach(layers, {"ink": lora_on("1")}) as mix:
        assert repr(mix) == "<Mix of ink 1, merged, on Sequential>"
    assert mix_on(layers) is None and repr(mix) == "<Mix of nothing, merged, on Sequential>"


def test_names_that_layers_cannot_use_are_told_apart(layers: nn.Module) -> None:
    x = torch.randn(2, 4)
    names = ("a.b", "a_b", "a:b", "keys", "type", "")
    mix = vl.attach(layers, {name: lora_on("0", seed) for seed, name in enumerate(names)}, mode="stacked")
    assert set(layers[0].adapters) == {"a_b", "a_b_", "a_b__", "keys_", "type_", "_"}
    together = layers(x)
    mix.set_scales(0)
    mix.set_scales(dict.fromkeys(names, 1))
    torch.testing.assert_close(layers(x), together)


def test_one_scale_for_all_and_one_adapter_on_a_pipeline(pipe, layers: nn.Module) -> None:
    x = torch.randn(2, 4)
    mix = vl.attach(layers, {"a": lora_on("0"), "b": lora_on("1", 1)}, scales=0.5)
    assert {m.scale.strength for m in mix.members.values()} == {0.5}
    half = layers(x)
    mix.set_scales(1)
    assert not torch.allclose(layers(x), half)
    mix.set_scales(0.5)
    assert torch.equal(layers(x), half)
    one = vl.attach(pipe, adapter(pipe, 0), name="dog", scales=0.3)
    assert isinstance(one, Mix) and one.members["dog"].scale.strength == 0.3
    one.detach()


@pytest.mark.parametrize(
    ("given", "settings", "text"),
    [
        (lora_on("0"), {"scales": {"nonsense": 0.0}}, "scales, mode, compose and its options are a mix's"),
        (lora_on("0"), {"mode": "merged"}, "are a mix's"),
        (lora_on("0"), {"tau": 5}, "are a mix's"),
        ([lora_on("0")], {}, "adapters is list: give them by name"),
        ({"a": lora_on("0")}, {"component": "model"}, "a mix finds the part of each layer itself"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(layers: nn.Module, given, settings, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        vl.attach(layers, given, **settings)
    assert mix_on(layers) is None


@pytest.mark.parametrize("mode", ["merged", "stacked", "batched"])
@pytest.mark.parametrize("compose", ["sum", "balanced"])
def test_what_is_added_one_by_one_is_as_if_attached_at_once_and_attached_once(
    pipe, mode: str, compose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each addition attached all anew, so that a hundredth file took as long as a hundred."""
    kinds = KINDS if compose == "sum" else ("lora", "loha")
    adapters = {name: adapter(pipe, k, kinds) for k, name in enumerate("abc")}
    scales, before, done = {"a": 0.7, "b": vl.Scale(-0.4, blocks={"up": 0.5}), "c": 0.3}, bits(pipe), []
    with vl.attach(pipe, adapters, scales=scales, mode=mode, compose=compose):
        at_once = run(pipe)
    attach_one, prepare, prepared = attached_module.attach_one, COMPOSITIONS[compose].prepare, []
    monkeypatch.setattr(COMPOSITIONS[compose], "prepare", lambda *given: prepared.append(1) or prepare(*given))
    monkeypatch.setattr(attached_module, "attach_one", lambda *given: done.append(given[3]) or attach_one(*given))
    mix = vl.attach(pipe, {"a": adapters["a"]}, scales={"a": 0.7}, mode=mode, compose=compose)
    for name in "bc":
        run(pipe)
        mix.add(name, adapters[name], scales[name])
    assert torch.equal(run(pipe), at_once)
    assert len(prepared) == 3, "once for each change: some compositions take their time over it"
    if compose == "sum":  # balanced makes others of those that are there
        assert done == ["a", "a", "b", "b", "c", "c"], "the UNet's part and the text encoder's"
    wrong = Adapter({n: AdapterModule.lora(torch.ones(1, 3), torch.ones(3, 1), 1.0) for n in adapters["a"].modules})
    with pytest.raises(vl.VisionLoRAError):
        mix.add("wrong", wrong)
    assert torch.equal(run(pipe), at_once) and mix.names == ["a", "b", "c"]
    mix.detach()
    assert all(torch.equal(before[n], now) for n, now in bits(pipe).items())
