"""The report of `visionlora classify`: figures and pictures -> one HTML file that needs no network.

All text is escaped, pictures are inside the file, and a content security policy lets nothing run but the script that sorts
tables and enlarges pictures.
"""

from __future__ import annotations

import base64
import html
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from visionlora.data.images import printable
from visionlora.report.html_page import html_page
from visionlora.vision.metrics import AnyMetrics, Bin, Metrics

PICTURES = ("curves", "scores", "confusion", "reliability", "mistakes", "overlays")
"""What a report can show, by name."""
PROBE = "linear-probe"
METHODS = {PROBE: "linear probe", "full": "full fine-tuning"}
"""Names of contenders that read better otherwise."""
NO_NUMBER = "–"
MISTAKES = (
    "Pictures whose prediction is wrong and most certain. Look here first for wrong labels, doubles and classes that "
    "overlap."
)
CURVES = (
    "Loss over the steps. In training it is that of changed pictures, with smoothing, mixing and weights where these are set; "
    "on the validation pictures it is plain."
)
OVERLAYS = (
    "Warm is where it looks. Grad-CAM shows places whose features speak for the class; attention rollout those from which "
    "attention reaches the output, whatever the class. Both show where information comes from, not why."
)

STYLE = """*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);margin:0 auto;padding:24px;max-width:1120px}
h1{font-size:26px;line-height:1.25;margin:8px 0;overflow-wrap:anywhere} h2{font-size:19px;margin:44px 0 10px}
p,li{max-width:46em;overflow-wrap:anywhere} .soft,figcaption{color:var(--soft);font-size:14px} .verdict{font-size:18px}
.warn{background:var(--warn);border-left:4px solid var(--warn-line);padding:8px 14px;margin:12px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(158px,1fr));gap:12px}
.tile{background:var(--panel);border-radius:8px;padding:12px 14px} .tile b{display:block;font-size:24px;font-weight:600}
.tile span{display:block;color:var(--soft);font-size:13px}
.scroll{overflow:auto;max-height:36em;border:1px solid var(--line);border-radius:8px;margin:10px 0}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tr:last-child>td{border-bottom:0} .text{text-align:left} td.text{white-space:normal;overflow-wrap:anywhere;min-width:9em}
thead th{position:sticky;top:0;background:var(--panel);font-weight:500;color:var(--soft)}
th button{all:unset;cursor:pointer} th button:focus-visible{outline:2px solid var(--bar)}
th[aria-sort=ascending] button::after{content:" ↑"} th[aria-sort=descending] button::after{content:" ↓"}
.first td{font-weight:600} .none{color:var(--soft)}
.bar{position:relative;display:inline-block;width:130px;height:10px;background:var(--bar-back);border-radius:3px}
.bar i{position:absolute;inset:0 auto 0 0;background:var(--bar);border-radius:3px}
.bar u{position:absolute;top:4px;height:2px;background:var(--ink);min-width:2px}
figure{margin:10px 0} .frame{overflow:auto;background:#fff;border:1px solid var(--line);border-radius:8px;padding:8px}
.frame img{display:block;max-width:100%;margin:0 auto;cursor:zoom-in} .frame img.whole{max-width:none;cursor:zoom-out}
figcaption{margin-top:6px}
pre{font-family:ui-monospace,monospace;font-size:13px;background:var(--panel);border-radius:8px;padding:12px 14px;
overflow:auto;max-height:36em}
@media print{.scroll,pre{max-height:none;overflow:visible} h2{break-after:avoid} .warn,.tile{border:1px solid}}
"""

