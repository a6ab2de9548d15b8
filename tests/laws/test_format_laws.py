"""Whatever an adapter is, what one format wrote another reads and writes without changing a bit, or refuses in words.

A kohya file of LoRA alone has one alpha: where there were several, ΔW is the same to the rounding of fp32.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visionlora as vl
from visionlora.errors import AdapterFileError
from visionlora.lora.adapter import Adapter, AdapterModule

FORMATS = ("visionlora", "kohya", "diffusers")
NAMES = (
    "unet.conv_in",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.up_blocks.1.resnets.0.conv1",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    "text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj",
)
ALPHAS = st.floats(2**-10, 2.0**10, width=32)


@st.composite
def lora_modules(draw: st.DrawFn) -> AdapterModule:
    """A LoRA or DoRA of a linear layer or a convolution."""
    rank, o, i = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensors = {
        "lora_A": torch.randn(rank, i, *kernel, generator=generator).to(dtype),
        "lora_B": torch.randn(o, rank, *(1,) * len(kernel), generator=generator).to(dtype),
    }
    if draw(st.booleans()) and o > 1:
        return AdapterModule("dora", {**tensors, "magnitude": torch.rand(o, generator=generator) + 0.5}, draw(ALPHAS))
    return AdapterModule("lora", tensors, draw(ALPHAS))


@st.composite
def other_modules(draw: st.DrawFn) -> AdapterModule:
    """LoHa, LoKr, differences, (IA)³ and OFT."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    r, alpha = draw(st.integers(1, 3)), draw(ALPHAS)
    kind = draw(
        st.sampled_from(["loha", "lokr", "lokr, factored", "diff", "ia3", "oft", "dora by columns", "dora of loha"])
    )
    loha = {"hada_w1_a": random(4, r), "hada_w1_b": random(r, 6), "hada_w2_a": random(4, r), "hada_w2_b": random(r, 6)}
    return {
        "loha": lambda: AdapterModule("loha", loha, alpha),
        "lokr": lambda: AdapterModule("lokr", {"lokr_w1": random(2, 3), "lokr_w2": random(2, 2)}, 1.0),
        "lokr, factored": lambda: AdapterModule(
            "lokr", {"lokr_w1": random(2, 3), "lokr_w2_a": random(2, r), "lokr_w2_b": random(r, 2)}, alpha
        ),
        "diff": lambda: AdapterModule("diff", {"diff": random(4, 6)}, 1.0),
        "ia3": lambda: AdapterModule(
            "ia3", {"vector": random(4)}, 1.0, {"on_input": False, "relative": True, "bias": False}
        ),
        "oft": lambda: AdapterModule("oft", {"oft_blocks": random(2, 2, 2)}, 1.0, {"constraint": 0.5}),
        "dora by columns": lambda: AdapterModule(
            "dora", {"lora_A": random(r, 6), "lora_B": random(4, r), "magnitude": random(6)}, alpha, {"axis": "in"}
        ),
        "dora of loha": lambda: AdapterModule("dora", {**loha, "magnitude": random(4)}, alpha, {"product": "loha"}),
    }[kind]()


def check_same(a: Adapter, b: Adapter, folded: bool = False) -> None:
    """The same to the bit, or when alphas were folded to one the same ΔW."""
    assert a.modules.keys() == b.modules.keys()
    if folded:
        assert len({m.alpha for m in b.modules.values()}) == 1
        for name, m in a.modules.items():
            expected, found = m.delta_weight(), b.modules[name].delta_weight()
            assert (found - expected).norm() <= 1e-6 * expected.norm(), name
        return
    for name, m in a.modules.items():
        other = b.modules[name]
        assert (m.kind, m.alpha, dict(m.options)) == (other.kind, other.alpha, dict(other.options)), name
        assert m.tensors.keys() == other.tensors.keys(), name
        assert all(t.dtype == other.tensors[n].dtype and torch.equal(t, other.tensors[n]) for n, t in m.tensors.items())


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
@settings(max_examples=40)
@given(data=st.data())
def test_lora_and_dora_pass_through_any_two_formats(
    tmp_path_factory, first: str, second: str, data: st.DataObject
) -> None:
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    modules = {n: data.draw(lora_modules()) for n in names}
    if "diffusers" in (first, second):  # which takes LoRA or DoRA for all of a part
        kinds = {n.partition(".")[0]: m.kind for n, m in modules.items()}
        modules = {n: m for n, m in modules.items() if m.kind == kinds[n.partition(".")[0]]}
    adapter = Adapter(modules)
    plain = all(m.kind == "lora" for m in modules.values()) and len({m.alpha for m in modules.values()}) > 1
    folder = tmp_path_factory.mktemp("law")
    vl.save_adapter(adapter, folder / "a.safetensors", first)
    between = vl.load_adapter(folder / "a.safetensors")
    check_same(adapter, between, plain and first == "kohya")
    vl.save_adapter(between, folder / "b.safetensors", second)
    check_same(adapter, vl.load_adapter(folder / "b.safetensors"), plain and "kohya" in (first, second))


@pytest.mark.parametrize("first", ["visionlora", "kohya"])
@pytest.mark.parametrize("second", ["visionlora", "kohya"])
@settings(max_examples=40)
@given(data=st.data())
def test_all_other_kinds_pass_through_ours_and_kohyas(
    tmp_path_factory, first: str, second: str, data: st.DataObject
) -> None:
    adapter = Adapter({n: data.draw(other_modules()) for n in NAMES[:3]})
    folder = tmp_path_factory.mktemp("law")
    vl.save_adapter(adapter, folder / "a.safetensors", first)
    vl.save_adapter(vl.load_adapter(folder / "a.safetensors"), folder / "b.safetensors", second)
    check_same(adapter, vl.load_adapter(folder / "b.safetensors"))


@given(other_modules())
def test_diffusers_and_peft_refuse_what_they_cannot_hold(tmp_path_factory, module: AdapterModule) -> None:
    folder = tmp_path_factory.mktemp("law")
    adapter = Adapter({NAMES[0]: module})
    for format, name in (("diffusers", "a.safetensors"), ("peft", "a")):
        with pytest.raises(AdapterFileError, match=r"Format.? visionlora|own format keeps it"):
            vl.save_adapter(adapter, folder / name, format)
        assert not (folder / name).exists()
