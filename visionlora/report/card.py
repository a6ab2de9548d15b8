"""Writes the model card of a run: facts and samples -> Markdown with YAML front matter for the Hugging Face Hub.

The front matter follows https://huggingface.co/docs/hub/model-cards and, for ``widget``,
https://huggingface.co/docs/hub/model-cards-widgets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import yaml

TAGS = ("lora", "diffusers", "text-to-image", "template:sd-lora", "visionlora")
"""Of a style or subject; `CLASSIFIER_TAGS` of a classifier."""
CLASSIFIER_TAGS = ("lora", "image-classification", "visionlora")
GALLERY_COLUMNS = 4


def model_card(
    *,
    title: str,
    base_model: str,
    trigger: str | None,
    facts: Mapping[str, str],
    samples: Sequence[tuple[str, str]],
    usage: str,
    images_note: str,
    license: str | None,
    tags: Sequence[str] = TAGS,
) -> str:
    """The text of ``README.md`` in a run folder.

    Args:
        title: Name of the adapter.
        base_model: Hub id or name of the model the adapter belongs to.
        trigger: Words that call up what was learned, if there are any.
        facts: Rows of the table of facts, in order.
        samples: (prompt, path of the picture relative to the card).
        usage: Python code that loads the adapter and draws a picture.
        images_note: Where the training pictures come from.
        license: SPDX name of the licence, or None to leave it to the author.
        tags: for the Hub.
    """
    parts = [_front_matter(base_model, trigger, samples, license, tags), f"# {_inline(title)}"]
    if trigger:
        parts.append(f"Use {_code(trigger)} in the prompt.")
    if samples:
        parts += ["## Gallery", _gallery(samples)]
    parts += ["## Use", _fenced(usage)]
    if facts:
        rows = [f"| {_inline(name)} | {_inline(value)} |" for name, value in facts.items()]
        parts += ["## Training", "\n".join(["| | |", "|---|---|", *rows])]
    if images_note.strip():
        parts += ["## Training pictures", images_note.strip()]
    return "\n\n".join(parts) + "\n"


def _front_matter(
    base_model: str,
    trigger: str | None,
    samples: Sequence[tuple[str, str]],
    license: str | None,
    tags: Sequence[str],
) -> str:
    entries: dict[str, Any] = {"license": license} if license else {}
    entries |= {"base_model": base_model, "tags": list(tags)}
    if trigger:
        entries["instance_prompt"] = trigger
    if samples:
        entries["widget"] = [{"text": prompt, "output": {"url": picture}} for prompt, picture in samples]
    return f"---\n{yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=100)}---"


def _gallery(samples: Sequence[tuple[str, str]]) -> str:
    """A table of pictures with their prompts below, which every Markdown viewer shows."""
    width = min(GALLERY_COLUMNS, len(samples))
    lines = []
    for start in range(0, len(samples), width):
        part = samples[start : start + width]
        blank = [""] * (width - len(part))
        pictures = [f"![{_inline(prompt)}]({quote(picture)})" for prompt, picture in part]
        prompts = [_inline(prompt) for prompt, _ in part]
        lines.append(_row(pictures + blank))
        if start == 0:
            lines.append(_row([":---:"] * width))
        lines.append(_row(prompts + blank))
    return "\n".join(lines)


def _row(fields: Sequence[str]) -> str:
    return f"| {' | '.join(fields)} |"


def _inline(text: str) -> str:
    """Any text on one line, with every character that means something in Markdown or HTML made harmless."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Any text as inline code: the fence is longer than any run of backticks in it."""
    text = " ".join(text.split())
    fence = "`" * (_longest_backticks(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _fenced(code: str) -> str:
    fence = "`" * max(3, _longest_backticks(code) + 1)
    return f"{fence}python\n{code.strip()}\n{fence}"


def _longest_backticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