SCRIPT = """
for (const heading of document.querySelectorAll('table.sortable th')) heading.firstElementChild.onclick = () => {
  const table = heading.closest('table'), body = table.tBodies[0], column = heading.cellIndex;
  const rising = heading.getAttribute('aria-sort') !== 'ascending';
  for (const other of table.querySelectorAll('th')) other.removeAttribute('aria-sort');
  heading.setAttribute('aria-sort', rising ? 'ascending' : 'descending');
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = heading.classList.contains('text')
    ? (a, b) => value(a).localeCompare(value(b), undefined, {numeric: true})
    : (a, b) => value(a) - value(b);
  body.append(...[...body.rows].sort((a, b) => rising ? compare(a, b) : compare(b, a)));
};
for (const picture of document.querySelectorAll('.frame img')) picture.onclick = () => picture.classList.toggle('whole');
"""


@dataclass(frozen=True)
class Contender:
    """One way to the classifier, trained on the same pictures."""

    name: str
    """Of the method: lora, linear-probe, full, …"""
    trained_parameters: int
    """Beside the head."""
    base_parameters: int
    """Of the backbone."""
    val_score: float | None
    """What its best moment was chosen by; larger is better."""
    test: AnyMetrics | None
    """On the pictures that the report is about."""
    seconds: float
    """Of training."""
    file_bytes: int | None
    """Size of its file, where it has one."""


