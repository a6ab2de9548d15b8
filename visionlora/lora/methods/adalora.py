"""AdaLoRA: ΔW = s·B·diag(E)·A, whose singular values E are pruned to a budget while training (arXiv 2303.10512).

Importance of a triplet (eq. 8-11): smoothed |w·∂L/∂w| times its smoothed deviation, of E plus the means over the row of A
and the column of B. The budget falls from the initial to the target rank along a cubic (eq. 12). Call
`Handle.after_step(step, steps)` after each optimizer step, before the gradients are cleared, and add
`Handle.regularisation()` to the loss (eq. 4). The file holds what is left as plain LoRA with a rank of its own per module,
and is no larger than one of the target rank everywhere, also where the triplets of wide layers are those that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from visionlora.lora.adapter import AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.methods.base import Factors, Method, Site, cpu

START_STD = 0.02
BETA_SENSITIVITY, BETA_DEVIATION = 0.85, 0.85


class AdaLoRA(Method):
    """Triplets on one site."""

    kind = "adalora"
    bounded_rank = True

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_E: nn.Parameter

    def __init__(
        self, site: Site, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor, alpha: float, dropout: float
    ) -> None:
        super().__init__(site, dropout)
        self.lora_A, self.lora_B, self.lora_E = nn.Parameter(lora_A), nn.Parameter(lora_B), nn.Parameter(lora_E)
        self.alpha = float(alpha)
        self.sensitivity: dict[str, Tensor] = {}
        self.deviation: dict[str, Tensor] = {}

    @classmethod
    def new(cls, site: Site, config: AdapterConfig, generator: torch.Generator) -> AdaLoRA:
        """A and B normal with deviation 0.02, E zero. The rank of the config is the target; it starts 1.5 times as wide."""
        weight, rank = site.weight, cls.wider(site, config.rank_of(site.name), config)
        down = torch.empty(rank, *weight.shape[1:]).normal_(std=START_STD, generator=generator)
        up = torch.empty(len(weight), rank).normal_(std=START_STD, generator=generator)
        up = up.view(len(weight), rank, *(1,) * (weight.dim() - 2))
        start = torch.zeros(rank)
        device = weight.device
        return cls(site, down.to(device), up.to(device), start.to(device), config.alpha_of(site.name), config.dropout)

    @classmethod
    def wider(cls, site: Site, rank: int, config: AdapterConfig) -> int:
        """The rank with which a site starts that is to end with this one."""
        return min(round(rank * config.initial_rank_factor), min(len(site.weight), site.weight[0].numel()))

    @classmethod
    def numbers(cls, site: Site, rank: int, config: AdapterConfig, stored: bool = False) -> int:
        """It trains as wide as it starts; the file has what pruning leaves, of all layers together the ranks in the config."""
        if stored:
            return super().numbers(site, rank, config, stored)
        start = cls.wider(site, rank, config)
        return super().numbers(site, start, config) + start

    @property
    def triplet(self) -> int:
        """Numbers that one takes in a file."""
        return len(self.lora_B) + self.lora_A[0].numel()

    @property
    def scaling(self) -> float:
        """Alpha over the rank it starts with, as in the paper's code."""
        return self.alpha / len(self.lora_E)

    def factors(self) -> list[Factors]:
        """B·(E ⊙ A)."""
        down = self.lora_A * self.lora_E.view(-1, *(1,) * (self.lora_A.dim() - 1))
        return [(down, self.lora_B, self.times(self.scaling))]

    def regularisation(self) -> Tensor:
        """Mean distance of A·Aᵀ and Bᵀ·B from the identity (eq. 4)."""
        a, b = self.lora_A.flatten(1), self.lora_B.flatten(1)
        eye = torch.eye(len(a), device=a.device, dtype=a.dtype)
        distance: Tensor = ((a @ a.t() - eye).norm() + (b.t() @ b - eye).norm()) / 2
        return distance

    @torch.no_grad()
    def measure(self) -> None:
        """Updates the smoothed sensitivities from the present gradients (eq. 9, 10), if they are finite.

        A scaler of fp16 skips steps whose gradients are not.
        """
        if any(p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in self.parameters()):
            return
        for name, p in self.named_parameters():
            if p.grad is None:
                continue
            now = (p * p.grad).abs()
            old = self.sensitivity.get(name, torch.zeros_like(p))
            smooth = self.sensitivity[name] = BETA_SENSITIVITY * old + (1 - BETA_SENSITIVITY) * now
            was = self.deviation.get(name, torch.zeros_like(p))
            self.deviation[name] = BETA_DEVIATION * was + (1 - BETA_DEVIATION) * (now - smooth).abs()

    def importance(self) -> Tensor:
        """Of each triplet, (r,) (eq. 8, 11)."""
        if not self.sensitivity:
            return torch.zeros_like(self.lora_E).flatten()
        score = {n: self.sensitivity[n] * self.deviation[n] for n in ("lora_A", "lora_B", "lora_E")}
        total: Tensor = score["lora_E"] + score["lora_A"].flatten(1).mean(1) + score["lora_B"].flatten(1).mean(0)
        return total

    def memory(self) -> dict[str, Tensor]:
        """With the smoothed sensitivities."""
        smoothed = {f"sensitivity.{n}": t for n, t in self.sensitivity.items()}
        return super().memory() | smoothed | {f"deviation.{n}": t for n, t in self.deviation.items()}

    def remember(self, values: Mapping[str, Tensor]) -> None:
        """With the smoothed sensitivities."""
        super().remember(values)
        for name, kept in (("sensitivity", self.sensitivity), ("deviation", self.deviation)):
            kept.clear()  # before the first step there were none
            given = {n.removeprefix(name + "."): t for n, t in values.items() if n.startswith(name + ".")}
            kept |= {n: t.to(getattr(self, n).device, copy=True) for n, t in given.items()}

    def export(self) -> AdapterModule:
        """Plain LoRA of the triplets that are left (one of value 0 when none is)."""
        kept = self.lora_E.detach().nonzero().flatten()
        kept = kept if len(kept) else kept.new_zeros(1)
        ((down, up, _),) = self.factors()
        return AdapterModule.lora(cpu(down[kept]), cpu(up[:, kept]), self.scaling * len(kept))


