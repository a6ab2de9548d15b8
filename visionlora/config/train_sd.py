"""Settings of `visionlora train-sd`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from visionlora.config.folders import FolderConfig, reading_rules
from visionlora.config.training import PRECISIONS, Rule, TrainingConfig, rate_rule
from visionlora.errors import nearest

ATTENTION = ("sdpa", "flash", "xformers")
QUANTISED = ("int8", "nf4")
WINDOW = 75
"""Tokens of a caption that a text encoder of CLIP reads at once, beside those where it begins and ends."""
TOKEN_LENGTHS = (WINDOW, 2 * WINDOW, 3 * WINDOW)
BASE_PRECISIONS = (*PRECISIONS, *QUANTISED)


@dataclass(frozen=True)
class TrainSDConfig(TrainingConfig):
    """Everything `visionlora train-sd` can be told; `model` is a diffusers folder, a checkpoint or a Hub id."""

    prompt: str | None = None
    """One caption for every picture; without it captions come from the folder."""
    captions: str = "auto"
    """auto (files of the folder, else a rare word and its name), or filename: a picture's name is its caption."""
    masks: str | None = None
    """What of each picture is learned: `alpha` (what is not transparent), or a folder of grey pictures, white where to; of a
    parquet table the column that holds them."""
    folders: tuple[FolderConfig, ...] = ()
    """Several folders instead of `images`, each with its own path, prompt, repeats, captions and masks."""
    unmasked_weight: float = 0.0
    """Weight of the loss where a mask is black, of 1 where it is white."""
    shuffle_tags: bool = False
    """Captions are lists of tags, whose order changes."""
    keep_tags: int = 1
    """So many tags at the beginning stay where they are and are never dropped."""
    tag_dropout: float = 0.0
    """Chance of each other tag to be left out."""
    caption_variants: int = 16
    """The most different variants of one caption with tags or `{red|blue}`; the text of each is encoded once."""
    resolution: int | None = None
    """Side in px of a square of the wanted area; the model's own when not given."""
    buckets: bool = True
    """Train each picture near its own shape, at the same area; false cuts squares from the centre."""
    bucket_step: int | None = None
    """Sides of the buckets are multiples of this divisor of the resolution, px; by default 64, or the model's own step where
    that is larger."""
    upscale: bool = False
    """Enlarge pictures that are smaller than the area; otherwise they are trained at their size."""
    flip: bool = False
    """Mirror half of the pictures (each time anew); not where captions say left or right, or faces must be themselves."""
    random_crop: bool = False
    """Cut what sticks out of a bucket anywhere instead of at the edges evenly."""
    colour_jitter: float = 0.0
    """Change brightness, contrast and saturation by up to this share; not where colours are to be learned."""
    picture_variants: int = 8
    """With random_crop or colour_jitter: what is made of each picture beforehand, one of which is drawn each time."""
    caption_dropout: float = 0.05
    """Share of captions replaced by the empty one, which keeps guidance working."""
    timestep_range: tuple[int, ...] = (0, 1000)
    """Noise levels that are learned, of 1000: `0,600` leaves composition, which is settled at high noise, to the base."""
    timestep_logit: tuple[float, ...] = ()
    """Mean and deviation of the logit of the noise level, such as `0,1`: more of the middle; all levels alike if empty."""
    min_snr_gamma: float | None = None
    """Most that an error counts at low noise (min-SNR, 5 is usual): learns faster where noise levels quarrel."""
    debiased: bool = False
    """Weigh noise levels by the root of their signal-to-noise ratio instead."""
    huber: float | None = None
    """Size of error from which on it counts linearly, such as 0.1: for pictures that do not fit together."""
    noise_offset: float = 0.0
    """Part of the noise that shifts whole channels, such as 0.05: for very dark or bright pictures."""
    input_perturbation: float = 0.0
    """More noise on the input than is to be predicted, such as 0.1: against learning by heart."""
    zero_terminal_snr: bool = False
    """Rescale the noise levels so that the last is nothing but noise; for models that predict the velocity."""
    min_rank: int | None = None
    """Of method tlora: components that act at the noisiest timestep too; by default half of the rank."""
    train_text_encoder: bool = False
    """Adapt the text encoders too."""
    text_encoder_learning_rate: float | None = None
    """By default half of learning_rate."""
    text_encoder_stop: float = 1.0
    """Share of the steps after which the text encoders stay as they are."""
    clip_skip: int = 1
    """How many layers from the end the text is read, of Stable Diffusion 1.x and 2.x: 1 after the last, 2 before it, for models
    that were trained so."""
    max_token_length: int = 75
    """Most tokens of a caption that are learned: 75, which CLIP reads at once, 150 or 225, read in two or three parts, as
    `generate` reads long prompts."""
    token: str | None = None
    """A new word, such as <dog>, whose meaning is learned together with the adapter and kept in its file."""
    token_vectors: int = 1
    """How many embeddings stand for it."""
    token_initializer: str | None = None
    """Words whose meaning it starts from, such as dog; a rare word when not given."""
    token_learning_rate: float | None = None
    """By default five times learning_rate."""
    prior_prompt: str | None = None
    """Caption of the class that the subject belongs to, such as `a dog`, whose look is to be kept."""
    prior_images: str | None = None
    """Folder of pictures of the class, drawn by the base where there are too few; without it the base's predictions count."""
    prior_count: int = 100
    """Pictures that the folder should hold."""
    prior_weight: float = 1.0
    """Weight of the class beside the subject."""
    auto_batch: bool = False
    """Pass as many pictures of a step through the model at once as fit in memory; batch_size x gradient_accumulation stays."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: a third slower, far less memory."""
    base_precision: str = "auto"
    """Of the frozen base: fp32, bf16, fp16, or auto: that of the computation. int8 and nf4 keep the UNet in a quarter and an
    eighth of the memory of fp32 and unpack each layer as it runs, which takes time."""
    attention: str = "sdpa"
    """Kernel of attention: sdpa (torch's choice), flash (torch's flash kernel alone), or xformers; the last two need a GPU."""
    channels_last: bool = False
    """Keep pictures channel by channel within a position, which makes convolutions faster on many machines."""
    compile: bool = False
    """Compile the UNet with torch.compile: minutes at the start, then faster steps; worth it in long runs on a GPU."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the sample grid; by default some captions of the pictures."""
    sample_columns: int = 3
    """Columns of the grid beside the base: the adapter at so many moments of training."""
    validation: str | None = None
    """Folder of pictures that are not trained on, by which one sees whether it learned; of more than 64, that many."""
    val_share: float = 0.0
    """Share of the pictures that is kept apart for that, instead of `validation`; 64 pictures at most."""
    checkpoints: int = 10
    """How often the state is saved, from which `resume` goes on, and the validation pictures are looked at."""
    keep_checkpoints: int | None = None
    """Adapters of moments on the way that stay under checkpoints/, the newest ones: of the moments that the grid shows, all
    when not given; without a grid (sample_columns=0) of those at which the state is saved, none when not given."""
    sample_steps: int = 20
    """Denoising steps per sample picture."""
    guidance_scale: float | None = None
    """Classifier-free guidance of the samples; by default what suits the base model."""

    @property
    def windows(self) -> int:
        """How many times the text encoder reads a caption at most."""
        return self.max_token_length // WINDOW

    @property
    def held_caption(self) -> str | None:
        """Caption of the class that the base's own predictions hold, where there are no pictures of it."""
        return None if self.prior_images is not None else self.prior_prompt

    def rules(self) -> list[Rule]:
        """What must hold."""
        of_one = {"prompt": None, "captions": "auto", "masks": None}
        beside = [name for name, unset in of_one.items() if self.folders and getattr(self, name) != unset]
        return [
            *(rule for rule in super().rules() if not (rule[0] == "images" and self.folders)),
            ("images", not (self.images and self.folders), "folders are given too: leave one of them out"),
            *((name, False, "folders are given: write it into each of them that needs it") for name in beside),
            *reading_rules(self.prompt, self.captions, self.masks),
            (
                "method",
                self.method != "linear-probe",
                "it trains the head of a classifier, so it is for `visionlora classify`: take lora",
            ),
            ("unmasked_weight", 0 <= self.unmasked_weight <= 1, "it must be between 0 and 1"),
            (
                "unmasked_weight",
                not self.unmasked_weight or bool(self.masks) or any(folder.masks for folder in self.folders),
                "it needs masks: give masks=alpha or masks=FOLDER",
            ),
            ("keep_tags", self.keep_tags >= 0, "it must be 0 or more"),
            ("tag_dropout", 0 <= self.tag_dropout < 1, "it must be at least 0 and below 1"),
            ("caption_variants", self.caption_variants >= 1, "it must be at least 1"),
            ("resolution", self.resolution is None or self.resolution >= 1, "it must be at least 1 px"),
            ("caption_dropout", 0 <= self.caption_dropout <= 1, "it must be between 0 and 1"),
            (
                "timestep_range",
                len(self.timestep_range) == 2 and 0 <= self.timestep_range[0] < self.timestep_range[1] <= 1000,
                "it must be two whole numbers, the first below the second, in 0 … 1000",
            ),
            ("val_share", 0 <= self.val_share < 1, "it must be at least 0 and below 1"),
            (
                "val_share",
                not (self.val_share and self.validation),
                "a validation folder is given: leave one of them out",
            ),
            (
                "patience",
                self.patience is None or bool(self.val_share or self.validation),
                "it needs pictures that are not trained on: give val_share or validation",
            ),
            ("checkpoints", self.checkpoints >= 1, "it must be at least 1"),
            (
                "keep_checkpoints",
                self.keep_checkpoints is None or self.keep_checkpoints >= 0,
                "it must be 0 or more",
            ),
            *self.learning_rules(),
            ("sample_columns", self.sample_columns >= 0, "it must be 0 (no grid) or more"),
            ("sample_steps", self.sample_steps >= 1, "it must be at least 1"),
            (
                "guidance_scale",
                self.guidance_scale is None or self.guidance_scale >= 1,
                "it must be at least 1 (no guidance)",
            ),
        ]

    def learning_rules(self) -> list[Rule]:
        """What must hold of pictures, objective and what learns beside the UNet."""
        unset = {"text_encoder_learning_rate": None, "text_encoder_stop": 1.0}
        of_text = [
            name for name, value in unset.items() if not self.train_text_encoder and getattr(self, name) != value
        ]
        return [
            ("bucket_step", self.bucket_step is None or self.bucket_step >= 1, "it must be at least 1 px"),
            ("colour_jitter", 0 <= self.colour_jitter < 1, "it must be at least 0 and below 1"),
            ("picture_variants", self.picture_variants >= 1, "it must be at least 1"),
            (
                "timestep_logit",
                not self.timestep_logit or (len(self.timestep_logit) == 2 and self.timestep_logit[1] > 0),
                "it must be two numbers, a mean and a positive deviation",
            ),
            ("min_snr_gamma", self.min_snr_gamma is None or self.min_snr_gamma > 0, "it must be positive"),
            ("debiased", not (self.debiased and self.min_snr_gamma), "min_snr_gamma is given: leave one of them out"),
            ("huber", self.huber is None or self.huber > 0, "it must be positive"),
            ("noise_offset", 0 <= self.noise_offset <= 1, "it must be between 0 and 1"),
            ("input_perturbation", 0 <= self.input_perturbation <= 1, "it must be between 0 and 1"),
            rate_rule("text_encoder_learning_rate", self.text_encoder_learning_rate),
            ("text_encoder_stop", 0 < self.text_encoder_stop <= 1, "it must be above 0 and at most 1"),
            *((name, False, "give train_text_encoder=true too, or leave it out") for name in of_text),
            (
                "token",
                self.token is None or (bool(self.token.strip()) and not any(c.isspace() for c in self.token)),
                "it must be one word, such as <dog>",
            ),
            ("clip_skip", self.clip_skip >= 1, "it must be at least 1, which reads the last layer"),
            (
                "max_token_length",
                self.max_token_length in TOKEN_LENGTHS,
                f"it must be {', '.join(map(str, TOKEN_LENGTHS[:-1]))} or {TOKEN_LENGTHS[-1]}",
            ),
            ("token_vectors", self.token_vectors >= 1, "it must be at least 1"),
            rate_rule("token_learning_rate", self.token_learning_rate),
            *(
                (name, self.token is not None or not given, "it is of a new word: give a token too, or leave it out")
                for name, given in (
                    ("token_learning_rate", self.token_learning_rate is not None),
                    ("token_initializer", self.token_initializer is not None),
                    ("token_vectors", self.token_vectors > 1 and self.start_from is None),  # which may bring a word
                )
            ),
            (
                "min_rank",
                self.min_rank is None or (self.method == "tlora" and self.min_rank >= 1),
                "it is for method tlora, and at least 1",
            ),
            (
                "compile",
                not (self.compile and self.method == "tlora"),
                "tlora's rank changes from step to step, for which everything would be compiled again",
            ),
            ("prior_count", self.prior_count >= 1, "it must be at least 1"),
            ("prior_weight", self.prior_weight >= 0, "it must be 0 or more"),
            (
                "prior_images",
                self.prior_images is None or bool(self.prior_prompt),
                "it needs the class's caption: prior_prompt='a dog'",
            ),
            (
                "prior_prompt",
                re.search(r"\{[^{}]*\|[^{}]*\}", self.prior_prompt or "") is None,
                "it is one caption for all pictures of the class: write one of {the|choices} alone",
            ),
            ("base_precision", self.base_precision in BASE_PRECISIONS, nearest(self.base_precision, BASE_PRECISIONS)),
            (
                "base_precision",
                self.base_precision not in QUANTISED or not (self.compile or self.method == "full"),
                "packed weights go neither with compile nor with method full",
            ),
            (
                "base_precision",
                self.base_precision not in ("bf16", "fp16") or self.method != "full",
                "method full trains the weights themselves, which half precision would round away",
            ),
            (
                "rank",
                self.rank != "auto" or self.base_precision not in QUANTISED,
                "it measures the gradients of weights, which packed ones have not: give a rank, or leave base_precision out",
            ),
            ("attention", self.attention in ATTENTION, nearest(self.attention, ATTENTION)),
        ]
