"""Settings from files, words and flags: precedence, conversion, and problems reported together."""

import dataclasses
from pathlib import Path

import pytest
import yaml

import visionlora as vl
from visionlora.config import (
    ClassifyConfig,
    FolderConfig,
    GenerateConfig,
    TrainSDConfig,
    budget_of,
    build,
    parse_words,
    read_yaml,
    recipe_names,
    to_yaml,
)
from visionlora.errors import ConfigError


def test_later_layers_win() -> None:
    config = build(TrainSDConfig, {"images": "a", "steps": 10, "rank": 4}, {"steps": 20}, {"steps": 30})
    assert (config.steps, config.rank) == (30, 4)


def test_dashes_and_underscores_mean_the_same() -> None:
    assert build(TrainSDConfig, {"images": "a", "learning-rate": 1}).learning_rate == 1.0


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("steps", "12", 12),
        ("steps", 12.0, 12),
        ("learning_rate", "2e-3", 2e-3),
        ("alpha", None, None),
        ("alpha", "none", None),
        ("flip", "yes", True),
        ("sample_prompts", "one", ("one",)),
        ("sample_prompts", ["one", "two"], ("one", "two")),
        ("prompt", 7, "7"),
        ("timestep_range", "0,600", (0, 600)),
        ("timestep_logit", "0, 1", (0.0, 1.0)),
        ("betas", "0.9,0.95", (0.9, 0.95)),
        ("betas", [0.9, 0.95], (0.9, 0.95)),
        ("seed", 9007199254740993, 9007199254740993),
        ("seed", "9007199254740993", 9007199254740993),
    ],
)
def test_values_are_converted(key: str, given: object, expected: object) -> None:
    assert getattr(build(TrainSDConfig, {"images": "a", key: given}), key) == expected


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TrainSDConfig, "huber"), (TrainSDConfig, "prior_weight"), (TrainSDConfig, "weight_decay"), (TrainSDConfig, "alpha"),
        (TrainSDConfig, "timestep_logit"), (TrainSDConfig, "guidance_scale"), (ClassifyConfig, "mixup"),
        (ClassifyConfig, "focal_gamma"), (ClassifyConfig, "class_weights"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300])
def test_numbers_are_finite(kind: type, name: str, value: float) -> None:
    given = {"timestep_logit": [0, value], "class_weights": {"a": value}}.get(name, value)
    with pytest.raises(ConfigError) as caught:
        build(kind, {"images": "a", name: given})
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith(f"- {name} is ") and line.endswith("; it must be a finite number, of at most 1e+30")


def test_learning_rates_are_bounded() -> None:
    with pytest.raises(ConfigError, match=r"learning_rate is 1000000\.0; it must be above 0 and at most 1000"):
        TrainSDConfig(images="a", learning_rate=1e6)


def test_a_tilde_is_the_home_folder_and_nothing_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainSDConfig(images="a", output="~/runs/./a", resume="auto")
    assert (config.output, config.resume) == (str(tmp_path / "runs" / "a"), "auto")
    config = build(TrainSDConfig, {"images": "a", "output": "", "resume": " "})
    assert (config.output, config.resume) == (None, None)


def test_a_number_alone_is_a_list_of_one() -> None:
    assert build(TrainSDConfig, {"images": "a", "optimizer": "sgd", "betas": 0.9}).betas == (0.9,)
    for value in (True, "0,many", "0,,1"):
        with pytest.raises(ConfigError, match=r"timestep_range is .*; expected a"):
            build(TrainSDConfig, {"images": "a", "timestep_range": value})


@pytest.mark.parametrize("seed", [-1, 99999999999999999999])
def test_seeds_are_those_that_torch_takes(seed: int) -> None:
    for kind in (TrainSDConfig, ClassifyConfig):
        with pytest.raises(ConfigError, match=f"seed is {seed}; it must be between 0 and"):
            build(kind, {"images": "a", "seed": str(seed)})


def test_unknown_keys_and_wrong_types_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        build(TrainSDConfig, {"lerning_rate": 1, "steps": "many", "rank": 3.5, "flip": 3, "batch_size": True})
    assert str(caught.value).splitlines() == [
        "These settings cannot be used:",
        "- lerning_rate is not a setting. Did you mean 'learning_rate'?",
        "- steps is 'many'; expected a whole number",
        "- rank is 3.5; expected a whole number or auto",
        "- flip is 3; expected true or false",
        "- batch_size is True; expected a whole number",
    ]