def budget_at(step: int, steps: int, start: int, target: int, warmup: int, final: int) -> int:
    """Number of triplets to keep at a step (eq. 12): all in the warm-up, a cubic fall, the target in the final phase."""
    if step <= warmup:
        return start
    if step > steps - final:
        return target
    left = 1 - (step - warmup) / max(1, steps - final - warmup)
    return int((start - target) * left**3 + target)


def fitting(methods: Sequence[AdaLoRA], scores: Tensor, wanted: Tensor, most: int) -> Tensor:
    """Which of the wanted triplets go into a file of so many numbers, the most important first.

    Args:
        methods: every site of the adapter.
        scores: importance of their triplets, site after site.
        wanted: whether each of them is to stay.
        most: numbers; enough for a triplet of each site, as the file has one also where none is left.
    """
    owners = [m for m in methods for _ in range(len(m.lora_E))]
    left, counted, kept = most - sum(m.triplet for m in methods), set(), wanted.tolist()
    for at in [k for k in scores.argsort(descending=True).tolist() if kept[k]]:
        price = owners[at].triplet if owners[at] in counted else 0
        if price > left:
            kept[at] = False
        else:
            left -= price
            counted.add(owners[at])
    return torch.tensor(kept, device=wanted.device)


@torch.no_grad()
def allocate(
    methods: Sequence[AdaLoRA], step: int, steps: int, target: int, interval: int = 10, most: int | None = None
) -> int:
    """Measures importance and, every `interval` steps, zeroes the least important triplets. Returns the budget.

    Args:
        methods: every site of the adapter.
        step: counted from 1.
        steps: of the whole training.
        target: triplets to keep in the end, over all sites.
        interval: steps between prunings.
        most: numbers that the file may have in the end; the triplets of wide layers take more than those of narrow ones.
    """
    start = sum(len(m.lora_E) for m in methods)
    warmup, final = steps // 10, steps // 3
    budget = budget_at(step, steps, start, target, warmup, final)
    if step <= steps - final:
        for m in methods:
            m.measure()
    if warmup < step and (step % interval == 0 or step > steps - final) and budget < start:
        scores = torch.cat([m.importance() for m in methods])
        kept = scores > scores.kthvalue(start - budget).values
        if most is not None:
            wide = sum(len(m.lora_E) * m.triplet for m in methods)
            kept = fitting(methods, scores, kept, budget_at(step, steps, wide, most, warmup, final))
        for m, own in zip(methods, kept.split([len(m.lora_E) for m in methods]), strict=True):
            m.lora_E.masked_fill_(~own, 0.0)
    return budget
