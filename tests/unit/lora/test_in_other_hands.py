"""Adapted models in the hands of others: compile, copies, pickles, autocast, checkpointing, optimizers."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from visionlora.errors import ConfigError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.handle import Handle
from visionlora.lora.inject import attach, inject
from visionlora.lora.merge import bake, merge_together
from visionlora.lora.methods.base import Method


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(2), nn.LayerNorm(16), nn.Linear(16, 8), nn.GELU(),
                         nn.Linear(8, 4))  # fmt: skip


def adapted(method: str = "lora", **options: object) -> tuple[nn.Module, Handle, torch.Tensor]:
    model = network()
    handle = inject(model, AdapterConfig(method=method, rank=2, targets=("0", "3", "5"), **options))
    for m in handle.methods.values():
        for p in m.parameters():
            p.data += 0.2 * torch.randn(p.shape)
    return model, handle, torch.randn(2, 3, 4, 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "vera"])
def test_compiled_whole_and_not_traced_again_for_a_new_scale(method: str) -> None:
    torch._dynamo.reset()
    model, handle, x = adapted(method)
    traces = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        traces.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for scale in (1.0, 0.5, 2.0, 0.0):
        handle.set_scale(scale)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(traces) == 1


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "adalora", "dora"])
def test_packed_attention_is_compiled_whole(method: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Attends().eval(), torch.randn(2, 3, 8)
    handle = inject(model, AdapterConfig(method=method, rank=2, targets=("attn.q", "attn.v")))
    for m in handle.methods.values():
        for p in m.parameters():
            p.data += 0.2 * torch.randn(p.shape)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_compiled_with_checkpointed_blocks(method: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return x

    torch._dynamo.reset()
    model, x = Checkpointed(), torch.randn(3, 8)
    handle = inject(model, AdapterConfig(method=method, rank=2, alpha=2, targets="all"))
    found = []
    for compiled in (False, True):
        run = torch.compile(model, backend="inductor") if compiled else model
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in handle.parameters() if p.grad is not None])
        model.zero_grad()
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_are_independent() -> None:
    model, handle, x = adapted()
    twin, back = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = model(x)
    handle.eject()
    for other in (twin, back):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        assert other.state_dict().keys() > model.state_dict().keys()


def test_what_is_switched_acts_at_once_also_in_copies() -> None:
    model, handle, x = adapted()
    with torch.no_grad():
        outputs = {1.0: model(x)}
        twin, back = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for scale in (0.0, 0.5, 1.0):
            handle.set_scale(scale)
            outputs[scale] = model(x)
        assert torch.equal(outputs[0.0], network()(x))
        for other in (twin, back):
            for scale in (0.5, 0.0, 1.0):
                for m in other.modules():
                    if isinstance(m, Method):
                        m.scale = scale
                assert torch.equal(other(x), outputs[scale])
        other = inject(model, AdapterConfig(rank=2, targets=("3",)), name="more")
        for m in other.methods.values():
            m.lora_B.data.fill_(1.0)
        assert not torch.equal(model(x), outputs[1.0]), "an adapter that has come"
        other.eject()
        assert torch.equal(model(x), outputs[1.0])
        handle.merge()
        torch.testing.assert_close(model(x), outputs[1.0])
        handle.unmerge()
        assert torch.equal(model(x), outputs[1.0])


def test_a_replica_runs_its_own_adapters() -> None:
    """As nn.DataParallel makes them: a copy of everything about a module but its children."""
    layer = nn.Linear(4, 4)
    inject(layer_in := nn.Sequential(layer), AdapterConfig(rank=2, targets=("0",)))
    (method,) = (m for m in layer_in.modules() if isinstance(m, Method))
    x = torch.randn(2, 4)
    layer_in(x)
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight.detach(), layer.bias.detach()
    replica._modules["adapters"] = nn.ModuleDict({name: copy.deepcopy(m) for name, m in layer.adapters.items()})
    (own,) = replica.adapters.values()
    own.lora_B.data.fill_(1.0)
    assert method not in replica.active() and replica.active() == [own]
    assert not torch.equal(replica(x), layer(x))


def test_state_dict_keeps_the_names_of_the_base() -> None:
    model, _handle, x = adapted()
    other, _, _ = adapted()
    assert set(network().state_dict()) <= set(model.state_dict())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_autocast_trains_in_bf16_with_fp32_parameters(method: str) -> None:
    model, handle, x = adapted(method)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        with torch.no_grad():
            stacked = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(x), rtol=0.1, atol=0.1)
    torch.testing.assert_close(out, stacked, rtol=0.05, atol=0.05)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in handle.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_gives_the_same_gradients(dropout: float) -> None:
    gradients = []
    for again in (False, True):
        model, handle, x = adapted(dropout=dropout)
        torch.manual_seed(5)
        out = checkpoint(model, x, use_reentrant=False) if again else model(x)
        out.square().sum().backward()
        gradients.append([p.grad for p in handle.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_dropout_draws_the_same_mask_again_in_backward() -> None:
    model, _handle, x = adapted(dropout=0.5)
    x = x.double().requires_grad_()
    model.double()
    torch.manual_seed(1)
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    step, values = 1e-6, []
    for sign in (1, -1):
        torch.manual_seed(1)
        moved = x.detach().clone()
        moved[0, 0, 0, 0] += sign * step
        values.append(model(moved).sum().detach())
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), grad[0, 0, 0, 0], rtol=1e-4, atol=1e-6)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_lean_layers_keep_less_and_give_the_same_gradients() -> None:
    kept, gradients = [], []
    for lean in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6)))
        handle = inject(model, AdapterConfig(rank=2, targets="0", save_memory=lean))
        handle.methods["0"].lora_B.data.normal_(generator=torch.Generator().manual_seed(0))
        sizes: list[int] = []
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            out = model(x)
        out.square().sum().backward()
        kept.append(sum(n for n in sizes if n >= x.numel()))
        gradients.append([p.grad for p in handle.parameters()])
    assert kept[1] == kept[0] - 5 * x.numel()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", ["first", "net.0.proj", "net.2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_gelu_keeps_its_two_halves_alone(targets: str, dtype: torch.dtype) -> None:
    from diffusers.models.attention import FeedForward

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.feed = nn.Linear(8, 8), FeedForward(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.feed(self.first(x))

    kept, outs, gradients = [], [], []
    for lean in (False, True):
        torch.manual_seed(0)
        model = Block().to(dtype).train()
        handle = inject(model, AdapterConfig(rank=2, targets=targets, save_memory=lean))
        for m in handle.methods.values():
            m.lora_B.data.normal_(generator=torch.Generator().manual_seed(0))
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,
            lambda t: t,
        ):
            outs.append(model(x))
        outs[-1].square().sum().backward()
        kept.append(sum(sizes.values()))
        gradients.append([p.grad for p in handle.parameters()])
        with torch.no_grad():
            assert torch.equal(model(x), outs[-1])
        handle.eject()
        assert "Lean" not in "".join(type(m).__name__ for m in model.modules())
    assert torch.equal(outs[0], outs[1])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0
    # Frozen before it, the gate has no gradient and nothing is kept for it.
    assert kept[1] == kept[0] - (0 if targets == "net.2" else 2 * 5 * 32 * x.element_size())


def test_parameter_groups_give_b_alone_its_ratio() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    handle = inject(model, AdapterConfig(method="lora+", rank=2, targets="body", train="head"))
    groups = {g["name"]: g for g in handle.parameter_groups(1e-3, weight_decay=0.1, full_lr=1e-2)}
    assert groups["lora_B"]["lr"] == pytest.approx(16e-3)
    assert groups["adapter"]["lr"] == pytest.approx(1e-3)
    assert groups["full"]["lr"] == groups["full_1d"]["lr"] == 1e-2
    assert groups["full_1d"]["weight_decay"] == 0.0
    assert sum(len(g["params"]) for g in groups.values()) == len(handle.parameters()) == 4


@pytest.mark.parametrize("method", ["full", "linear-probe"])
def test_baselines_train_save_scale_and_restore(method: str, tmp_path) -> None:
    import visionlora as vl

    model = network()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    handle = vl.inject(model, vl.AdapterConfig(method=method, train="5" if method == "linear-probe" else ()))
    optimizer = torch.optim.SGD(handle.parameter_groups(0.5))
    x = torch.randn(2, 3, 4, 4)
    # The LayerNorm takes out the first bias, so that rounding alone would move it: the sum moves every weight
    (model(x).square().mean() + sum(p.sum() for p in handle.parameters())).backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == ({"5.weight", "5.bias"} if method == "linear-probe" else set(before))
    trained = model(x)
    handle.save(tmp_path / "a.safetensors")
    other = network()
    vl.attach(other, vl.load_adapter(tmp_path / "a.safetensors"))
    assert torch.equal(other(x), trained)
    handle.set_scale(0.0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    handle.set_scale(1.0)
    assert torch.equal(model(x), trained)
    handle.eject()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_training_through_a_merged_adapter_is_refused() -> None:
    model, handle, x = adapted()
    handle.merge()
    with pytest.raises(ConfigError, match=r"merged into '5', so training it would change nothing: call unmerge"):
        model(x).sum().backward()


def test_two_merged_adapters_leave_in_any_order() -> None:
    model = network()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    handles = [inject(model, AdapterConfig(rank=2, targets=("3", "5")), name=n) for n in ("a", "b")]
    for h in handles:
        for m in h.methods.values():
            m.lora_B.data.normal_()
        h.merge()
    handles[0].eject()
    handles[1].eject()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def gradients_of(model: nn.Module, lean: bool, bf16: bool) -> list[torch.Tensor]:
    handle = inject(model, AdapterConfig(rank=2, targets=("first", "last"), save_memory=lean))
    for m in handle.methods.values():
        m.lora_B.data.normal_(generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)))
    out.float().square().sum().backward()
    return [p.grad for p in handle.parameters()]


class Changed(nn.Module):
    """The output of a normalisation and of an activation, changed in place before an adapted layer sees it."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.norm, self.act, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.first(x)))
        if self.in_place:
            x += 1
        return self.last(x)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_made_again_is_what_was_seen(in_place: bool, bf16: bool) -> None:
    results = []
    for lean in (False, True):
        torch.manual_seed(0)
        results.append(gradients_of(Changed(in_place), lean, bf16))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_encoder_layer_does_not_pass_its_adapters_by() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    handle = inject(layer, AdapterConfig(rank=2, targets=("linear1", "linear2")))
    for m in handle.methods.values():
        m.lora_B.data.normal_()
    x = torch.randn(2, 5, 16)
    layer.eval().requires_grad_(False)
    bare = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval().requires_grad_(False)
    bare.load_state_dict({n: p for n, p in layer.state_dict().items() if "adapters" not in n})
    beside = layer(x)
    handle.merge()
    torch.testing.assert_close(beside, layer(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(beside, bare(x))
    handle.eject()
    layer.requires_grad_(False)
    assert type(layer) is nn.TransformerEncoderLayer
    torch.testing.assert_close(layer(x), bare(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("targets", ["linear1", "linear2", "self_attn.out_proj", "attn.q"])
@pytest.mark.parametrize("grad", [False, True])
def test_an_encoder_with_padded_texts_runs_its_adapters(targets: str, grad: bool) -> None:
    """torch would make nested tensors of them, which adapters cannot read."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    handle = inject(encoder, AdapterConfig(rank=2, targets=(targets,)))
    for m in handle.methods.values():
        m.lora_B.data.normal_()
    with torch.set_grad_enabled(grad):
        beside = encoder(x, src_key_padding_mask=padding)
        if grad:
            beside[~padding].sum().backward()
            assert all(p.grad is not None for p in handle.parameters())
        handle.merge()
        merged = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(beside[~padding], merged[~padding], rtol=1e-4, atol=1e-4)
    again = copy.deepcopy(encoder)
    torch.testing.assert_close(again(x, src_key_padding_mask=padding)[~padding], merged[~padding], rtol=1e-4, atol=1e-4)
    handle.eject()
    assert type(encoder) is nn.TransformerEncoder and encoder.use_nested_tensor


def test_a_base_that_trains_gets_its_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(4, 4), nn.Linear(4, 4))
    source = inject(nn.Sequential(*map(copy.deepcopy, model)), AdapterConfig(rank=1, targets=("0", "2"))).adapter()
    attach(model, source)
    model(torch.randn(2, 3, 2, 2)).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "adapters" not in n)
    conv = nn.Sequential(nn.Conv2d(3, 4, 1))
    inject(conv, AdapterConfig(rank=1, targets="0", train="0.bias"))
    conv(torch.randn(2, 3, 2, 2)).sum().backward()
    assert conv[0].bias.grad is not None


def test_attention_trains_its_bias_in_full() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    inject(model, AdapterConfig(rank=1, targets="attn.qv", train="0.in_proj_bias"))
    x = torch.randn(3, 2, 8)
    model[0](x, x, x)[0].sum().backward()
    assert model[0].in_proj_bias.grad is not None


def test_what_trained_before_trains_after_whatever_the_order() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    adapter = inject(copy.deepcopy(model), AdapterConfig(rank=1, targets="0")).adapter()
    attach(model, adapter).eject()
    assert [p.requires_grad for p in model.parameters()] == before
    first = inject(model, AdapterConfig(rank=1, targets="0", train="2"), name="first")
    second = inject(model, AdapterConfig(method="linear-probe", train="1"), name="second")
    assert [p.requires_grad for p in model.parameters() if p.shape != (1, 4)][-4:] == [True] * 4
    first.eject()
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, False, False]
    second.eject()
    assert [p.requires_grad for p in model.parameters()] == before


def test_second_derivatives_are_refused() -> None:
    model, _, x = adapted()
    x.requires_grad_(True)
    (grad,) = torch.autograd.grad(model(x).sum(), x, retain_graph=True)
    assert grad.isfinite().all()
    with pytest.raises(ConfigError, match="Second derivatives"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_attached_in_inference_mode_it_trains_later(method: str) -> None:
    _, handle, x = adapted(method)
    adapter, fresh = handle.adapter(), network()
    with torch.inference_mode():
        seen = attach(fresh, adapter)
        fresh(x)
        assert torch.equal(fresh(x), fresh(x))
        seen.eject()
        assert inject(fresh, AdapterConfig(method=method, rank=2, targets="3")).methods
    fresh(x).square().sum().backward()
    assert any(p.grad is not None for p in fresh.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_drops_the_same_inputs_twice(reentrant: bool) -> None:
    model, _, x = adapted(dropout=0.5)
    torch.manual_seed(1)
    plain = model(x)
    torch.manual_seed(1)
    again = checkpoint(model, x.requires_grad_(True), use_reentrant=reentrant)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_attention_in_threads_leaves_the_base_alone() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    before = model.in_proj_weight, model.in_proj_weight.detach().clone()
    handle = inject(nn.Sequential(model), AdapterConfig(rank=2, targets="attn"))
    for m in handle.methods.values():
        m.lora_B.data.normal_()
    x = torch.randn(1, 4, 16)

    def run(_: int) -> torch.Tensor:
        with torch.no_grad():
            return model(x, x, x)[0]

    wanted = run(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, wanted) for found in pool.map(run, range(200)))
    handle.eject()
    assert model.in_proj_weight is before[0] and torch.equal(model.in_proj_weight, before[1])


def test_attention_sees_a_change_of_its_weights() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2).eval()
    handle = inject(nn.Sequential(model), AdapterConfig(rank=2, targets="attn"))
    for m in handle.methods.values():
        m.lora_B.data.normal_()
        m.requires_grad_(False)
    x = torch.randn(3, 1, 8)
    with torch.no_grad():
        before = model(x, x, x)[0]
        model.in_proj_weight.mul_(2)
        after = model(x, x, x)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model(x.requires_grad_(True), x, x)[0], rtol=1e-5, atol=1e-6)


def test_attention_wants_the_mask_beside_the_hint() -> None:
    model = nn.MultiheadAttention(8, 2)
    handle = inject(nn.Sequential(model), AdapterConfig(rank=2, targets="attn"))
    x = torch.randn(3, 1, 8)
    with pytest.raises(ConfigError, match="is_causal is a hint about attn_mask"):
        model(x, x, x, is_causal=True)
    handle.merge()
    with pytest.raises(ConfigError, match="is merged into"):
        model(x, x, x)[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_a_model_in_half_precision_are_in_fp32(dtype: torch.dtype) -> None:
    model, handle, _ = adapted("dora")
    m = handle.methods["3"]
    m.lora_B.data.zero_()
    assert m.norms().dtype == torch.float32
    model.to(dtype)
    torch.testing.assert_close(m.norms(), model[3].weight.float().norm(dim=1), rtol=1e-6, atol=0)


def test_dora_follows_a_change_of_the_weight() -> None:
    torch.manual_seed(0)
    _, handle, x = adapted("dora")
    lora = inject(network(), AdapterConfig(rank=2, targets=("0", "3", "5")))
    for m in lora.methods.values():
        m.lora_B.data.normal_()
    first, second = network(), network()
    baked = attach(first, lora.adapter(), name="lora")
    attach(first, handle.adapter(), name="dora")
    bake([baked])
    bake([attach(second, lora.adapter())])
    attach(second, handle.adapter())
    with torch.no_grad():
        torch.testing.assert_close(first(x), second(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_merged_model_can_be_cast(dtype: torch.dtype) -> None:
    model, handle, _ = adapted()
    model.to(torch.bfloat16)
    handle.merge()
    model.to(dtype)
    handle.set_scale(0.5)
    handle.unmerge()
    wanted = network().to(torch.bfloat16).to(dtype)
    assert torch.equal(model[3].weight, wanted[3].weight)


def test_one_weight_in_two_layers_cannot_be_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    handle = inject(model, AdapterConfig(rank=1, targets="0"))
    handle.methods["0"].lora_B.data.fill_(1.0)
    with pytest.raises(ConfigError, match="The weight of '0' is that of '1' too"):
        handle.merge()
    assert not handle.merged


def test_a_scale_that_cannot_be_merged_leaves_all_as_it_was() -> None:
    model, handle, _ = adapted()
    model.to(torch.float16)
    handle.merge()
    before = model[3].weight.clone()
    with pytest.raises(ConfigError, match="nothing was changed"):
        handle.set_scale(1e8)
    with pytest.raises(ConfigError, match="must be a finite number"):
        handle.set_scale(1e39)
    with pytest.raises(ConfigError, match="nothing was changed"):
        merge_together([handle], [1e8])
    assert torch.equal(model[3].weight, before) and handle.methods["3"].scale == 1.0


def test_layers_are_called_as_torchs_are() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3),
            "near": nn.Conv2d(3, 4, 3),
            "dense": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "act": nn.SiLU(),
        }
    )
    handle = inject(model, AdapterConfig(rank=2, targets=("conv", "dense")))
    for m in handle.methods.values():
        m.lora_B.data.normal_()
    picture = torch.randn(3, 6, 6, requires_grad=True)
    for name in ("conv", "near"):
        one = model[name](input=picture)
        torch.testing.assert_close(one, model[name](picture[None])[0], rtol=1e-5, atol=1e-6)
    x = torch.randn(2, 4, requires_grad=True)
    for name in ("dense", "norm", "act"):
        assert torch.equal(model[name](input=x), model[name](x))


def test_values_are_not_loaded_into_what_will_be_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    plain = copy.deepcopy(model.state_dict())
    handle = attach(model, Adapter({"model.0": AdapterModule.lora(torch.ones(1, 4), torch.ones(4, 1), 1.0)}))
    handle.merge()
    for there, prefix in ((model, "0."), (model[0], "")):
        with pytest.raises(ConfigError, match=f"Adapters are merged into {prefix}weight, .* handle.unmerge"):
            there.load_state_dict({f"{prefix}weight": torch.zeros(4, 4)}, strict=False)
    handle.unmerge()
    model.load_state_dict({"0.weight": torch.zeros(4, 4)}, strict=False)
    handle.eject()
    assert not model[0].weight.any() and torch.equal(model[0].bias, plain["0.bias"])


# ------------------------------------------------------------------------------------------------------- torch.func


def losses(model: nn.Module, x: torch.Tensor, **options: object) -> tuple[Handle, dict[str, torch.Tensor], object]:
    """An adapter that trains, its parameters, and the loss of one input as a function of them."""
    handle = inject(model, AdapterConfig(rank=2, **options))
    with torch.no_grad():
        for p in handle.parameters():
            p += 0.2 * torch.randn(p.shape)
    own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return handle, own, lambda given, one: functional_call(model, given, (one[None],)).square().sum()


def check_each(model: nn.Module, handle: Handle, own: dict, loss, x: torch.Tensor) -> None:
    """Gradients of each input at once are those of one after the other."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = vmap(grad(loss), (None, 0))(own, x)
    for k, one in enumerate(x):
        wanted = torch.autograd.grad(model(one[None]).square().sum(), list(named.values()))
        for n, t in zip(named, wanted, strict=True):
            torch.testing.assert_close(found[n][k], t, rtol=1e-4, atol=1e-4)
    several = {n: torch.stack([p, 1.5 * p]) for n, p in own.items()}
    both = vmap(lambda given: functional_call(model, given, (x,)))(several)
    for k, out in enumerate(both):
        with torch.no_grad():
            wanted = functional_call(model, {n: t[k] for n, t in several.items()}, (x,))
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    assert handle.parameters()[0].grad is None


@pytest.mark.parametrize("method", ["lora", "lora-fa", "dora", "ia3", "vera", "adalora"])
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at the first jvp
def test_transforms_of_functions(method: str, lean: bool) -> None:
    model, x = network(), torch.randn(3, 3, 4, 4)
    handle, own, loss = losses(model, x, method=method, targets=("0", "3", "5"), save_memory=lean)
    check_each(model, handle, own, loss, x)
    tangent = {n: torch.randn_like(p) for n, p in own.items()}
    _, found = jvp(lambda given: loss(given, x[0]), (own,), (tangent,))
    wanted = sum((slope * tangent[n]).sum() for n, slope in grad(loss)(own, x[0]).items())
    if method == "lora-fa":  # its gradient is corrected, which a slope is not
        near = [loss({n: p + step * tangent[n] for n, p in own.items()}, x[0]) for step in (1e-3, -1e-3)]
        wanted = (near[0] - near[1]) / 2e-3
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_functions_through_packed_attention() -> None:
    torch.manual_seed(0)
    model, x = Attends().eval(), torch.randn(3, 5, 8)
    handle, own, loss = losses(model, x, targets=("attn",))
    check_each(model, handle, own, loss, x)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_values_given_for_one_call_are_those_of_that_call(method: str) -> None:
    """Tensors that are freed leave their place to the next."""
    model, handle, x = adapted(method)
    names = [n for n, _ in model.named_parameters() if ".adapters." in n]
    with torch.no_grad():
        shapes = {n: p.shape for n, p in model.named_parameters()}
        for k in range(8):
            found = functional_call(model, {n: torch.full(shapes[n], 0.1 * (k + 1)) for n in names}, (x,))
            for m in handle.methods.values():
                for p in m.parameters():
                    p.fill_(0.1 * (k + 1))
            torch.testing.assert_close(found, model(x))
