"""`visionlora check` and `visionlora configs`: what is printed, and the exit code."""

import subprocess
import sys
from pathlib import Path

from visionlora.config import recipe_names


def test_good_and_bad_files(cli, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("sample_prompts: [dog]\n")
    (tmp_path / "bad.yaml").write_text("evaluations: 3\nmethod: lorra\nrank: -1\n")
    assert cli("check", "good.yaml") == (0, "good.yaml: OK for train-sd.\n", "")
    code, out, err = cli("check", "bad.yaml", "good.yaml", "emoji64_dgo")
    assert (code, err) == (2, "")
    assert out.splitlines() == [
        "bad.yaml (for classify): 2 problems",
        "  line 2: method is 'lorra'. Did you mean 'lora'?",
        "  line 3: rank is -1; it must be at least 1, or auto",
        "good.yaml: OK for train-sd.",
        "There is no config file or recipe 'emoji64_dgo'. Did you mean 'emoji64_dog'?",
    ]


def test_a_method_that_does_not_exist(cli, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("evaluations: 3\nmethod: lorra\ninit: pizza\n")
    code, out, _ = cli("check", "bad.yaml")
    assert code == 2 and out.splitlines() == [
        "bad.yaml (for classify): 2 problems",
        "  line 2: method is 'lorra'. Did you mean 'lora'?",
        "  line 3: init is 'pizza'. Did you mean 'pissa'?",
    ]


def test_an_init_that_cannot_be(cli, tmp_path: Path) -> None:
    """eva ended long runs of checks with advice for Python, and methods with a start of their own took any."""
    for text, line in (
        ("init: eva", "init is 'eva'; it needs inputs that are measured before, with vl.input_spectra in Python: take kaiming "
         "or gaussian or orthogonal or pissa"),
        ("init: eva\nmethod: dora", "init is 'eva'; it needs inputs that are measured before, with vl.input_spectra in Python: "
         "take kaiming or gaussian or orthogonal"),
        ("init: orthogonal\nmethod: ia3", "init is 'orthogonal'; method ia3 has a start of its own: leave init out"),
        ("init: eva\nmethod: full", "init is 'eva'; method full has a start of its own: leave init out"),
        ("init: pissa\nmethod: dora", "init is 'pissa'; it starts both factors of a LoRA, which method dora has not so: take "
         "kaiming or gaussian or orthogonal"),
    ):  # fmt: skip
        (tmp_path / "bad.yaml").write_text(text)
        code, out, _ = cli("check", "bad.yaml")
        assert (code, out.splitlines()[1:]) == (2, [f"  line 1: {line}"])
        assert line in cli("train-sd", "--images", ".", "--config", "bad.yaml")[2]


def test_what_is_not_there_and_what_is_nearly_a_word(cli, tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog.safetensors").touch()
    (tmp_path / "bad.yaml").write_text(
        "images: dgo\nmasks: alhpa\nmodel: emoji-65\ntargets: atn,attn1,to_q,proj_in,conv3,attn.to_q,re:atn\n"
        "start_from: dogs.safetensors\nvalidation: dog\n"
    )
    (tmp_path / "more.yaml").write_text("folders: [{path: dog, masks: ./msk}, {path: cat}]\nmodel: ./mine\n")
    (tmp_path / "classes.yaml").write_text("table: a.csv\nmodel: vit_tiny\nweights: random\nimages: dog\n")
    code, out, err = cli("check", "bad.yaml", "more.yaml", "classes.yaml")
    assert (code, err) == (2, "")
    assert out.splitlines() == [
        "bad.yaml (for train-sd): 5 problems",
        "  line 1: images is 'dgo'; There is no folder dgo; did you mean dog?",
        "  line 2: masks is 'alhpa'; it is neither alpha nor a folder. Did you mean 'alpha'?",
        "  line 3: model is 'emoji-65'; there is no such folder. Did you mean 'emoji-64'?",
        "  line 4: targets is 'atn,attn1,to_q,proj_in,conv3,attn.to_q,re:atn'; there is no role 'atn'. Did you mean 'attn'?",
        "  line 5: start_from is 'dogs.safetensors'; There is no file dogs.safetensors; did you mean dog.safetensors?",
        "more.yaml (for train-sd): 3 problems",
        f"  line 1: folders[1].path is 'cat'; There is no folder cat; the folders in {tmp_path} are dog.",
        f"  line 1: folders[0].masks is './msk'; There is no folder msk; the folders in {tmp_path} are dog.",
        f"  line 2: model is './mine'; There is no folder mine; the folders in {tmp_path} are dog.",
        "classes.yaml (for classify): 1 problem",
        f"  line 1: table is 'a.csv'; There is no file a.csv; the folders and files in {tmp_path} are dog.",
    ]
    code, out, _ = cli("check", *recipe_names())
    assert code == 0 and all(" OK for " in line for line in out.splitlines())


def test_no_torch_is_loaded() -> None:
    code = "import sys; sys.argv = ['visionlora', 'check', 'emoji64_dog']\nfrom visionlora.cli.main import main\n"
    code += "try:\n    main()\nexcept SystemExit as e:\n    print(e.code)\n"
    code += "print(sorted(set(sys.modules) & {'torch', 'diffusers', 'PIL'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["emoji64_dog: OK for train-sd.", "0", "[]"], done.stderr


def test_the_list_of_recipes_names_their_command(cli) -> None:
    code, out, _ = cli("configs")
    lines = [line.split(None, 2) for line in out.splitlines()]
    assert code == 0 and ["emoji64_dog", "train-sd"] in [line[:2] for line in lines]
    assert ["vit_b16_classes", "classify"] in [line[:2] for line in lines] and all(line[2] for line in lines)
