"""What every HTML page of ours is: one file that needs no network, light or dark as the reader's screen is.

Pictures are inside the file, and a content security policy lets nothing be loaded and nothing run but the page's own script.
"""

from __future__ import annotations

import base64
import hashlib

from visionlora.report.curves import COLOURS, INK, SOFT

THEME = f""":root{{color-scheme:light dark;--ink:{INK};--soft:{SOFT};--back:#fff;--panel:#f5f6f7;--line:#e0e2e5;
--bar:{COLOURS[0]};--bar-back:#e4e8ec;--warn:#fff3e0;--warn-line:{COLOURS[1]}}}
@media (prefers-color-scheme:dark){{:root{{--ink:#e6e8ea;--soft:#a0a6ad;--back:#16181b;--panel:#1f2226;--line:#34383d;
--bar:{COLOURS[5]};--bar-back:#32373d;--warn:#33261a}}}}
"""
"""The colours, as variables of CSS."""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'">
<title>{title}</title><style>{style}</style></head><body>
{body}
<script>{script}</script></body></html>
"""


def html_page(title: str, style: str, body: str, script: str) -> str:
    """A whole page.

    Args:
        title: escaped, as the body is.
        style: CSS beside the theme.
        body: with pictures as data.
        script: the only one that runs; handlers in the body do not.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return PAGE.format(digest=digest, title=title, style=THEME + style, body=body, script=script)