def test_values_out_of_range_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainSDConfig(images="", steps=0, rank=-1, learning_rate=0, precision="fp23", caption_dropout=2)
    assert str(caught.value).splitlines() == [
        "These settings cannot be used:",
        "- images is ''; name the folder of pictures to learn from: --images ./dog",
        "- steps is 0; it must be at least 1",
        "- rank is -1; it must be at least 1, or auto",
        "- learning_rate is 0.0; it must be above 0 and at most 1000",
        "- precision is 'fp23'; Did you mean 'fp32'?",
        "- caption_dropout is 2.0; it must be between 0 and 1",
    ]


def test_yaml_of_a_config_gives_it_back() -> None:
    config = TrainSDConfig(images="a: b", sample_prompts=("x, y", "z: 1"), alpha=3.5, prompt="sks 'dog'")
    assert build(TrainSDConfig, yaml.safe_load(to_yaml(config))) == config


def test_a_setting_that_a_file_gives_twice_is_refused(tmp_path: Path) -> None:
    """The last one counted, in silence."""
    (tmp_path / "c.yaml").write_text("batch_size: 4\nsteps: 10\nbatch-size: 8\n")
    with pytest.raises(
        ConfigError, match=r"c\.yaml, line 3: batch_size is given twice, first in line 1; leave one of them"
    ):
        read_yaml(str(tmp_path / "c.yaml"))


def test_an_unknown_key_near_none_names_a_few() -> None:
    with pytest.raises(ConfigError, match=r"zzz is not a setting. Allowed: alpha, .* and \d+ more\.") as caught:
        build(TrainSDConfig, {"zzz": 1, "images": "x"})
    assert len(str(caught.value)) < 300


def test_words_are_read_as_yaml() -> None:
    words = ["steps=5", "flip=true", "prompt=a = b", "betas=[0.9, 0.95]", "rank=auto"]
    assert parse_words(words, TrainSDConfig) == {
        "steps": 5, "flip": True, "prompt": "a = b", "betas": [0.9, 0.95], "rank": "auto",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="'steps' is not understood: settings are written key=value"):
        parse_words(["steps"], TrainSDConfig)


def test_a_list_that_is_given_twice_in_words() -> None:
    message = r"^sample_prompts is given twice, as 'a' and 'b': .* out, or write them as one list: sample_prompts='\[…, …\]'\.$"
    with pytest.raises(ConfigError, match=message):
        parse_words(["sample-prompts=a", "sample_prompts=b"], TrainSDConfig)
    assert parse_words(["warmup-steps=5", "steps=1", "warmup_steps=7"], TrainSDConfig) == {
        "steps": 1,
        "warmup_steps": 7,
    }


def test_a_folder_without_its_option_is_told_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"options start with --. Pictures are named so: --images {tmp_path}$"):
        parse_words([str(tmp_path)], ClassifyConfig)
    for word in ("a" * 5000, "a\0b"):  # no path can be so
        with pytest.raises(ConfigError, match=r"options start with --\.$"):
            parse_words([word], ClassifyConfig)


@pytest.mark.parametrize("text", ["rex dog #1 best", "10:30", "photo of x: best", "2024-13-45", "", "yes", "[a, b]"])
def test_texts_in_words_are_taken_as_they_are(text: str) -> None:
    assert parse_words([f"prompt={text}", f"token-initializer={text}"], TrainSDConfig) == {
        "prompt": text, "token-initializer": text,
    }  # fmt: skip


def test_a_date_that_does_not_exist_is_no_traceback(tmp_path: Path) -> None:
    assert parse_words(["betas=2024-13-45"], TrainSDConfig) == {"betas": "2024-13-45"}
    (tmp_path / "c.yaml").write_text("prompt: 2024-13-45\n")
    with pytest.raises(ConfigError, match="is not valid YAML: month must be in"):
        read_yaml(str(tmp_path / "c.yaml"))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompt is ''; write a caption, or leave it out"):
        TrainSDConfig(images="a", prompt="")


def test_every_recipe_is_a_valid_configuration() -> None:
    names = recipe_names()
    assert len(names) >= 2
    for name in names:
        kind = ClassifyConfig if name.endswith("_classes") else TrainSDConfig
        made = build(kind, read_yaml(name), {"images": "x"})
        assert made.steps is not None or made.epochs > 0


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "is not valid YAML at line"), ("- 1", "must hold `key: value` lines; it holds a list")],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(str(tmp_path / "c.yaml"))
    assert words in str(caught.value)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"There is no config file or recipe 'emoji_dog'\. Did you mean 'emoji64_dog'"
    ):
        read_yaml("emoji_dog")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_yaml(str(tmp_path / "c.yaml")) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8", ("rank", 8)), ("300k", ("parameters", 300_000)), ("2 MB", ("numbers", 524_288)), ("0", None), ("1.5", None),
     ("much", None)],
)  # fmt: skip
def test_budgets(text: str, expected: tuple[str, int] | None) -> None:
    assert budget_of(text) == expected