@dataclass(frozen=True, kw_only=True)
class ClassifyReport:
    """All that the page shows."""

    title: str
    model_id: str
    """The backbone, as a user names it."""
    adapter_name: str
    """File name of the adapter."""
    classes: tuple[str, ...]
    contenders: tuple[Contender, ...]
    """The first is what was trained, the others are for comparison."""
    metrics: AnyMetrics
    """Of the first contender."""
    temperature: float = 1.0
    """What the logits are divided by."""
    bins_before: tuple[Bin, ...] = ()
    """At temperature 1; empty with several labels per picture."""
    bins_after: tuple[Bin, ...] = ()
    ece_before: float | None = None
    """Expected calibration error at temperature 1; None with several labels per picture."""
    ece_after: float | None = None
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Pictures by side of the split, then by class."""
    notes: tuple[str, ...] = ()
    """What a person should know about the pictures: doubles, left out, converted."""
    warnings: tuple[str, ...] = ()
    """Shown on top."""
    config_yaml: str = ""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """PNG files by a name of `PICTURES`; a section without its picture is left out."""
    evaluated_on: str = "test"
    """test, or val when there is no test set."""


def report_page(report: ClassifyReport) -> str:
    """The whole page."""
    parts = [
        _top(report), _comparison(report), _tiles(report),
        _picture(report, "curves", "Learning curves", CURVES),
        _picture(report, "scores", "Score of the validation pictures", "By it the best moment was chosen, which is kept."),
        _classes_table(report), _confusion(report), _reliability(report),
        _picture(report, "mistakes", "Most confident mistakes", MISTAKES),
        _picture(report, "overlays", "What it looks at", OVERLAYS),
        _data(report), _settings(report),
    ]  # fmt: skip
    return html_page(_text(report.title), STYLE, "\n".join(part for part in parts if part), SCRIPT)


def verdict(report: ClassifyReport) -> str:
    """One sentence: how good it is, how sure that is, and what a linear probe reaches."""
    found, pictures = report.metrics, f"{report.metrics.pictures:,} {_side(report)} pictures"
    if isinstance(found, Metrics):
        interval = f"95 % interval {_percent(found.top1_low)} to {_percent(found.top1_high)}"
        text = f"{_percent(found.top1)} of {pictures} are classified correctly ({interval})"
    else:
        text = f"Mean average precision on {pictures} is {_percent(found.mean_average_precision)}"
    probe = _probe(report)
    return f"{text}; a linear probe reaches {_percent(_headline(probe.test))}." if probe and probe.test else f"{text}."


def _top(report: ClassifyReport) -> str:
    lines = [f"<h1>{_text(report.title)}</h1>", f'<p class="verdict">{_text(verdict(report))}</p>']
    lines.append(f'<p class="soft">{_text(report.adapter_name)} on {_text(report.model_id)}</p>')
    warnings = list(report.warnings)
    if report.evaluated_on == "val":
        warnings.append(
            "There are no test pictures: these figures are of the validation pictures, which also chose the best moment "
            "and the temperature. Expect less on new pictures; a test_share above 0 measures it."
        )
    return "\n".join(lines + [f'<p class="warn">{_text(warning)}</p>' for warning in warnings])


def _comparison(report: ClassifyReport) -> str:
    side, single = report.evaluated_on, isinstance(report.metrics, Metrics)
    names = ("top-1", "macro-F1") if single else ("mAP", "macro-F1")
    heads = ["Method", "Trained parameters", "Share of the backbone", "Score on val"]
    heads += [f"{name} on {side}" for name in names] + ["Time", "File"]
    rows = []
    for number, one in enumerate(report.contenders):
        share = one.trained_parameters / one.base_parameters if one.base_parameters else None
        cells = [
            _name_cell(METHODS.get(one.name, one.name)),
            _cell(one.trained_parameters, f"{one.trained_parameters:,}"),
            _cell(share, NO_NUMBER if share is None else _percent(share, 2)),
            _cell(one.val_score, _score(one.val_score)),
            _percent_cell(_headline(one.test) if one.test else None),
            _percent_cell(one.test.macro_f1 if one.test else None),
            _cell(one.seconds, _duration(one.seconds)),
            _cell(one.file_bytes, NO_NUMBER if one.file_bytes is None else _size(one.file_bytes)),
        ]
        rows.append(_row(cells, "" if number else "first"))
    caption = (
        "Trained parameters are counted without the head, which every method trains. Score on val is what the best moment "
        "was chosen by."
    )
    return f'<h2>Comparison</h2>{_table(heads, rows)}<p class="soft">{caption}</p>{_against_the_probe(report)}'


def _against_the_probe(report: ClassifyReport) -> str:
    """A warning when the probe is as good, a remark when it is nearly."""
    probe = _probe(report)
    if probe is None or probe.test is None:
        return ""
    ours, theirs = _headline(report.metrics), _headline(probe.test)
    name = METHODS.get(report.contenders[0].name, report.contenders[0].name)
    if ours <= theirs:
        return (
            f'<p class="warn">{_text(name)} does not beat the linear probe here ({_percent(ours)} against '
            f"{_percent(theirs)}). The probe is simpler and smaller: use it.</p>"  # what to try is among the warnings
        )
    if isinstance(report.metrics, Metrics) and theirs >= report.metrics.top1_low:
        return (
            '<p class="soft">The linear probe lies inside the 95 % interval: the lead may be chance. '
            "More test pictures would tell.</p>"
        )
    return ""


def _tiles(report: ClassifyReport) -> str:
    found = report.metrics
    if isinstance(found, Metrics):
        interval = f"{_percent(found.top1_low)} to {_percent(found.top1_high)}"
        tiles = [("top-1 accuracy", _percent(found.top1), interval)]
        tiles += [("top-5 accuracy", _percent(found.top5), "")] if found.top5 is not None else []
        tiles += [
            ("macro-F1", _percent(found.macro_f1), "mean over classes"),
            ("balanced accuracy", _percent(found.balanced_accuracy), "mean recall of the classes"),
            ("loss", f"{found.loss:.3f}", "negative log-likelihood, nats"),
            ("calibration error", _percent(_first(report.ece_after, found.ece)), _calibration(report)),
        ]
    else:
        tiles = [
            ("mean average precision", _percent(found.mean_average_precision), "mean over classes"),
            ("micro-F1", _percent(found.micro_f1), "over all labels"),
            ("macro-F1", _percent(found.macro_f1), "mean over classes"),
            ("all labels right", _percent(found.subset_accuracy), "share of the pictures"),
            ("loss", f"{found.loss:.3f}", f"cross-entropy, nats; T = {report.temperature:.2f}"),
        ]
    shown = [f'<div class="tile"><span>{n}</span><b>{v}</b><span>{about}</span></div>' for n, v, about in tiles]
    return f'<h2>Figures</h2><div class="tiles">{"".join(shown)}</div>'


def _calibration(report: ClassifyReport) -> str:
    before = "" if report.ece_before is None else f"{_percent(report.ece_before)} before; "
    return f"{before}T = {report.temperature:.2f}"


def _classes_table(report: ClassifyReport) -> str:
    found, recall = report.metrics, ("Recall", "Recall and its 95 % interval", "from", "to")
    wide = "The interval is Wilson's: it is wide for classes with few pictures, whose recall says little."
    if isinstance(found, Metrics):
        heads = ["#", "Class", "Pictures", "Precision", "F1", *recall]
        weakest = sorted(enumerate(found.per_class, 1), key=lambda e: (e[1].pictures == 0, e[1].recall, e[1].f1))
        rows = [
            _class_row(
                number, row.name, row.pictures, (row.precision, row.f1, row.recall),
                _bar_cell(row.recall, row.low, row.high), (row.low, row.high),
            )
            for number, row in weakest
        ]  # fmt: skip
        about = wide
    else:
        heads = ["#", "Class", "Positives", "Precision", "F1", "Average precision", *recall]
        by_precision = sorted(
            enumerate(found.per_class, 1), key=lambda e: (e[1].positives == 0, e[1].average_precision, e[1].f1)
        )
        rows = [
            _class_row(
                number, row.name, row.positives, (row.precision, row.f1, row.average_precision, row.recall),
                _bar_cell(row.recall, row.low, row.high), (row.low, row.high),
            )
            for number, row in by_precision
        ]  # fmt: skip
        about = (
            f"A label is given when its probability is above one half; average precision weighs all thresholds. {wide}"
        )
    return (
        f'<h2>Classes</h2><p class="soft">Weakest first; a click on a heading sorts. {about}</p>{_table(heads, rows)}'
    )


def _class_row(number: int, name: str, pictures: int, figures: Sequence[float], bar: str, ends: Sequence[float]) -> str:
    known = pictures > 0
    cells = [_cell(number, str(number)), _name_cell(name), _cell(pictures, f"{pictures:,}")]
    cells += [_percent_cell(value if known else None) for value in figures]
    cells += [bar if known else _cell(None, ""), *(_percent_cell(end if known else None) for end in ends)]
    return _row(cells, "" if known else "none")


def _confusion(report: ClassifyReport) -> str:
    about = "Rows are true classes, columns predictions; the shade is the share of the row, the number counts pictures."
    if not all(name.isascii() for name in report.classes):
        about += " A name that the chart's fonts lack appears as #n, its number in the table above."
    return _picture(report, "confusion", "Confusion matrix", about)


def _reliability(report: ClassifyReport) -> str:
    about = (
        "Bars on the diagonal mean that of the predictions with 80 % confidence, 80 % are right. "
        f"The temperature T = {report.temperature:.2f}, fitted on the validation pictures, changes no prediction"
    )
    if report.ece_before is not None and report.ece_after is not None:
        about += (
            f"; the expected calibration error goes from {_percent(report.ece_before)} to {_percent(report.ece_after)}"
        )
    return _picture(report, "reliability", "Reliability", f"{about}. The adapter carries it.")


def _data(report: ClassifyReport) -> str:
    sides = list(report.counts)
    totals = {side: sum(report.counts[side].values()) for side in sides}
    what = "Pictures" if isinstance(report.metrics, Metrics) else "Labels"
    rows = []
    for number, name in enumerate(report.classes, 1):
        numbers = [report.counts[side].get(name, 0) for side in sides]
        cells = [_cell(number, str(number)), _name_cell(name), *(_cell(n, f"{n:,}") for n in numbers)]
        rows.append(_row([*cells, _cell(sum(numbers), f"{sum(numbers):,}")]))
    splits = ", ".join(f"{side} {total:,}" for side, total in totals.items())
    lines = ["<h2>Data</h2>"]
    if sides:
        lines += [f"<p>{what}: {_text(splits)}.</p>", _table(["#", "Class", *sides, "all"], rows)]
    if report.notes:
        lines.append(f"<ul>{''.join(f'<li>{_text(note)}</li>' for note in report.notes)}</ul>")
    return "\n".join(lines) if len(lines) > 1 else ""


def _settings(report: ClassifyReport) -> str:
    name = report.adapter_name
    command = f"visionlora predict pictures/ --adapter {shlex.quote(name)}"
    code = (
        "from visionlora import load_classifier\n\n"
        f"classifier = load_classifier({name!r})\n"
        'prediction = classifier.predict(["picture.jpg"])[0]\n'
        "print(prediction.label, prediction.probability)"
    )
    use = f"<h2>Use</h2><pre>{_block(command)}</pre><pre>{_block(code)}</pre>"
    settings = f"<h2>Settings</h2><pre>{_block(report.config_yaml)}</pre>" if report.config_yaml.strip() else ""
    return settings + use


def _picture(report: ClassifyReport, name: str, title: str, about: str) -> str:
    if name not in report.pictures:
        return ""
    data = base64.b64encode(report.pictures[name]).decode()
    return (
        f'<h2>{title}</h2><figure><div class="frame"><img src="data:image/png;base64,{data}" alt="{_text(title)}"></div>'
        f"<figcaption>{_text(about)}</figcaption></figure>"
    )


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table that sorts; names stand in columns called Class or Method."""
    shown = []
    for head in heads:
        kind = ' class="text"' if head in ("Class", "Method") else ""
        shown.append(f"<th{kind}><button>{_text(head)}</button></th>")
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{"".join(shown)}</tr></thead>\n'
        "<tbody>" + "\n".join(rows) + "</tbody></table></div>"
    )


