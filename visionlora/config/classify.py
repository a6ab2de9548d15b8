"""Settings of `visionlora classify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from visionlora.config.choices import OPTIMIZERS
from visionlora.config.training import Rule, TrainingConfig, rate_rule
from visionlora.errors import nearest

AUGMENTS = ("none", "light", "affine", "trivial", "rand")
SELECTED_BY = ("top1", "macro_f1", "balanced_accuracy", "loss", "map", "micro_f1")
BASELINES = ("probe", "full", "none")


@dataclass(frozen=True)
class ClassifyConfig(TrainingConfig):
    """Everything `visionlora classify` can be told; `model` is a timm name, a folder, torchvision/NAME or a Hub id."""

    weights: str | None = None
    """A state dict to start from instead of the library's weights, or `random`."""
    image_size: int | None = None
    """Side of the pictures that the backbone reads, px, where it is not to be its own: larger shows more, smaller is faster."""
    table: str | None = None
    """CSV, JSON lines or parquet with a row per picture; without it the folders are the classes. A table may also be given as
    `images`; one of parquet may then hold the pictures itself, and so may the files in a folder."""
    path_column: str | None = None
    """Of the table; guessed when not given."""
    label_column: str | None = None
    """Of the table; guessed when not given."""
    label_columns: tuple[str, ...] = ()
    """For pictures with several labels: one column of 0 and 1 per class."""
    group_column: str | None = None
    """Pictures of one group (a patient, a place) stay on one side of the split."""
    near_duplicates: bool = True
    """Pictures that look alike, also when mirrored, stay on one side of the split, turned copies aside (name their
    `group_column`); false, for pictures that all do, ties equal files alone."""
    split_column: str | None = None
    """Column that says train, val or test."""
    val_share: float = 0.15
    """Share of the pictures that chooses the best moment and the temperature."""
    test_share: float = 0.15
    """Share of the pictures that is looked at once, in the end."""
    targets: str = "auto"
    """What to adapt: roles, names or re:regex, separated by commas; auto is attn.qv, or all where the backbone has no
    attention."""
    find_rate: bool = False
    """Find the learning rate on the pictures before training; the usual one stays where their batches do not show any."""
    head_learning_rate: float | None = None
    """Of the head; by default what suits the backbone."""
    head_init: Literal["probe", "random", "adapter"] | None = None
    """probe: the head starts as a linear probe of the frozen features (arXiv 2202.10054); adapter: as that of start_from. By
    default as that of start_from where it knows all the classes, else as a probe."""
    layer_decay: float = 1.0
    """Each block learns at this share of the rate of the block above it."""
    weight_decay: float = 0.05
    """Of the optimizer, times the learning rate."""
    augment: str = "light"
    """none, light (crops and colours), affine (for what fills the picture), trivial (TrivialAugment) or rand (RandAugment)."""
    flip: bool | None = None
    """Mirror half of the pictures; not for letters, digits and signs. By default not with augment none and affine."""
    erasing: float = 0.0
    """Share of the pictures that lose a rectangle."""
    mixup: float = 0.0
    """Strength of Mixup, 0 for none; 0.2 is usual."""
    cutmix: float = 0.0
    """Strength of CutMix, 0 for none; 1 is usual. With both, each batch takes one of them."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    focal_gamma: float = 0.0
    """Focal loss: well-known pictures count less by (1 - p) to this power."""
    class_weights: str | dict[str, float] | None = None
    """auto (rare classes count more) or class: weight; with several labels, of the pictures that have it."""
    balanced_sampling: bool = False
    """Draw classes, not pictures, evenly."""
    evaluations: int = 10
    """How often the validation pictures are looked at."""
    select_by: str | None = None
    """What the best moment is chosen by: top1, macro_f1, balanced_accuracy, loss; map, micro_f1 with several labels."""
    baselines: tuple[str, ...] = ("probe",)
    """What is trained beside it for comparison: probe, full, or none."""
    cache: bool = True
    """Keep the decoded pictures on disk between runs."""

    def rules(self) -> list[Rule]:
        """What must hold."""
        shares = [name for name in ("val_share", "test_share") if not 0 <= getattr(self, name) < 1]
        return [
            *super().rules(),
            *((name, False, "it must be at least 0 and below 1") for name in shares),
            ("image_size", self.image_size is None or self.image_size >= 1, "it must be 1 px or more"),
            ("test_share", bool(shares) or self.val_share + self.test_share < 1, "with val_share it must stay below 1"),
            (
                "find_rate",
                not self.find_rate or self.learning_rate is None,
                "a learning_rate is given: leave one of them out",
            ),
            (
                "find_rate",
                not (self.find_rate and self.optimizer in OPTIMIZERS and OPTIMIZERS[self.optimizer].finds_rate),
                f"{self.optimizer} finds the rate itself: leave one of them out",
            ),
            (
                "head_learning_rate",
                self.head_learning_rate is None or not self.find_rate,
                "find_rate finds one for the head too: leave one of them out",
            ),
            rate_rule("head_learning_rate", self.head_learning_rate),
            (
                "head_init",
                self.head_init != "adapter" or self.start_from is not None,
                "there is no start_from whose head it could be",
            ),
            ("layer_decay", 0 < self.layer_decay <= 1, "it must be above 0 and at most 1"),
            ("augment", self.augment in AUGMENTS, nearest(self.augment, AUGMENTS)),
            ("erasing", 0 <= self.erasing <= 1, "it must be between 0 and 1"),
            ("mixup", self.mixup >= 0, "it must be 0 or more"),
            ("cutmix", self.cutmix >= 0, "it must be 0 or more"),
            (
                "batch_size",
                self.batch_size != 1 or not (self.mixup or self.cutmix),
                "mixup and cutmix mix the pictures of a batch: it must be 2 or more, or leave them out",
            ),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "it must be at least 0 and below 1"),
            ("focal_gamma", self.focal_gamma >= 0, "it must be 0 or more"),
            (
                "class_weights",
                not isinstance(self.class_weights, str) or self.class_weights == "auto",
                "write auto, or a mapping from class to weight: class_weights={cat: 2, dog: 1}",
            ),
            ("evaluations", self.evaluations >= 1, "it must be at least 1"),
            (
                "select_by",
                self.select_by is None or self.select_by in SELECTED_BY,
                nearest(self.select_by or "", SELECTED_BY),
            ),
            (
                "baselines",
                all(b in BASELINES for b in self.baselines),
                nearest(next((b for b in self.baselines if b not in BASELINES), ""), BASELINES),
            ),
        ]