def test_rank_is_a_number_or_auto() -> None:
    assert build(TrainSDConfig, {"images": "x", "rank": "auto"}).rank == "auto"
    assert build(TrainSDConfig, {"images": "x", "rank": "4"}).rank == 4
    with pytest.raises(ConfigError, match="rank is 'some'; expected a whole number or auto"):
        build(TrainSDConfig, {"images": "x", "rank": "some"})
    with pytest.raises(
        ConfigError, match=r"rank_budget is 'lots'; write a mean rank \(8\), parameters \(300k\) or a size"
    ):
        TrainSDConfig(images="x", rank="auto", rank_budget="lots")


def test_weights_of_classes_are_words_or_a_mapping() -> None:
    def given(value: object) -> object:
        return build(ClassifyConfig, {"images": "x", "class_weights": value}).class_weights

    assert given("auto") == "auto" and given({"cat": 2, "a, b": "1.5"}) == {"cat": 2.0, "a, b": 1.5}
    with pytest.raises(ConfigError, match=r"class_weights is .*; expected a word or names with values"):
        build(ClassifyConfig, {"images": "x", "class_weights": [3.5]})


# Several folders of pictures.


def refused(settings: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(TrainSDConfig, settings)
    return str(caught.value).splitlines()[1:]


def test_folders_are_groups_of_settings() -> None:
    config = build(
        TrainSDConfig, {"folders": [{"path": "./dog", "repeats": "10", "prompt": "a sks dog"}, {"path": "b"}]}
    )
    assert config.folders == (FolderConfig("./dog", "a sks dog", 10), FolderConfig("b"))
    words = parse_words(["folders=[{path: a, captions: filename}]"], TrainSDConfig)
    assert build(TrainSDConfig, words).folders[0].captions == "filename"


def test_folders_are_written_and_read_again() -> None:
    config = TrainSDConfig(
        folders=(FolderConfig("a: b", "x, {y|z}", 3), FolderConfig("c", None, 1, "filename", "alpha")),
        sample_prompts=("q",),
    )
    text = to_yaml(config)
    assert "tuple" not in text
    assert build(TrainSDConfig, yaml.safe_load(text)) == config


def test_problems_of_folders_are_named_by_their_place() -> None:
    folders = [
        {"path": "./dog", "promt": "x"},
        "./cat",
        {"repeats": 0},
        {"path": "a", "repeats": "many", 3: 4},
        {"path": "a", "captions": "filname", "masks": " ", "prompt": ""},
        {"path": "a", "captions": "filename", "prompt": "x"},
    ]
    assert refused({"folders": folders, "lerning_rate": 1}) == [
        "- folders[0].promt is not a setting. Did you mean 'prompt'?",
        "- folders[1] is './cat'; expected names with values (path, prompt, repeats, captions, masks)",
        "- folders[2].path is ''; name a folder of pictures",
        "- folders[2].repeats is 0; it must be at least 1",
        "- folders[3].repeats is 'many'; expected a whole number",
        "- folders[3].3 is not a setting. Allowed: captions, masks, path, prompt, repeats.",
        "- folders[4].prompt is ''; write a caption, or leave it out",
        "- folders[4].captions is 'filname'; Did you mean 'filename'?",
        "- folders[4].masks is ' '; write alpha, the path of a folder or the column of a table",
        "- folders[5].captions is 'filename'; a prompt is given: leave one of them out",
        "- lerning_rate is not a setting. Did you mean 'learning_rate'?",
    ]
    assert refused({"folders": 3}) == ["- folders is 3; expected a list"]
    with pytest.raises(ConfigError, match=r"These settings cannot be used:\n- repeats is -1; it must be at least 1"):
        FolderConfig("a", repeats=-1)


def test_images_or_folders_but_not_both() -> None:
    one = [{"path": "a"}]
    assert refused({"images": "b", "folders": one}) == ["- images is 'b'; folders are given too: leave one of them out"]
    assert refused({}) == ["- images is ''; name the folder of pictures to learn from: --images ./dog"]
    assert refused({"folders": one, "prompt": "x", "captions": "filename", "masks": "alpha"}) == [
        "- prompt is 'x'; folders are given: write it into each of them that needs it",
        "- captions is 'filename'; folders are given: write it into each of them that needs it",
        "- masks is 'alpha'; folders are given: write it into each of them that needs it",
        "- captions is 'filename'; a prompt is given: leave one of them out",
    ]


def test_what_acts_beside_another_setting_alone_asks_for_it() -> None:
    """They were taken and had no effect."""
    beside = {
        "text_encoder_stop": 0.5,
        "text_encoder_learning_rate": 1e-4,
        "token_learning_rate": 0.1,
        "token_initializer": "dog",
        "token_vectors": 2,
        "basis_index": 1,
    }
    assert refused({"images": "a", **beside}) == [
        "- basis_index is 1; it is for init orthogonal, which has a basis: give that too, or leave it out",
        "- text_encoder_learning_rate is 0.0001; give train_text_encoder=true too, or leave it out",
        "- text_encoder_stop is 0.5; give train_text_encoder=true too, or leave it out",
        "- token_learning_rate is 0.1; it is of a new word: give a token too, or leave it out",
        "- token_initializer is 'dog'; it is of a new word: give a token too, or leave it out",
        "- token_vectors is 2; it is of a new word: give a token too, or leave it out",
    ]
    needed = {"train_text_encoder": True, "token": "<dog>", "init": "orthogonal"}
    assert build(TrainSDConfig, {"images": "a", **beside, **needed}).text_encoder_stop == 0.5


def test_captions_tags_and_masks() -> None:
    assert refused(
        {
            "images": "a",
            "captions": "name",
            "keep_tags": -1,
            "tag_dropout": 1,
            "caption_variants": 0,
            "unmasked_weight": 2,
        }
    ) == [
        "- captions is 'name'; Did you mean 'filename'?",
        "- unmasked_weight is 2.0; it must be between 0 and 1",
        "- unmasked_weight is 2.0; it needs masks: give masks=alpha or masks=FOLDER",
        "- keep_tags is -1; it must be 0 or more",
        "- tag_dropout is 1.0; it must be at least 0 and below 1",
        "- caption_variants is 0; it must be at least 1",
    ]
    folders = [{"path": "a", "masks": "alpha"}, {"path": "b"}]
    assert build(TrainSDConfig, {"folders": folders, "unmasked_weight": 0.1}).unmasked_weight == 0.1


def test_a_run_is_called_after_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "dog.v2").mkdir()
    assert TrainSDConfig(images=str(tmp_path / "dog.v2")).title == "dog.v2"
    assert TrainSDConfig(images="data/train.parquet").title == "train"
    assert ClassifyConfig(images="data/pets.csv").title == "pets", "not pets.csv, on the card"
    assert TrainSDConfig(folders=(FolderConfig("cats"), FolderConfig("dogs"))).title == "cats"


