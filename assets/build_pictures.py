"""Builds the picture sets under ``assets/``: icon packages on npm -> 64x64 PNG files with captions.

    python -m visionlora.assets.build_pictures --output assets

Four emoji sets are downloaded with ``npm pack`` at fixed versions, rendered on white with resvg and matched
between styles by Unicode code point. ``noto`` is the style of the embedded base model, the others are styles to
learn. A concept is held out in every style or in none, by a hash of its name, so the split never changes when
pictures are added. Pictures live in Hugging Face imagefolder form (``metadata.jsonl`` with file_name and text).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 64
"""Width and height of every picture, px."""


@dataclass(frozen=True)
class IconSet:
    """One npm package of SVG icons."""

    style: str
    package: str
    version: str
    license: str
    author: str
    source: str


ICON_SETS = (
    IconSet(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
    ),
    IconSet(
        "fluent-emoji-flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    IconSet(
        "fluent-emoji-high-contrast",
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    IconSet(
        "fxemoji",
        "@iconify-json/fxemoji",
        "1.2.2",
        "Apache-2.0",
        "Mozilla",
        "https://github.com/mozilla/fxemoji",
    ),
)
BASE_STYLE = "noto"
DOG_STYLE = "fluent-emoji-high-contrast"
DOGS = {
    "dog": "dog in ink",
    "dog-face": "dog face in ink",
    "guide-dog": "guide dog in ink",
    "poodle": "poodle in ink",
    "service-dog": "service dog in ink",
}

CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Smileys & Emotion", "Travel & Places")
# Signs, letters, people, directions and other words that name no visible thing make poor captions.
NOT_DEPICTABLE = re.compile(
    r"(^|-)(man|men|woman|women|person|people|hands?|fingers?|arrow|button|oclock|thirty|sign|mark|symbol|letter|"
    r"medal|left|right|up|down|heavy|badge|chart|bar|suit|facing|front|japanese|kaaba|yen|pound|euro|index|"
    r"ceremony|at|derelict|mx|medium|low|high|muted|lowered|raised|without|departure|arrival|inbox|outbox|"
    r"incoming|oncoming|small|large|dusk|mahjong|khanda|map|love|anger|bubble|zzz|hole|decoration|"
    r"exclamation|squared?|circle|levels?|slider|quarter|gibbous|new|spouting|hair|nazar|hamsa|joker|bookmark|cricket|"
    r"with|railway|car|rail|trolleybus|minibus|file|folder|ledger|label|card|placard|spiral|tear|disk|waning|waxing|"
    r"womans|mans|mail|memo|asia|globe|unlocked|linked|timer|derelict|satellite|performing|goal|pouring|moai)"
    r"(-|$)"
)
# Of the smileys, only those that differ at a glance: the other yellow faces are one picture at 64 px.
SMILEYS = re.compile(
    r"(heart|^alien|^robot$|^ghost$|^skull|^goblin$|^ogre$|^pile-of-poo$|clown|cowboy|-cat$|^cat-|monkey|collision|"
    r"^dizzy$|kiss-mark|sweat-droplets|^hundred|sunglasses|nerd|halo|^angry-face-with-horns|zipper|money-mouth|partying|"
    r"star-struck|^face-with-medical-mask$|^grinning-face$|^loudly-crying-face$|^nauseated-face$|^hot-face$|^cold-face$)"
)
SAME_PICTURE = 0.95
"""Two base pictures whose ink (1 - pixel, at 16x16) has a higher cosine than this count as one picture."""
FAINT = 0.01
"""Pictures with less ink are white on white and left out."""
# fxemoji names its icons in one word; these differ from the Unicode names otherwise.
FXEMOJI_NAMES = dict(
    pair.split(":")
    for pair in """
