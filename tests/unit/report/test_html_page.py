"""What every page of ours has."""

import base64
import hashlib
import re

from visionlora.report.html_page import html_page


def test_a_page_is_light_or_dark_and_runs_its_own_script_alone() -> None:
    page, script = html_page("a &amp; b", "p{margin:0}", "<p>{as it is}</p>", "let a={};"), b"let a={};"
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert "default-src 'none'; img-src data:;" in page and f"script-src 'sha256-{digest}'" in page
    assert "<script>let a={};</script>" in page and "<p>{as it is}</p>" in page and "<title>a &amp; b</title>" in page
    named = re.findall(r"--[a-z-]+(?=:)", page.partition("prefers-color-scheme:dark")[2])
    assert {"--ink", "--soft", "--back", "--panel"} <= {*named} and not re.search(r"https?://", page)
