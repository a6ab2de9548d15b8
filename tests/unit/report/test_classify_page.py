import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from visionlora.report.classify_page import (
    PICTURES,
    SCRIPT,
    ClassifyReport,
    Contender,
    report_page,
    verdict,
)
from visionlora.vision.metrics import (
    Metrics,
    evaluate,
    evaluate_multi_label,
    reliability,
)

CLASSES = ("cat", "<b>dog</b>", '"><script>alert(1)</script>', "猫", "no pictures")
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Checks that every tag is closed in turn and collects what a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th", "h1", "h2", "p", "pre", "li", "title", "script"):
            self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in reversed(self.open):
            if tag in self.texts:
                self.texts[tag][-1] += data.replace("\u00a0", " ")
                break

    def row(self, name: str) -> list[str]:
        """The cells of the first row that holds a cell `name`, up to its end."""
        cells = self.texts["td"]
        start = cells.index(name)
        return cells[start : start + 8]


def measured(right: int, n: int = 100) -> Metrics:
    labels = np.arange(n) % 4
    predicted = np.where(np.arange(n) < right, labels, (labels + 1) % 4)
    return evaluate(4 * np.eye(5)[predicted], labels, CLASSES)


def report(right: int = 90, probe: int | None = 70, **changes: Any) -> ClassifyReport:
    found = measured(right)
    contenders = [Contender("lora", 1000, 100_000, 0.95, found, 134.2, 250_000)]
    if probe is not None:
        contenders.append(Contender("linear-probe", 0, 100_000, 0.75, measured(probe), 3.0, None))
    logits, labels = np.random.default_rng(0).normal(size=(20, 5)), np.arange(20) % 4
    bins = reliability(logits, labels)
    kept = ClassifyReport(
        title="Cats & <dogs>",
        model_id="emoji-vit",
        adapter_name="adapter.safetensors",
        classes=CLASSES,
        contenders=tuple(contenders),
        metrics=found,
        temperature=1.25,
        bins_before=bins,
        bins_after=bins,
        ece_before=0.111,
        ece_after=0.022,
        counts={"train": {"cat": 1200, "猫": 3}, "test": {"cat": 25}},
        notes=("the same picture, used once: a<b>.jpg",),
        config_yaml="images: x\nmodel: <auto>\n",
        pictures=dict.fromkeys(PICTURES, b"\x89PNG"),
    )
    return dataclasses.replace(kept, **changes)


def multi_label() -> ClassifyReport:
    targets = np.array([[1, 0, 0, 1, 0], [0, 1, 1, 0, 0]] * 5)
    found = evaluate_multi_label(targets - 0.5, targets, CLASSES)
    contenders = (Contender("lora", 10, 100, -0.25, found, 1.0, None),)
    plain: dict[str, Any] = {"bins_before": (), "bins_after": (), "ece_before": None, "ece_after": None}
    return report(metrics=found, contenders=contenders, pictures={}, **plain)


def test_sections_come_in_order_and_every_tag_is_closed() -> None:
    page = Page(report_page(report()))
    assert page.texts["h1"] == page.texts["title"] == ["Cats & <dogs>"]
    assert page.texts["h2"] == [
        "Comparison",
        "Figures",
        "Learning curves",
        "Score of the validation pictures",
        "Classes",
        "Confusion matrix",
        "Reliability",
        "Most confident mistakes",
        "What it looks at",
        "Data",
        "Settings",
        "Use",
    ]


def test_a_section_without_its_picture_is_left_out() -> None:
    page = Page(report_page(report(pictures={"curves": b"x"}, config_yaml="", counts={}, notes=())))
    assert page.texts["h2"] == ["Comparison", "Figures", "Learning curves", "Classes", "Use"]
    assert [attrs["src"] for tag, attrs in page.tags if tag == "img"] == ["data:image/png;base64,eA=="]


def test_no_text_becomes_markup() -> None:
    page = Page(report_page(report(warnings=("<img src=x>",), adapter_name="a'\"<b>.safetensors")))
    tags = [tag for tag, _ in page.tags]
    assert set(tags).isdisjoint({"dogs", "auto"})
    assert tags.count("script") == 1
    assert tags.count("img") == len(PICTURES)
    assert '"><script>alert(1)</script>' in page.texts["td"] and "<b>dog</b>" in page.texts["td"]
    assert "<img src=x>" in page.texts["p"]
    assert page.texts["pre"][0] == "images: x\nmodel: <auto>\n"