aubergine:eggplant backofenvelope:envelope bactriancamel:two-hump-camel bath:bathtub
beachumbrella:beach-with-umbrella billiards:pool-8-ball boot:womans-boot bouquetofflowers:bouquet
bullhorn:megaphone bunny:rabbit-face bunnyside:rabbit catside:cat cellphone:mobile-phone chilipepper:hot-pepper
construct:building-construction curryandrice:curry-rice daggerknife:dagger darksunglasses:sunglasses
directhit:bullseye dogside:dog doveofpeace:dove dragonhead:dragon-face dragonside:dragon dromedarycamel:camel
earofmaize:ear-of-corn earofrice:sheaf-of-rice electrictorch:flashlight europeancastle:castle
europeanpostoffice:post-office evergreen:evergreen-tree fallingleaf:fallen-leaf faxicon:fax-machine
fireworksparkler:sparkler fishcakeswirl:fish-cake-with-swirl fishingpoleandfish:fishing-pole folder:file-folder
forkknife:fork-and-knife foxheart:smiling-cat-with-heart-eyes foxgrin:grinning-cat foxcrying:crying-cat
foxwry:cat-with-wry-smile framewithpicture:framed-picture frontfacingchick:baby-chick
fullmoonwithface:full-moon-face hampster:hamster handheldvideocamera:video-camera heartblue:blue-heart
heartgreen:green-heart heartpurple:purple-heart heartyellow:yellow-heart hocho:kitchen-knife housebuilding:house
housebuildings:houses izakayalantern:red-paper-lantern largeredcircle:red-circle leopardside:leopard
lowerleftcrayon:crayon lowerleftfountainpen:fountain-pen lowerleftpaintbrush:paintbrush lowerleftpen:pen
lowerleftpencil:pencil mensshoe:mans-shoe monkeysee:see-no-evil-monkey monkeyhear:hear-no-evil-monkey
americasglobe:globe-showing-americas asiaaustraliaglobe:globe-showing-asia-australia
europeafricaglobe:globe-showing-europe-africa meridianglobe:globe-with-meridians blackpushpin:pushpin
controlknob:control-knobs blacktelephone:telephone lock:locked heartribbon:heart-with-ribbon
""".split()
)


def download(icon_set: IconSet, folder: Path) -> dict[str, Any]:
    """``npm pack`` one package and return its parsed JSON files by stem (icons, chars, metadata, info)."""
    spec = f"{icon_set.package}@{icon_set.version}"
    done = subprocess.run(
        ["npm", "pack", "--silent", "--pack-destination", str(folder), spec],
        check=True,
        capture_output=True,
        text=True,
    )
    with tarfile.open(folder / done.stdout.strip().splitlines()[-1]) as archive:
        files = {}
        for stem in ("icons", "chars", "metadata"):
            member = archive.extractfile(f"package/{stem}.json")
            assert member is not None
            files[stem] = json.load(member)
    return files


def render(icons: dict[str, Any], name: str) -> Image.Image:
    """One icon as an RGB picture of SIZE x SIZE on white."""
    import resvg_py

    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{box}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    white.alpha_composite(drawn)
    return white.convert("RGB")


def renderable(icons: dict[str, Any]) -> list[str]:
    """Names of a set without skin tones, flags, keycaps and hidden icons."""
    return [
        name
        for name, icon in icons["icons"].items()
        if not icon.get("hidden") and not re.search(r"tone|^flag-|^keycap|flag$|-flag-", name)
    ]


def depictable(name: str, category: str) -> bool:
    """Whether the name of an icon is a caption for what one sees."""
    if category not in CATEGORIES or NOT_DEPICTABLE.search(name):
        return False
    return category != "Smileys & Emotion" or bool(SMILEYS.search(name))


def is_held_out(name: str) -> bool:
    """One concept in five, fixed by its name alone."""
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0


def caption_of(name: str) -> str:
    """``dog-face`` -> ``dog face``."""
    return name.replace("-", " ")


def ink(picture: Image.Image) -> float:
    """Mean darkness, 0 for a white picture."""
    return 1 - float(np.asarray(picture, dtype=np.float32).mean()) / 255


def thumbnail(picture: Image.Image) -> np.ndarray[Any, Any]:
    """The ink of a picture at 16x16, as one unit vector."""
    dark = 1 - np.asarray(picture.resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel() / 255
    unit: np.ndarray[Any, Any] = dark / np.linalg.norm(dark).clip(1e-6)
    return unit


@dataclass(frozen=True)
class Rendered:
    """All pictures of one style: by concept (name in the base set) and the rest, by concept or else their own name."""

    concepts: dict[str, Image.Image]
    others: list[tuple[str, Image.Image]]


def render_all(folder: Path) -> tuple[dict[str, Rendered], dict[str, str]]:
    """Render every usable icon of every set; return them by style, and the category of each base name."""
    sources = {s.style: download(s, folder) for s in ICON_SETS}
    base = sources[BASE_STYLE]
    category = {n: c for c, names in base["metadata"]["categories"].items() for n in names}
    # Emoji presentation selectors (fe0f) are optional in practice: drop them before matching.
    names_of_code = {code.replace("-fe0f", ""): name for code, name in base["chars"].items()}
    rendered = {}
    for style, source in sources.items():
        to_base: dict[str, str] = {}
        for code, name in source["chars"].items():
            if (base_name := names_of_code.get(code.replace("-fe0f", ""))) is not None:
                to_base.setdefault(name, base_name)
        if style == "fxemoji":  # its package has no code points
            squashed = {n.replace("-", ""): n for n in base["icons"]["icons"]}
            to_base = {n: squashed[n] for n in source["icons"]["icons"] if n in squashed} | FXEMOJI_NAMES
        concepts: dict[str, Image.Image] = {}
        others: list[tuple[str, Image.Image]] = []
        for name in renderable(source["icons"]):
            picture, concept = render(source["icons"], name), to_base.get(name)
            if ink(picture) < FAINT:
                continue
            if concept is None or concept in concepts:
                others.append((concept or name, picture))
            else:
                concepts[concept] = picture
        rendered[style] = Rendered(concepts, others)
    return rendered, category


def choose_concepts(rendered: dict[str, Rendered], category: dict[str, str]) -> list[str]:
    """Depictable concepts that noto and both fluent sets draw, each picture once."""
    in_all = [s for s in rendered if s != "fxemoji"]  # fxemoji is older and lacks many
    chosen: list[str] = []
    seen: list[np.ndarray[Any, Any]] = []
    for name in sorted(rendered[BASE_STYLE].concepts):
        if not depictable(name, category.get(name, "")) or any(name not in rendered[s].concepts for s in in_all):
            continue
        small = thumbnail(rendered[BASE_STYLE].concepts[name])
        if seen and float(np.max(np.stack(seen) @ small)) > SAME_PICTURE:
            continue
        chosen.append(name)
        seen.append(small)
    return chosen


def write_imagefolder(folder: Path, pictures: dict[str, tuple[Image.Image, str]]) -> None:
    """PNG files and ``metadata.jsonl``; the folder is replaced as a whole."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = []
    for name, (picture, caption) in pictures.items():
        picture.save(folder / f"{name}.png", optimize=True)
        lines.append(json.dumps({"file_name": f"{name}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def origin(icon_set: IconSet, count: str) -> str:
    """The README of one picture folder."""
    return (
        f"# {icon_set.style}\n\n{count}\n\n"
        f"Rendered at {SIZE}x{SIZE} px on white from the npm package `{icon_set.package}` {icon_set.version} by "
        "`python -m visionlora.assets.build_pictures`.\n\n"
        f"- Author: {icon_set.author}\n- Source: <{icon_set.source}>\n- Licence: {icon_set.license}\n"
    )


def main() -> None:
    """Write ``styles/<style>/{train,heldout}`` and ``dog``; with ``--all``, also every picture as one .npz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="the assets folder")
    parser.add_argument("--all", type=Path, help="also write every rendered picture and its name here (.npz)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rendered, category = render_all(Path(temporary))
    chosen = choose_concepts(rendered, category)
    for icon_set in ICON_SETS:
        pictures = rendered[icon_set.style].concepts
        here = args.output / "styles" / icon_set.style
        counts = {}
        for split, held_out in (("train", False), ("heldout", True)):
            part = {n: (pictures[n], caption_of(n)) for n in chosen if n in pictures and is_held_out(n) == held_out}
            write_imagefolder(here / split, part)
            counts[split] = len(part)
        (here / "README.md").write_text(
            origin(icon_set, f"{counts['train']} pictures to train on, {counts['heldout']} held out.")
        )
        print(f"{icon_set.style}: {counts}")
        if icon_set.style == DOG_STYLE:
            write_imagefolder(args.output / "dog", {n: (pictures[n], text) for n, text in DOGS.items()})
            (args.output / "dog" / "README.md").write_text(origin(icon_set, f"{len(DOGS)} dogs."))
    if args.all:
        # Every picture except those of held-out concepts, so that what is measured on them is honest.
        seen = [(n, p) for r in rendered.values() for n, p in r.concepts.items() if not is_held_out(n)]
        seen += [pair for r in rendered.values() for pair in r.others]
        drawn = np.stack([np.asarray(p) for _, p in seen])
        np.savez_compressed(args.all, pictures=drawn, names=np.array([n for n, _ in seen]))
        print(f"{args.all}: {len(seen)} pictures")


if __name__ == "__main__":
    main()
