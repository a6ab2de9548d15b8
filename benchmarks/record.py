"""Results are recorded with the machine and the versions that gave them."""

from __future__ import annotations

import argparse
import gc
import json
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    import diffusers
    import torch
    import transformers

    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "peft": version("peft"),
    }


def record(name: str, results: Mapping[str, Any], machines: Mapping[str, Any] | None = None) -> Path:
    """Writes ``results/<name>.json`` and returns its path.

    Args:
        name: of the results.
        results: what was measured.
        machines: part -> the machine it was measured on, where that is not this one.
    """
    RESULTS.mkdir(exist_ok=True)
    path, here = RESULTS / f"{name}.json", machine()
    elsewhere = {part: m for part, m in (machines or {}).items() if m != here}
    more = {"machines": elsewhere} if elsewhere else {}
    path.write_text(json.dumps({**results, "machine": here, **more}, indent=1) + "\n")
    return path


Parts = Mapping[str, Callable[[], dict[str, Any]]]
"""What a benchmark measures, by name."""


def run_parts(name: str, parts: Parts, about: str | None, trial: Callable[[int], Parts] | None = None) -> None:
    """Measures the parts that the command line names, or all; prints and records each as it is done.

    Args:
        name: of the results.
        parts: what can be measured.
        about: the help.
        trial: gives the same parts with another number of steps; then `--steps` tries them, and nothing is recorded.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(parts))
    if trial is not None:
        parser.add_argument("--steps", type=int, help="try the parts with so many steps and record nothing")
    args = parser.parse_args()
    steps = getattr(args, "steps", None)
    measured = parts if trial is None or steps is None else trial(steps)
    known = results(name)
    machines = {part: known["machine"] for part in parts if part in known} | known.get("machines", {})
    for part in args.parts or parts:
        known[part] = measured[part]()
        print(part, known[part], flush=True)
        if measured is parts:
            machines.pop(part, None)
            print("recorded:", record(name, {k: v for k, v in known.items() if k in parts}, machines))
        gc.collect()


def results(name: str) -> dict[str, Any]:
    """What is recorded under a name; empty when nothing is."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}
