"""The page of a grid: every picture in one file, with its recipe."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from visionlora.diffusion.axes import Axis, Sheet
from visionlora.diffusion.recipe import Recipe

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>visionlora grid</title><style>
body{{font:15px system-ui,sans-serif;color:#1c1e21;margin:24px;background:#fff}}
h2{{font-size:16px;margin:28px 0 8px}} p{{color:#6a6f76;margin:4px 0 12px;max-width:70em}}
.scroll{{overflow:auto;max-height:92vh}} table{{border-collapse:collapse}} td{{padding:2px}}
th{{font-weight:500;font-size:13px;padding:4px 8px;text-align:left;max-width:12em;background:#fff}}
thead th{{position:sticky;top:0}} tbody th{{position:sticky;left:0}}
img{{width:var(--s,128px);display:block;cursor:zoom-in}} img.small{{image-rendering:pixelated}}
dialog{{border:0;padding:16px;max-width:92vw}} dialog img{{width:min(80vh,88vw);cursor:zoom-out}}
dialog pre{{white-space:pre-wrap;font-size:12px;max-width:80vh}} ::backdrop{{background:#000a}}
label{{font-size:13px;color:#6a6f76}}
</style></head><body><p>{caption}</p>
<label>size <input type="range" min="48" max="512" value="128"
 oninput="document.body.style.setProperty('--s',this.value+'px')"></label>
{sheets}
<dialog onclick="this.close()"><img alt=""><pre></pre></dialog><script>
const d=document.querySelector('dialog');
document.querySelectorAll('td img').forEach(i=>{{
 const crisp=()=>{{if(i.naturalWidth<256)i.classList.add('small')}};
 i.complete?crisp():i.addEventListener('load',crisp);
 i.onclick=()=>{{const z=d.querySelector('img');z.src=i.src;z.className=i.className;
  d.querySelector('pre').textContent=i.title;d.showModal()}}}});
</script></body></html>
"""
TABLE = '<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def caption_of(recipe: Recipe, axes: Sequence[Axis]) -> str:
    """The settings that no axis changes."""
    moving = {a.name for a in axes}
    shown = {
        "prompt": recipe.prompt, "model": recipe.model, "seed": recipe.seed, "steps": recipe.steps,
        "guidance_scale": f"{recipe.guidance_scale:g}", "scheduler": recipe.scheduler,
        "compose": recipe.compose if len(recipe.loras) > 1 else "",
    }  # fmt: skip
    text = [f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if name not in moving and value != ""]
    uses = [
        f"{u.name} {u.scale:g}" for u in recipe.loras if not any(m.startswith(f"lora:{u.name}.scale") for m in moving)
    ]
    return ", ".join([*text, *uses])


def page_of(sheets: Sequence[Sheet], drawn: Sequence[tuple[Path, Recipe]], caption: str) -> str:
    """The page, with every picture in it.

    Args:
        sheets: in order.
        drawn: picture and recipe of every cell, sheet by sheet and row by row.
        caption: what all have in common.
    """
    blocks, pictures = [], iter(drawn)
    for sheet in sheets:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in sheet.columns)
        rows = []
        for label in sheet.rows:
            cells = []
            for _ in sheet.columns:
                path, recipe = next(pictures)
                data = base64.b64encode(path.read_bytes()).decode()
                about = html.escape(f"{recipe.parameters()}\n\n{recipe.command()}", quote=True)
                cells.append(
                    f'<td><img src="data:image/png;base64,{data}" title="{about}" alt="{html.escape(recipe.prompt)}"></td>'
                )
            rows.append(f"<tr><th>{html.escape(label)}</th>{''.join(cells)}</tr>")
        title = f"<h2>{html.escape(sheet.title)}</h2>" if sheet.title else ""
        blocks.append(title + TABLE.format(head=head, rows="".join(rows)))
    return PAGE.format(caption=html.escape(caption), sheets="\n".join(blocks))