def test_paths_and_single_texts_from_python() -> None:
    config = TrainSDConfig(images=Path("dog"), output=Path("run"), validation=Path("v"), sample_prompts="a dog")
    assert (config.images, config.output, config.validation) == ("dog", "run", "v")
    assert config.sample_prompts == ("a dog",)
    assert ClassifyConfig(images=Path("pets"), baselines="full").baselines == ("full",)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        (TrainSDConfig, {"rank_budget": 4}, "4"),
        (TrainSDConfig, {"learning_rate": "1e-4"}, 1e-4),
        (TrainSDConfig, {"rank": "4"}, 4),
        (TrainSDConfig, {"steps": 100.0}, 100),
        (TrainSDConfig, {"betas": [0.9, 0.95]}, (0.9, 0.95)),
        (TrainSDConfig, {"timestep_range": "0,600"}, (0, 600)),
        (TrainSDConfig, {"prompt": "none"}, "none"),
        (TrainSDConfig, {"folders": [{"path": "a", "repeats": "2"}], "images": ""}, (FolderConfig("a", repeats=2),)),
        (ClassifyConfig, {"val_share": "0.2"}, 0.2),
        (ClassifyConfig, {"class_weights": {0: 2}}, {"0": 2.0}),
        (ClassifyConfig, {"cache": "no"}, False),
    ],
)
def test_python_takes_what_the_command_line_takes(kind: type, settings: dict, expected: object) -> None:
    found = getattr(kind(**{"images": "a", **settings}), next(iter(settings)))
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("kind", [TrainSDConfig, ClassifyConfig, GenerateConfig])
@pytest.mark.parametrize("value", [object(), {"a": object()}, [[]], b"x", 1j, True, None])
def test_no_value_from_python_gives_a_traceback(kind: type, value: object) -> None:
    first, *_ = fields = dataclasses.fields(kind)
    for field in fields:
        try:
            kind(**{first.name: "a", field.name: value})
        except ConfigError as e:
            assert f"- {field.name}" in str(e) or f"{field.name} has" in str(e) or first.name in str(e), e


