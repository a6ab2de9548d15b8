"""Run configurations: frozen, checked at construction, read from YAML files, `key=value` words and flags."""

from visionlora.config.choices import OPTIMIZERS, SCHEDULES
from visionlora.config.classify import ClassifyConfig
from visionlora.config.folders import FolderConfig
from visionlora.config.generate import GenerateConfig
from visionlora.config.reading import (
    build,
    check_kind,
    config_text,
    given_names,
    pairs_of,
    parse_composition,
    parse_lora,
    parse_lora_use,
    parse_region,
    parse_words,
    read_yaml,
    recipe_names,
    to_yaml,
)
from visionlora.config.train_sd import TrainSDConfig
from visionlora.config.training import PRECISIONS, RESUME_AUTO, TrainingConfig, budget_of

__all__ = [
    "OPTIMIZERS",
    "PRECISIONS",
    "RESUME_AUTO",
    "SCHEDULES",
    "ClassifyConfig",
    "FolderConfig",
    "GenerateConfig",
    "TrainSDConfig",
    "TrainingConfig",
    "budget_of",
    "build",
    "check_kind",
    "config_text",
    "given_names",
    "pairs_of",
    "parse_composition",
    "parse_lora",
    "parse_lora_use",
    "parse_region",
    "parse_words",
    "read_yaml",
    "recipe_names",
    "to_yaml",
]