def _row(cells: Sequence[str], kind: str = "") -> str:
    opening = f'<tr class="{kind}">' if kind else "<tr>"
    return f"{opening}{''.join(cells)}</tr>"


def _name_cell(name: str) -> str:
    return f'<td class="text">{_text(name)}</td>'


def _cell(value: float | None, shown: str) -> str:
    """A number that sorts by its value; what is unknown comes before all others."""
    return f'<td data-value="{-1e9 if value is None else value:.10g}">{shown}</td>'


def _percent_cell(share: float | None) -> str:
    return _cell(share, NO_NUMBER if share is None else _percent(share))


def _bar_cell(share: float, low: float | None = None, high: float | None = None) -> str:
    interval = (
        "" if low is None or high is None else f'<u style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></u>'
    )
    return _cell(share, f'<span class="bar"><i style="width:{100 * share:.1f}%"></i>{interval}</span>')


def _probe(report: ClassifyReport) -> Contender | None:
    """The linear probe, when it is there for comparison."""
    return next((one for one in report.contenders[1:] if one.name == PROBE), None)


def _headline(found: AnyMetrics) -> float:
    return found.top1 if isinstance(found, Metrics) else found.mean_average_precision


def _side(report: ClassifyReport) -> str:
    return {"val": "validation"}.get(report.evaluated_on, report.evaluated_on)


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _score(value: float | None) -> str:
    """A score; negative ones are a negated loss."""
    if value is None:
        return NO_NUMBER
    return _percent(value) if value >= 0 else f"loss {-value:.3f}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _duration(seconds: float) -> str:
    """Time in the two largest units that matter.

    >>> _duration(8.24), _duration(134), _duration(7380)
    ('8.2 s', '2 min 14 s', '2 h 3 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count < 100e6 else f"{count / 1e6:,.0f} MB"


def _text(text: str) -> str:
    """Any text on one line, harmless in HTML and its attributes; a number is not torn from its percent sign."""
    return html.escape(printable(text), quote=True).replace(" %", "\u00a0%")


def _block(text: str) -> str:
    """Lines of text, each harmless."""
    return "\n".join(map(_text, text.expandtabs().split("\n")))