def test_names_that_cannot_be_encoded_do_not_stop_the_page() -> None:
    page = report_page(report(title="bad\udcff\x00name"))
    assert "bad\\udcff\\x00name" in page.encode().decode()


@pytest.mark.parametrize("one", [report(), multi_label()], ids=["one label", "several labels"])
def test_the_page_needs_no_network_and_runs_only_its_own_script(one: ClassifyReport) -> None:
    text = report_page(one)
    assert not re.search(r"https?://|//cdn|@import|<link", text)
    assert all(attrs["src"].startswith("data:") for tag, attrs in Page(text).tags if attrs.get("src"))  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and f"<script>{SCRIPT}</script>" in text
    assert len(SCRIPT.strip().splitlines()) <= 16


def test_the_verdict_gives_the_interval_and_the_probe() -> None:
    assert verdict(report()) == (
        "90.0 % of 100 test pictures are classified correctly (95 % interval 82.6 % to 94.5 %); "
        "a linear probe reaches 70.0 %."
    )
    assert verdict(report(probe=None, evaluated_on="val")).startswith("90.0 % of 100 validation pictures")
    assert verdict(multi_label()) == "Mean average precision on 10 test pictures is 100.0 %."


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        (70, None),
        (88, "may be chance"),
        (
            90,
            "lora does not beat the linear probe here (90.0 % against 90.0 %). The probe is simpler and smaller: use it.",
        ),
        (None, None),
    ],
)
def test_the_probe_is_compared(probe: int | None, expected: str | None) -> None:
    told = [text for text in Page(report_page(report(probe=probe))).texts["p"] if "probe" in text][1:]
    assert (expected is None and not told) or (expected is not None and any(expected in text for text in told))


def test_the_comparison_has_the_cost_of_each_method() -> None:
    page = Page(report_page(report()))
    macro_f1 = f"{100 * measured(90).macro_f1:.1f} %"
    assert page.row("lora") == ["lora", "1,000", "1.00 %", "95.0 %", "90.0 %", macro_f1, "2 min 14 s", "0.25 MB"]
    assert page.row("linear probe")[1:4] == ["0", "0.00 %", "75.0 %"]
    assert page.row("linear probe")[6:] == ["3.0 s", "–"]


def test_figures_of_the_validation_pictures_are_named_so() -> None:
    page = Page(report_page(report(evaluated_on="val")))
    assert "top-1 on val" in page.texts["th"]
    assert any("There are no test pictures" in text for text in page.texts["p"])


def test_classes_stand_weakest_first_and_those_without_pictures_last() -> None:
    page = Page(report_page(report()))
    names = [text for text in page.texts["td"] if text in CLASSES][: len(CLASSES)]
    recalls = {row.name: (row.pictures == 0, row.recall) for row in report().metrics.per_class}  # type: ignore[union-attr]
    assert [recalls[name] for name in names] == sorted(recalls.values())
    assert names[-1] == "no pictures"
    assert page.row("no pictures")[1:5] == ["0", "–", "–", "–"]


def test_counts_are_summed_over_the_sides() -> None:
    page = Page(report_page(report()))
    last = len(page.texts["td"]) - page.texts["td"][::-1].index("cat") - 1
    assert page.texts["td"][last : last + 4] == ["cat", "1,200", "25", "1,225"]
    assert any(text == "Pictures: train 1,203, test 25." for text in page.texts["p"])


def test_several_labels_have_their_own_figures() -> None:
    page = Page(report_page(multi_label()))
    assert {"mAP on test", "Positives", "Average precision", "Recall and its 95 % interval"} <= set(page.texts["th"])
    assert page.texts["td"][page.texts["td"].index("cat") :][5:9] == ["100.0 %", "", "56.6 %", "100.0 %"], "recall"
    assert page.row("lora")[3] == "loss 0.250", "the negated loss is shown as a loss"
    assert "Reliability" not in page.texts["h2"]


def test_the_lines_of_use_can_be_copied() -> None:
    command, code = Page(report_page(report(adapter_name="my adapter's.safetensors"))).texts["pre"][1:]
    assert command == "visionlora predict pictures/ --adapter 'my adapter'\"'\"'s.safetensors'"
    compile(code, "page", "exec")
    assert 'load_classifier("my adapter\'s.safetensors")' in code
