"""Run configurations: frozen, checked at construction, read from YAML files, `key=value` words and flags."""

from visionlora.config.classify import ClassifyConfig
from visionlora.config.reading import (
    build,
    pairs_of,
    parse_composition,
    parse_region,
    parse_words,
    read_yaml,
    recipe_names,
    to_yaml,
)
from visionlora.config.train_sd import TrainSDConfig
from visionlora.config.training import PRECISIONS, TrainingConfig, budget_of

__all__ = [
    "PRECISIONS",
    "ClassifyConfig",
    "TrainSDConfig",
    "TrainingConfig",
    "budget_of",
    "build",
    "pairs_of",
    "parse_composition",
    "parse_region",
    "parse_words",
    "read_yaml",
    "recipe_names",
    "to_yaml",
]