def test_wrong_types_from_python_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        ClassifyConfig("a", steps="many", learning_rate=[1], cache=3, targets=b"attn")
    assert str(caught.value).splitlines()[1:] == [
        "- steps is 'many'; expected a whole number",
        "- targets is b'attn'; expected a word",
        "- learning_rate is [1]; expected a number",
        "- cache is 3; expected true or false",
    ]
    with pytest.raises(ConfigError, match="repeats is 'x'; expected a whole number"):
        FolderConfig(Path("a"), repeats="x")
    assert FolderConfig(Path("a")).path == "a"


def test_words_may_be_written_with_commas() -> None:
    config = ClassifyConfig("a", baselines="probe, full", trackers=("tensorboard",))
    assert config.baselines == ("probe", "full") and config.trackers == ("tensorboard",)


@pytest.mark.parametrize(
    ("kind", "own"),
    [(TrainSDConfig, {"prompt": "caf\udce9"}), (TrainSDConfig, {"sample_prompts": ("a", "caf\udce9")}),
     (GenerateConfig, {"prompts": "caf\udce9"})],
    ids=["prompt", "sample_prompts", "prompts"],
)  # fmt: skip
def test_a_prompt_that_is_no_text(kind: type, own: dict[str, object]) -> None:
    """It was a traceback of the tokenizer."""
    needed = {} if kind is GenerateConfig else {"images": "a"}
    with pytest.raises(ConfigError, match=rf"{next(iter(own))} is .*caf\\udce9.*, which is not UTF-8: check what the"):
        kind(**needed, **own)
    assert TrainSDConfig(images="caf\udce9").images == "caf\udce9", "the name of a folder may be so"


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_one_picture_cannot_be_mixed(name: str) -> None:
    with pytest.raises(ConfigError, match="mixup and cutmix mix the pictures of a batch"):
        ClassifyConfig(images="pets", batch_size=1, **{name: 0.5})
    assert ClassifyConfig(images="pets", batch_size=2, **{name: 0.5})


def test_what_a_drawing_is_constructed_with_is_of_the_right_types() -> None:
    assert GenerateConfig("a dog", {"dog": 0.8, Path("ink"): 0.5}).loras == (("dog", 0.8, {}), ("ink", 0.5, {}))
    made = GenerateConfig("a dog", [("dog", "0.8")], steps="30", compose_options={"tau": 5}, output="out")
    assert made.steps == 30 and made.loras == (("dog", 0.8, {}),) and made.output == Path("out")
    assert made.prompts == ("a dog",) and made.compose_options == (("tau", 5),)
    with pytest.raises(ConfigError) as told:
        GenerateConfig([[]], [("dog", "much", {})], steps="many", force="perhaps", mask=1)  # type: ignore[arg-type]
    assert str(told.value).splitlines()[1:] == [
        "- prompts is ([],); expected a word",
        "- loras is (('dog', 'much', {}),); expected a number",
        "- steps is 'many'; expected a whole number",
        "- mask is 1; expected a path",
        "- force is 'perhaps'; expected true or false",
    ]


@pytest.mark.parametrize("name", ["train_sd", "classify", "generate", "grid"])
@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("./dog", "a str"),
        ({"images": "./dog"}, "a dict"),
        (TrainSDConfig, "TrainSDConfig itself"),
        (FolderConfig("a"), "a FolderConfig"),
    ],
)
def test_what_is_no_configuration_is_told_how_to_make_one(name: str, given: object, what: str) -> None:
    """It ended in an AttributeError of its insides."""
    kind = {"train_sd": "TrainSDConfig", "classify": "ClassifyConfig"}.get(name, "GenerateConfig")
    more = ["steps=2,4"] if name == "grid" else []
    said = rf"^vl\.{name} takes a {kind}, and this is {what}: vl\.{name}\(vl\.{kind}\("
    with pytest.raises(ConfigError, match=said):
        getattr(vl, name)(given, *more)
