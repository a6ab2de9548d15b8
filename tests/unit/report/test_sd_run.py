"""What a run says of itself."""

import ast
from pathlib import Path

from visionlora.report.sd_run import usage


def test_the_snippet_draws_as_it_was_trained() -> None:
    text = usage("StableDiffusionPipeline", "base", Path("run"), "a dog", clip_skip=2, zero_terminal_snr=True)
    assert "pipe('a dog', clip_skip=1)" in text and "rescale_betas_zero_snr=True" in text
    assert "from diffusers import DDPMScheduler, StableDiffusionPipeline\n" in text and ast.parse(text)
    assert "clip_skip" not in usage("StableDiffusionPipeline", "base", Path("run"), "a dog")


def test_the_snippet_is_python_for_every_name(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / 'a "b" c\'s'
    folder.mkdir()
    monkeypatch.chdir(folder)
    text = usage("StableDiffusionPipeline", 'C:\\new\\"x"', Path(), 'a "dog"')
    found = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    assert {'C:\\new\\"x"', folder.name, 'a "dog"'} <= set(found)
