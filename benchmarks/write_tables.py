"""Writes the recorded numbers into the documents that quote them, so that no number is copied by hand.

python benchmarks/write_tables.py          rewrite README.md, benchmarks/RESULTS.md, assets/emoji-64/README.md
python benchmarks/write_tables.py --check  exit 1 when a document does not say what the results say
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
GOALS = {"fluent-emoji-high-contrast": "40 %", "fluent-emoji-flat": "25 %", "fxemoji": "-"}


def results(name: str) -> dict[str, Any]:
    """One recorded result."""
    return dict(json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()))


def percent(value: float) -> str:
    """0.123 -> `12 %`."""
    return f"{100 * value:.0f} %"


def style_table() -> str:
    """What each style adapter did on held-out concepts."""
    found = results("style_transfer")
    lines = [
        "| style | held-out loss | seen as the style at scale 0 / 0.5 / 1 | concept kept at scale 1, top-1 / top-5 |",
        "|---|---|---|---|",
    ]
    for style in GOALS:
        r = found[style]
        seen = " / ".join(percent(r[f"scale_{s}"]["seen_as_this_style"]) for s in ("0", "0.5", "1"))
        kept = f"{percent(r['scale_1']['concept_top1'])} / {percent(r['scale_1']['concept_top5'])}"
        lines.append(f"| {style} | down by {percent(r['loss_reduction'])} | {seen} | {kept} |")
    accuracy = percent(found["classifier_accuracy"])
    note = (
        "\nOne rank-8 adapter per style, recipe `emoji64_style`, on "
        f"{found['fluent-emoji-flat']['held_out_pictures']} concepts never seen in the style "
        f"({found['fxemoji']['held_out_pictures']} for fxemoji). The classifier that judges the style was trained on "
        f"real pictures and is right on {accuracy} of the real held-out ones. `benchmarks/style_transfer.py`."
    )
    return "\n".join(lines) + "\n" + note


def fidelity_text() -> str:
    """How well the base model draws and codes."""
    r = results("prompt_fidelity")
    psnr = ", ".join(f"{style} {value:.1f}" for style, value in r["vae_psnr_db"].items())
    return (
        f"- Prompt fidelity of `emoji-64`: of {r['prompts']} captions of the base style, one picture each, the nearest "
        f"of all {r['pictures']} base pictures ({r['feature']}) has the right caption for {percent(r['top1'])} (top-1) "
        f"and {percent(r['top5'])} (top-5). {r['steps']} steps, guidance {r['guidance_scale']:g}.\n"
        f"- VAE, PSNR in dB on pictures it never saw: {psnr}.\n"
        "- `benchmarks/prompt_fidelity.py`."
    )


def machine_text(name: str) -> str:
    """Where a result was measured."""
    m = results(name)["machine"]
    return (
        f"Measured on {m['processor']}, {m['threads']} threads, torch {m['torch']}, diffusers {m['diffusers']}, "
        f"transformers {m['transformers']}."
    )


def documents() -> dict[Path, str]:
    """What each document should say between its markers."""
    both = f"{style_table()}\n\n{fidelity_text()}\n\n{machine_text('style_transfer')}"
    return {
        ROOT / "README.md": both,
        ROOT / "benchmarks" / "RESULTS.md": both,
        ROOT / "assets" / "emoji-64" / "README.md": f"{fidelity_text()}\n\n{machine_text('prompt_fidelity')}",
    }


def filled(text: str, numbers: str) -> str:
    """`text` with `numbers` between its markers."""
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{numbers}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    """Rewrites or checks."""
    stale = []
    for path, numbers in documents().items():
        text = path.read_text()
        if (new := filled(text, numbers)) != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(new)
    print(f"stale: {', '.join(stale)}" if stale else "All documents say what the results say.")
    if stale and "--check" in sys.argv:
        sys.exit(1)


if __name__ == "__main__":
    main()
