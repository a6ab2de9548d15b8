"""Settings of every test: no network, no display, the same Hypothesis examples each time."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import sys

import pytest
from hypothesis import settings

settings.register_profile("visionlora", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("visionlora")

MOST_THREADS = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write the golden files instead of comparing")


@pytest.fixture
def regenerate_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written instead of compared."""
    return bool(request.config.getoption("--regenerate-golden"))


def pytest_collection_finish() -> None:
    """Small models are slower on many threads; torch is left alone unless a test module imported it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(min(MOST_THREADS, torch.get_num_threads()))
