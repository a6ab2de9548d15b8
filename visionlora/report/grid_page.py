"""The page of a grid: every picture in one file, with its recipe."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from visionlora.diffusion.axes import Axis, Sheet
from visionlora.diffusion.recipe import LoraUse, Recipe
from visionlora.report.html_page import html_page

STYLE = """body{font:15px system-ui,sans-serif;color:var(--ink);margin:24px;background:var(--back)}
h2{font-size:16px;margin:28px 0 8px} p{color:var(--soft);margin:4px 0 12px;max-width:70em}
.scroll{overflow:auto;max-height:92vh} table{border-collapse:collapse} td{padding:2px}
th{font-weight:500;font-size:13px;padding:4px 8px;text-align:left;max-width:12em;background:var(--back)}
thead th{position:sticky;top:0} tbody th{position:sticky;left:0}
img{width:var(--s,128px);display:block;cursor:zoom-in} img.small{image-rendering:pixelated}
dialog{border:0;padding:16px;max-width:92vw;color:var(--ink);background:var(--panel)}
dialog img{width:min(80vh,88vw);cursor:zoom-out}
dialog pre{white-space:pre-wrap;font-size:12px;max-width:80vh;user-select:all} ::backdrop{background:#000a}
label{font-size:13px;color:var(--soft)}
"""
SCRIPT = """
const d=document.querySelector('dialog');
document.querySelector('input').oninput=e=>document.body.style.setProperty('--s',e.target.value+'px');
d.onclick=e=>{if(e.target===d||e.target.tagName==='IMG')d.close()};
document.querySelectorAll('td img').forEach(i=>{
 const crisp=()=>{if(i.naturalWidth<256)i.classList.add('small')};
 i.complete?crisp():i.addEventListener('load',crisp);
 i.onkeydown=e=>{if(e.key==='Enter'||e.key===' '){e.preventDefault();i.onclick()}};
 i.onclick=()=>{const z=d.querySelector('img');z.src=i.src;z.className=i.className;
  d.querySelector('pre').textContent=i.title;d.showModal()}});
"""
BODY = """<p>{caption}</p>
<label>size <input type="range" min="48" max="512" value="128"></label>
{sheets}
<dialog><img alt=""><pre tabindex="0"></pre></dialog>"""
TABLE = '<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def caption_of(loras: Sequence[LoraUse], cells: Sequence[Recipe], axes: Sequence[Axis]) -> str:
    """The settings that are one in all cells, all that decide a picture.

    Args:
        loras: what is on every picture, before axes and the tags of prompts change it.
        cells: of the grid.
        axes: whose values stand beside the pictures.
    """
    recipe = cells[0]
    moving = {a.name for a in axes}
    moving |= {f for f in ("guidance_scale", "width", "height", "clip_skip") if len({getattr(r, f) for r in cells}) > 1}
    shown = {
        "prompt": recipe.prompt, "negative_prompt": recipe.negative_prompt, "model": recipe.model, "seed": recipe.seed,
        "steps": recipe.steps, "guidance_scale": f"{recipe.guidance_scale:g}", "scheduler": recipe.scheduler,
        "width": recipe.width, "height": recipe.height,
        "clip_skip": "" if recipe.clip_skip == 1 else recipe.clip_skip,
        "precision": "" if recipe.precision == "fp32" else recipe.precision,
        "init_image": Path(recipe.init_image).name,
        "strength": f"{recipe.strength:g}" if recipe.init_image else "",
        "mask": Path(recipe.mask).name,
        "controlnet": Path(recipe.controlnet).name,
        "control": Path(recipe.control).name,
        "control_scale": f"{recipe.control_scale:g}" if recipe.controlnet else "",
        "compose": recipe.compose if len(loras) > 1 else "",
    }  # fmt: skip
    text = [f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if name not in moving and value != ""]
    for use in loras:
        own = "" if f"lora:{use.name}.scale" in moving else f" {use.scale:g}"
        blocks = ",".join(f"{b}={f:g}" for b, f in use.blocks.items() if f"lora:{use.name}.{b}" not in moving)
        if own or blocks:
            text.append(use.name + own + (f"@{blocks}" if blocks else ""))
    return ", ".join(text)


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
            for column in sheet.columns:
                path, recipe = next(pictures)
                data = base64.b64encode(path.read_bytes()).decode()
                alt = html.escape(", ".join(part for part in (label, column, recipe.prompt) if part), quote=True)
                about = html.escape(recipe.described(), quote=True)
                cells.append(
                    f'<td><img src="data:image/png;base64,{data}" title="{about}" alt="{alt}" tabindex="0" role="button"></td>'
                )
            rows.append(f"<tr><th>{html.escape(label)}</th>{''.join(cells)}</tr>")
        title = f"<h2>{html.escape(sheet.title)}</h2>" if sheet.title else ""
        blocks.append(title + TABLE.format(head=head, rows="".join(rows)))
    body = BODY.format(caption=html.escape(caption), sheets="\n".join(blocks))
    return html_page("visionlora grid", STYLE, body, SCRIPT)
