"""Bad input to the real command: exit code, what a person reads, and that nothing was written."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from visionlora.loaders import save_adapter
from visionlora.lora.adapter import Adapter, AdapterModule


def check_refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, one message with all the words, no traceback."""
    code, out, err = result
    assert code == 2, (out, err)
    assert "Traceback" not in out + err
    for word in words:
        assert word in err, f"{word!r} is not in:\n{err}"


@pytest.fixture
def train(cli, tiny_model: Path, dogs: Path, tmp_path: Path):
    """Runs train-sd on the tiny model with small settings; keyword arguments become flags."""

    def run(*words: str, **flags: object) -> tuple[int, str, str]:
        options = {"images": dogs, "model": tiny_model, "output": tmp_path / "run", "steps": 1, "rank": 2, **flags}
        given = [x for k, v in options.items() if v is not None for x in (f"--{k.replace('_', '-')}", v)]
        return cli("train-sd", *given, "sample_steps=1", "sample_columns=1", *words)

    return run


CASES = {
    "no images": ({"images": None}, ["images is ''; name the folder of pictures to learn from: --images ./dog"]),
    "zero steps": ({"steps": 0}, ["steps is 0; it must be at least 1"]),
    "negative steps": ({"steps": -5}, ["steps is -5; it must be at least 1"]),
    "rank": ({"rank": 0}, ["rank is 0; it must be at least 1"]),
    "rank too large": ({"rank": 500}, ["Rank 500 is larger than layer", "choose a rank of at most 16"]),
    "alpha": ({"alpha": -1}, ["alpha is -1.0; it must be positive"]),
    "targets": ({"targets": "atn.q"}, ["Target 'atn.q' reaches no layer", "Did you mean 'attn.q'?"]),
    "linear probe": ({"method": "linear-probe"}, ["method is 'linear-probe'; ", "for `visionlora classify`"]),
    "precision": ({"precision": "fp8"}, ["precision is 'fp8'; Allowed: auto, bf16, fp16, fp32."]),
    "fp16 on a cpu": ({"precision": "fp16"}, ["precision is 'fp16', but training runs on the CPU"]),
    "resolution": ({"resolution": 33}, ["A resolution of 33 px does not fit", "Use 32 or 40 (native: 32)"]),
    "no such model": ({"model": "nowhere"}, ["There is no model at nowhere", "emoji-64"]),
    "no such recipe": ({"config": "emoji64_dogg"}, ["no config file or recipe 'emoji64_dogg'", "'emoji64_dog'?"]),
    "no such folder": ({"images": "dgo"}, ["dgo"]),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_options_are_explained_and_nothing_is_written(case: str, train, tmp_path: Path) -> None:
    flags, words = CASES[case]
    before = sorted(tmp_path.rglob("*"))
    check_refused(train(**flags), *words)
    assert sorted(tmp_path.rglob("*")) == before


STARTS = {
    "no such file": ({}, "start_from=nowhere.safetensors", "There is no adapter file at nowhere.safetensors"),
    "rank": ({"rank": "auto"}, "start_from=a.safetensors", "the ranks are the adapter's: leave rank=auto out"),
    "method": (
        {"method": "full"},
        "start_from=a.safetensors",
        "full cannot go on from an adapter: leave the method out",
    ),
    "other method": (
        {"method": "dora"},
        "start_from={lora}",
        "can only learn on by lora or rslora or lora+ or lora-fa",
    ),
    "a kind that does not learn": ({}, "start_from={loha}", "cannot learn on: it holds 1 of kind loha"),
    "text encoder": ({}, "start_from={text}", "also changes text_encoder, which this run would lose"),
    "no UNet": ({}, "start_from={text_alone}", "has no part for the UNet"),
    "a word without captions": ({}, "start_from={word}", "token is '<rex>', but no caption has it"),
    "another word": (
        {},
        "start_from={word} token=<dog>",
        "token is '<dog>', but {word} holds the learned word '<rex>', which this run would lose: leave token out",
    ),
    "two words": ({}, "start_from={words}", "holds the learned words <max>, <rex>; a run learns one word"),
    "more vectors": (
        {},
        "start_from={word} token_vectors=2",
        "token_vectors is 2, but '<rex>' in {word} has 1: leave it out",
    ),
    "a word of another family": ({}, "start_from={wide}", "cannot be learned on with"),
    "other layers": ({}, "start_from={strange}", "It was made for another base model"),
}


@pytest.mark.parametrize("case", STARTS)
def test_what_no_run_can_learn_on_from(case: str, train, tmp_path: Path) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    d, down = 16, torch.ones(2, 16)
    lora = AdapterModule.lora(down, down.t(), 2.0)
    loha = AdapterModule("loha", {f"hada_w{k}_{s}": down if s == "b" else down.t() for k in (1, 2) for s in "ab"}, 2.0)
    text = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": lora}
    of_word = {"text_encoder": torch.ones(1, d)}
    adapters = {
        "lora": Adapter({f"unet.{layer}": lora}),
        "loha": Adapter({f"unet.{layer}": loha}),
        "text": Adapter({f"unet.{layer}": lora, **text}),
        "text_alone": Adapter(text),
        "word": Adapter({f"unet.{layer}": lora}, embeddings={"<rex>": of_word}),
        "words": Adapter({f"unet.{layer}": lora}, embeddings=dict.fromkeys(("<rex>", "<max>"), of_word)),
        "wide": Adapter({f"unet.{layer}": lora}, embeddings={"<rex>": {"text_encoder": torch.ones(1, 2 * d)}}),
        "strange": Adapter({"unet.mid_block.nothing.to_q": lora}),
    }
    paths = {name: tmp_path / f"{name}.safetensors" for name in adapters}
    for name, adapter in adapters.items():
        save_adapter(adapter, paths[name])
    flags, word, said = STARTS[case]
    check_refused(train(*word.format(**paths).split(), **flags), said.format(**paths))
    assert not (tmp_path / "run").exists()


def test_an_unknown_setting_names_the_nearest(train) -> None:
    check_refused(train("lerning_rate=1"), "lerning_rate is not a setting. Did you mean 'learning_rate'?")


def test_an_empty_folder(train, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_refused(train(images=tmp_path / "empty"), "empty", ".png")
    assert not (tmp_path / "run").exists()


def test_every_bad_picture_is_named_with_its_remedy(train, dogs: Path, tmp_path: Path) -> None:
    (dogs / "notes.png").write_text("not a picture")
    Image.new("RGB", (64, 64), "red").save(dogs / "cut.jpg")
    (dogs / "cut.jpg").write_bytes((dogs / "cut.jpg").read_bytes()[:-60])
    check_refused(train(), "notes.png", "cut.jpg", "--skip-broken")
    assert not (tmp_path / "run").exists()


def test_a_caption_without_its_picture(train, dogs: Path, tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.png", "text": "a dog"} for i in (0, 1, 2, 7)]
    (dogs / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    check_refused(train(), "7.png")
    assert not (tmp_path / "run").exists()


def test_an_output_folder_with_a_run_is_left_alone(train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter.safetensors").write_bytes(b"precious")
    check_refused(train(), "run", "--output")
    assert (tmp_path / "run" / "adapter.safetensors").read_bytes() == b"precious"


def test_odd_but_usable_pictures_train_and_are_mentioned(train, dogs: Path, tmp_path: Path) -> None:
    Image.new("CMYK", (40, 32), (0, 200, 200, 0)).save(dogs / "cmyk.jpg")
    Image.new("I;16", (32, 32), 40000).save(dogs / "deep.png")
    Image.new("P", (32, 32), 3).save(dogs / "palette.png")
    Image.new("RGBA", (32, 32), (255, 0, 0, 100)).save(dogs / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 32), "blue").save(dogs / "turned.jpg", exif=exif)
    (dogs / "twin.png").write_bytes((dogs / "0.png").read_bytes())
    code, out, err = train()
    assert code == 0, err
    for word in ("cmyk.jpg", "CMYK", "deep.png", "16", "clear.png", "turned.jpg", "twin.png", "sks dog"):
        assert word in out, f"{word!r} is not in:\n{out}"
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["images"]) == 3 + 5


def test_letters_without_tokens_are_said(train, dogs: Path) -> None:
    (dogs / "0.txt").write_text("dog " + "".join(chr(0x4E00 + i) for i in range(22)))
    code, out, err = train("--skip-broken", "--dry-run")
    assert code == 0, err
    assert " has no tokens for \u4e00 \u4e01 " in out and " \u4e13 and 2 more: captions that differ in these" in out


FOLDER_CASES = {
    "a misspelt key": (
        'folders=[{path: dog, promt: "a dog"}]',
        "folders[0].promt is not a setting. Did you mean 'prompt'?",
    ),
    "images too": ("folders=[{path: dog}]", "folders are given too: leave one of them out"),
    "captions": ("captions=filname", "captions is 'filname'; Did you mean 'filename'?"),
    "names without words": ("captions=filename", "0.png has no words in its name; rename it after what it shows"),
    "misspelt masks": ("masks=alhpa", "masks is 'alhpa'; Did you mean 'alpha'?"),
    "no masks": ("masks=alpha", "0.png has no alpha channel to take a mask from; cut out what is to be learned"),
    "weight without masks": ("unmasked_weight=0.5", "it needs masks: give masks=alpha or masks=FOLDER"),
}


@pytest.mark.parametrize("case", FOLDER_CASES)
def test_captions_masks_and_folders(case: str, train, tmp_path: Path) -> None:
    word, message = FOLDER_CASES[case]
    check_refused(train(word), message)
    assert not (tmp_path / "run").exists()


def test_a_parquet_file_that_is_not_there(train, tmp_path: Path) -> None:
    check_refused(train(images=tmp_path / "x.parquet"), "There is no parquet file", "x.parquet")
