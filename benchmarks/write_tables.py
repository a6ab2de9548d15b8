"""Writes the recorded numbers into the documents that quote them, so that no number is copied by hand.

python benchmarks/write_tables.py          rewrite README.md, benchmarks/RESULTS.md and the READMEs of the models
python benchmarks/write_tables.py --check  exit 1 when a document does not say what the results say
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import results

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
LEARNED = ("fluent-emoji-high-contrast", "fluent-emoji-flat", "fxemoji")


def percent(value: float) -> str:
    """0.123 -> `12 %`."""
    return f"{100 * value:.0f} %"


def style_table() -> str:
    """What each style adapter did on held-out concepts."""
    found = results("style_transfer")
    lines = [
        "| style | held-out loss | seen as the style at scale 0 / 0.5 / 1 | concept as the base draws it, at 0.5 / 1 |",
        "|---|---|---|---|",
    ]
    for style in LEARNED:
        r = found[style]
        seen = " / ".join(percent(r[f"scale_{s}"]["seen_as_this_style"]) for s in ("0", "0.5", "1"))
        kept = " / ".join(percent(r[f"scale_{s}"]["base_concept_top5"]) for s in ("0.5", "1"))
        lines.append(f"| {style} | down by {percent(r['loss_reduction'])} | {seen} | {kept} |")
    real = found["real_seen_as"]
    right = ", ".join(f"{style} {percent(real[style][style])}" for style in real)
    floor = ", ".join(f"{percent(real['noto'][style])} as {style}" for style in LEARNED)
    own = ", ".join(percent(found[style]["real_base_concept_top5"]) for style in LEARNED)
    note = (
        "\nOne rank-8 adapter per style, recipe `emoji64_style`, on "
        f"{found['fluent-emoji-flat']['held_out_pictures']} concepts never seen in the style "
        f"({found['fxemoji']['held_out_pictures']} for fxemoji). A classifier trained on real pictures judges the style; "
        f"it is right on real held-out pictures in these shares: {right}. Real pictures of the base style it takes, "
        f"wrongly, {floor}: that is what to expect at scale 0. The concept counts as kept when its picture in the base "
        "style is among the 5 nearest of 703 by the features of `emoji-vit`, which finds it from the style's own picture for "
        f"{own} of the concepts. `benchmarks/style_transfer.py`."
    )
    return "\n".join(lines) + "\n" + note


def fidelity_text() -> str:
    """How well the base model draws and codes."""
    r = results("prompt_fidelity")
    psnr = ", ".join(f"{style} {value:.1f}" for style, value in r["vae_psnr_db"].items())
    return (
        f"- Prompt fidelity of `emoji-64`: of {r['prompts']} captions of the base style, one picture each, the nearest "
        f"of all {r['pictures']} base pictures ({r['feature']}) has the right caption for {r['top1']:.1%} (top-1) "
        f"and {r['top5']:.1%} (top-5). {r['steps']} steps, guidance {r['guidance_scale']:g}.\n"
        f"- VAE, PSNR in dB on pictures it never saw: {psnr}.\n"
        "- `benchmarks/prompt_fidelity.py`."
    )


def auto_rank_text() -> str:
    """Measured ranks against one rank everywhere."""
    r = results("auto_rank")
    runs = sum(len(r[style]) for style in LEARNED)
    return (
        f"- `rank: auto` against the same rank everywhere, at equal parameters (mean rank {r['mean_rank']}, {r['targets']}, "
        f"{r['steps']} steps, {runs} runs over three styles and three seeds): held-out loss lower by "
        f"{1 - r['auto_over_uniform']:.1%} on average, lower in {r['auto_better_in']:.0%} of the runs. "
        "`benchmarks/auto_rank.py`."
    )


def core_rows() -> list[tuple[str, str, str, str]]:
    """Pairs of ours and theirs: what, where, ours, theirs."""
    found, rows = results("core"), []
    for part, where in (("unet-fp32", "SD 1.5 UNet, fp32"), ("unet-bf16", "SD 1.5 UNet, bf16")):
        if (r := found.get(part)) is None:
            continue
        step = r["step_over_two_forwards"]
        floor = f"PEFT {step['peft']:.2f}, frozen model {step['frozen']:.2f}"
        if (same := step.get("peft, adapters in the base's dtype")) is not None:
            floor += f", PEFT with bf16 adapters {same:.2f}"
        rows.append(("training step / two bare forwards", where, f"{step['ours']:.2f}", floor))
        if (products := step.get("ours, as in train-sd")) is not None:
            rows.append(("the same as train-sd runs it", where, f"{products:.2f}", floor))
        kept = r["kept_mib"]
        rows.append(("kept for backward, MiB", where, f"{kept['ours']:.0f}", f"PEFT {kept['peft']:.0f}"))
        dora = r["dora_over_lora"]
        rows.append(("DoRA step / LoRA step", where, f"{dora['ours']:.2f}", f"PEFT {dora['peft']:.2f}"))
        for k, t in r["active_over_bare"].items():
            rows.append((f"forward with {k} adapters / bare", where, f"{t['ours']:.2f}", f"PEFT {t['peft']:.2f}"))
        merge = r["merge"]
        rows.append(("merging 8 at new scales, s", where, f"{merge['ours_s']:.2f}", f"PEFT {merge['peft_s']:.2f}"))
    if (r := found.get("vit")) is not None:
        where, step, kept = "ViT-B/16, batch 8", r["step_over_two_forwards"], r["kept_mib_per_picture"]
        for word, ours, theirs in (
            ("q, v", "ours", "peft"),
            ("q, v, as classify runs it", "ours, as classify", "peft"),
            ("every linear layer", "our all", "peft all"),
        ):
            if ours not in step:  # measured before it was
                continue
            rows.append(
                (f"training step / two bare forwards, {word}", where, f"{step[ours]:.2f}", f"PEFT {step[theirs]:.2f}")
            )
            rows.append(
                (f"kept for backward, MiB a picture, {word}", where, f"{kept[ours]:.1f}", f"PEFT {kept[theirs]:.1f}")
            )
        if (predict := r.get("predict_over_bare")) is not None:
            rows.append(("predicting, adapter merged / bare model", where, f"{predict:.2f}", "timm 1"))
    for already, r in found.get("load", {}).items():
        count = already.removeprefix("from_")
        rows.append((f"reading and attaching a file, {count} there, s", "SD 1.5 UNet", f"{r['ours_s']:.3f}",
                     f"diffusers {r['diffusers_s']:.3f}"))  # fmt: skip
    return rows


def core_table() -> str:
    """The core beside PEFT and diffusers."""
    lines = ["| what | where | visionlora | peer |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in core_rows()]
    return "\n".join(lines) + f"\n\n{where_time_goes()}\n\n{looking()}\n\n`benchmarks/core.py`. " + machine_text("core")


def looking() -> str:
    """Memory of validation pictures beside that of learning."""
    sizes = [
        f"{pixels} px {m['learning']:.0f} ({m['checkpointed']:.0f} with gradient checkpointing), {m['looking_at_four']:.0f}"
        for pixels, m in results("core")["looking"].items()
    ]
    return (
        "Validation pictures are looked at four for one that is learned from. MiB above the weights of SD 1.5's UNet in fp32, "
        f"learning from one picture and looking at four: {'; '.join(sizes)}."
    )


def where_time_goes() -> str:
    """Why a training step takes more than two forward passes: seconds by kind of operation."""
    places = []
    for dtype, runs in results("core").get("kinds", {}).items():

        def shares(names: Sequence[str], digits: int, runs: Any = runs) -> str:
            return ", ".join(
                f"{kind} {' / '.join(f'{runs[name][kind]:.{digits}f}' for name in names)}" for kind in runs["ours"]
            )

        places.append(f"{dtype}: {shares(('one forward', 'eight adapters', 'frozen', 'ours'), 3)}")
    return (
        "Where the time goes, by torch's profiler: seconds of a bare forward / of one with eight adapters beside the weights / "
        f"of forward and backward of the frozen model / of our training step. {'. '.join(places)}."
    )


def mixing_text() -> str:
    """Several adapters at once."""
    r = results("mixing")
    lines = ["| what | fp32 | bf16 |", "|---|---|---|"]
    fp32, bf16 = r["speed-fp32"], r["speed-bf16"]
    for k in (1, 2, 4, 8):
        values = (part["over_bare"][f"stacked {k}"] for part in (fp32, bf16))
        lines.append(
            f"| forward with {k} adapters beside the weights / bare | " + " | ".join(f"{v:.2f}" for v in values) + " |"
        )
    values = (part["over_bare"]["2 of 100 stacked"] for part in (fp32, bf16))
    lines.append("| 100 attached, 2 active / bare | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    beside = r["beside-fp32"], r["beside-bf16"]
    for name, part, key in (
        ("8 adapters merged / bare, in turns with the two below", "over_bare", "merged 8"),
        ("8 adapters beside the weights / bare", "over_bare", "stacked 8"),
        ("8 adapters in diffusers (PEFT) / bare", "over_bare", "diffusers 8"),
        ("8 pictures, each with another adapter, in one batch / the same batch without", "eight_pictures_over_bare", "batched"),
        ("the same one by one in diffusers", "eight_pictures_over_bare", "diffusers"),
    ):  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(f"{found[part][key]:.2f}" for found in beside) + " |")
    load, scales, points = r["load"], r["scales"], r["interference"]
    lines.append(
        f"\nA file is read and added, at scale 0, to a mix in which two act in {load['first_ten_s']:.3f} s, the first ten of a "
        f"hundred, and in {load['last_ten_s']:.3f} s, the last ten. "
        "Merged adapters are in the weights, and the layers run as the base's own. "
        f"New scales for 8 merged ones: {scales['ours_s']:.2f} s; diffusers' "
        f"set_adapters and fuse_lora {scales['diffusers_s']:.2f} s ({scales['ours_over_diffusers']:.2f} x). SD 1.5 UNet, 32x32 "
        "latents, rank 8."
    )
    lines.append(
        "\nStyles composed, each at 0.5 (`switch`, `composite` and `k-lora` at 0.7; of three, two thirds of that), on "
        f"{r['quality']['pictures']} concepts that no adapter has seen: seen as one of the styles / as the less seen of them / "
        "concept as the base draws it (top-5).\n"
    )
    quality = {pair: found for pair, found in r["quality"].items() if pair != "pictures"}
    names = list(next(iter(quality.values())))
    lines += ["| styles | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for pair, found in quality.items():
        cells = [
            "–"
            if e is None
            else " / ".join(f"{100 * e[what]:.0f}" for what in ("learned", "least_seen", "base_concept_top5"))
            for e in (found.get(name) for name in names)
        ]
        lines.append(f"| {pair} | " + " | ".join(cells) + " |")
    inits = r["orthogonal"]
    shown = {}
    for init in ("kaiming", "orthogonal"):
        e, both = inits[init], inits[init]["sum"]
        shown[init] = (
            f"inputs in common {e['inputs']:.2f}, cosine {e['cosine']:.2f}, sum seen as a style of the two "
            f"{both['learned']:.0%}, as the less seen {both['least_seen']:.0%}, concept kept {both['base_concept_top5']:.0%}"
        )
    lines.append(
        f"\nTrained apart for {inits['steps']} steps ({' and '.join(inits['styles'])}): {shown['kaiming']}; with "
        f"`init: orthogonal` on different parts of the basis: {shown['orthogonal']}. The inputs hardly meet then, and the "
        "styles mix no better."
    )
    correlation = {what: points[f"rank_correlation_{what}"] for what in ("shared", "interference", "strength")}
    lines.append(
        f"\nPredicted against measured interference, {len(points['points'])} pairs of blocks on `emoji-64`, rank correlation: "
        f"shared energy {correlation['shared']:.2f}, |2⟨ΔW₁, ΔW₂⟩| {correlation['interference']:.2f}, strength alone "
        f"{correlation['strength']:.2f}.\n\n`benchmarks/mixing.py`. " + machine_text("mixing")
    )
    return "\n".join(lines)


def formats_text() -> str:
    """Adapter files."""
    r = results("formats")
    wrong, listing, merge = r["dynamic"], r["listing"], r["merge_1280"]
    return (
        f"- A kohya file as its dynamic resize leaves it (ranks 2 to 16, an alpha per module) on the layers of SD 1.5: of "
        f"{wrong['modules']} modules, diffusers applies {wrong['diffusers']} with another ΔW than the file says (more than 1 % "
        f"off), visionlora {wrong['visionlora']}.\n"
        f"- A table of {listing['files']} adapters as large as SDXL's ({listing['tensors']:,} tensors each), headers alone: "
        f"{listing['s']:.1f} s.\n"
        f"- {merge['adapters']} adapters of rank {merge['rank']} on a 1280x1280 layer merged exactly: "
        f"{1000 * merge['exact_s']:.1f} ms; to rank {merge['rank']} by QR and a small SVD: "
        f"{1000 * merge['to_rank_16_s']:.1f} ms; one dense SVD of that layer: {1000 * merge['dense_svd_s']:.0f} ms.\n"
        "- `benchmarks/formats.py`. " + machine_text("formats")
    )


def one_picture_text() -> str:
    """LoRA and T-LoRA on one picture."""
    if not (found := results("one_picture")):
        return ""
    lines = [
        "| learned from one picture | pictures of it differ from it by | other concepts kept | overrun by it |",
        "|---|---|---|---|",
    ]
    for method, m in found["means"].items():
        lines.append(
            f"| {method} | {m['difference']:.3f} | {percent_of(m['kept_top5'])} | {percent_of(m['overrun'])} |"
        )
    s = found["settings"]
    about = (
        f"Means over {len(found['runs'])} subjects in styles that `emoji-64` does not know, {s['steps']} steps of "
        f"{s['batch_size']} pictures, rate {s['learning_rate']:g}. Difference: mean of the pixels, 0 to 1. Kept: the concept "
        "is among the 5 nearest base pictures by `emoji-vit`; overrun: the subject is nearest. `benchmarks/one_picture.py`. "
    )
    low, high, timed = (found["means"][m] for m in ("LoRA, rank 4", "LoRA, rank 8", "T-LoRA, rank 4 to 8"))
    between = all(
        min(low[key], high[key]) <= timed[key] <= max(low[key], high[key]) for key in ("difference", "kept_top5")
    )
    verdict = (
        "T-LoRA lies between the two ranks in both: on this small model it is no better trade than a rank between. "
    )
    return "\n".join(lines) + "\n\n" + (verdict if between else "") + about + machine_text("one_picture")


def classify_row(title: str, r: dict[str, Any], automatic: dict[str, Any] | None = None) -> str:
    """One data set: adapter, with ranks measured, probe and full fine-tuning."""
    cells = [title, f"{r['test_pictures']:,}"]
    for e in (r["lora"], automatic and automatic["lora"], r["linear-probe"], r["full"]):
        if e is None:
            cells.append("–")
            continue
        share = "the head" if not e["trained_share"] else percent_of(e["trained_share"])
        cells.append(f"{mean_of(e)} ({share}, {e['file_bytes'] / 2**20:.1f} MiB)")
    return "| " + " | ".join(cells) + " |"


def mean_of(found: dict[str, Any]) -> str:
    """Of seeds, with their spread, in percent."""
    return f"{100 * found['mean']:.1f} ± {100 * found['spread']:.1f}"


def percent_of(share: float) -> str:
    """0.0123 -> `1.2 %`, 1 -> `100 %`."""
    return f"{100 * share:.0f} %" if share > 0.1 else f"{100 * share:.1f} %"


def retrieval_text() -> str:
    """What the embedded backbone knows before it is taught."""
    r = results("classify")["retrieval"]
    pairs = [
        f"{style} {percent(r['found'][style])} ({percent(r['found'][style + ', random weights'])} with random weights)"
        for style in LEARNED
    ]
    return (
        f"- `emoji-vit`, {r['parameters'] / 1e6:.1f} M parameters, {r['bytes'] / 2**20:.1f} MiB: for concepts it never saw, "
        f"the nearest of all held-out pictures of the base style is that of the same emoji for: {', '.join(pairs)}."
    )


def classify_text() -> str:
    """The classifier."""
    r = results("classify")
    lines = [
        "| top-1, mean ± spread of 3 seeds (trained share of the backbone, file) | test pictures | LoRA | LoRA, rank auto | "
        "linear probe | full fine-tuning |",
        "|---|---|---|---|---|---|",
        classify_row(
            f"scikit-learn's digits, half of them; label smoothing {r['digits']['settings'].get('label_smoothing', 0):g}",
            r["digits"],
            r["digits-auto"],
        ),
        classify_row("style of an emoji (4), concepts never seen", r["styles"]),
    ]
    p, i, rank = r["predict"], r["index"], r["rank"]
    styles = [r["styles"][name] for name in ("lora", "linear-probe", "full")]
    lines += [
        "",
        "The best moment is chosen on validation pictures, and the untrained start (the linear probe) is one of the moments: "
        "where neither adapter nor full fine-tuning gets better on them, all three are the probe"
        + (", as for the styles." if len({tuple(e["top1"]) for e in styles}) == 1 else "."),
        "",
        f"- `predict`, adapter merged: {p['one_over_bare']:.2f} x the time of the bare timm model with one adapter attached, "
        f"{p['eight_over_bare']:.2f} x with eight; a batch of {p['batch']} pictures that asks for all eight "
        f"{p['mixed_batch_over_bare']:.2f} x; switching tasks {p['switch_ms']:.1f} ms.",
        f"- {i['files']:,} files of 64 px: indexed in {i['index_s']:.1f} s, decoded and checked once in "
        f"{i['first_check_s']:.0f} s, known again in {i['second_check_s']:.1f} s; "
        f"memory grew by {i['memory_grew_mib']:.0f} MiB where the decoded pictures "
        f"take {i['decoded_mib']:.0f}.",
        f"- `rank: auto` against rank 2 everywhere on the digits, equal parameters, {len(rank['runs'])} seeds: test loss "
        f"{rank['loss_auto_over_uniform']:.2f} x, lower in {rank['lower_loss_in']} of {len(rank['runs'])}, top-1 "
        f"{100 * rank['top1_auto_minus_uniform']:+.1f} points.",
        retrieval_text(),
        "- `benchmarks/classify.py`. " + machine_text("classify"),
    ]
    return "\n".join(lines)


def whole_runs() -> list[tuple[str, dict[str, Any], str, str]]:
    """Of train-sd beside diffusers' loop, those that were measured: where, all that was, and what ours and theirs took."""
    parts = {"sd15-fp32": "SD 1.5's shapes, fp32", "sd15-bf16": "SD 1.5's shapes, bf16", "emoji-64": "`emoji-64`, fp32"}
    found = []
    for part, where in parts.items():
        if "seconds" in (r := results("train_sd").get(part, {})):
            own, peer = (f"{r['seconds'][who]:.0f} s, {r['peak_mib'][who]:,.0f} MiB" for who in ("ours", "peer"))
            found.append((where, r, own, peer))
    return found


def train_sd_rows() -> list[str]:
    """One line for each whole run."""
    rows = []
    for where, r, own, peer in whole_runs():
        ratio = r["ours_over_peer"]
        runs = f"{r['turns']} runs" if r["turns"] > 1 else "one run"
        rows.append(
            f"| {where}, {r['resolution']} px, batch {r['batch_size']}, {r['steps']} steps, {runs} | {own} | {peer} | "
            f"{ratio['seconds']:.2f} | {ratio['peak']:.2f} |"
        )
    return rows


def train_sd_notes() -> list[str]:
    """What the table of whole runs means, and the losses."""
    found, notes = results("train_sd"), []
    for part, r in found.items():
        if "left_out" in r:
            notes.append(f"- `{part}` was not measured: {r['left_out']}.")
    if (q := found.get("quality")) is not None:
        best = ", ".join(f"{style} {q[style]['best']['rate']:g} {q[style]['best']['schedule']}" for style in LEARNED)
        notes.append(
            f"- Held-out loss of train-sd's defaults after {q['steps']['ours']} steps over that of the peer after "
            f"{q['steps']['peer']}, {q['compared']} runs (three styles of `emoji-64`, three seeds): {q['ours_over_peer']:.2f} "
            f"with the rate of the example, 1e-4 (not higher in {q['ours_lower_than_peer_in']}); "
            f"{q['ours_over_best_peer']:.2f} with the best of {len(q[LEARNED[0]]['sweep'])} rates and schedules, chosen on the "
            f"held-out pictures ({best}; not higher in {q['ours_lower_than_best_peer_in']})."
        )
    return notes


def train_sd_text() -> str:
    """Whole runs of train-sd; empty when none was measured."""
    if not results("train_sd"):
        return ""
    lines = [
        "| from 8 pictures to an adapter file | visionlora | diffusers + PEFT | time, ours / theirs | peak memory |",
        "|---|---|---|---|---|",
        *train_sd_rows(),
        "",
        "Whole processes, in turns, medians; ours with an empty cache. Both get the same pictures, captions, steps, batch, "
        "rank 8 on q, k, v, out, rate, precision and threads, and neither draws samples. The peer is the loop that diffusers "
        "documents for `train_text_to_image_lora`. SD 1.5's weights are random.",
        "",
        *train_sd_notes(),
        "- `benchmarks/train_sd.py`. " + machine_text("train_sd"),
    ]
    return "\n".join(lines)


def machine_text(name: str) -> str:
    """Where a result was measured, and where those of its parts that were measured elsewhere."""

    def words(machine: dict[str, Any]) -> str:
        versions = ", ".join(f"{library} {machine[library]}" for library in ("torch", "diffusers", "transformers"))
        return f"on {machine['processor']}, {machine['threads']} threads, {versions}"

    found = results(name)
    elsewhere: dict[str, list[str]] = {}
    for part, machine in found.get("machines", {}).items():
        elsewhere.setdefault(words(machine), []).append(f"`{part}`")
    places = [f"{' and '.join(parts)} {where}" for where, parts in elsewhere.items()]
    return f"Measured {'; '.join([words(found['machine']), *places])}."


def headlines() -> str:
    """What README says: of each kind of result a line or two, beside the peer, and where the rest is."""
    core, mixing, training, classes = (results(name) for name in ("core", "mixing", "train_sd", "classify"))
    rows = [
        (f"from 8 pictures to an adapter, {r['steps']} steps, {where}", own, peer, "diffusers + PEFT")
        for where, r, own, peer in whole_runs()
    ]
    vit, unet = core["vit"], core["unet-fp32"]
    own, peer = (
        f"{vit['step_over_two_forwards'][f'{who} all']:.2f}, {vit['kept_mib_per_picture'][f'{who} all']:.0f} MiB a picture"
        for who in ("our", "peft")
    )
    rows.append(("training step over two bare forwards, every linear layer of ViT-B/16", own, peer, "PEFT"))
    own, peer = (f"{unet['dora_over_lora'][who]:.2f}" for who in ("ours", "peft"))
    rows.append(("DoRA step over LoRA step, UNet of SD 1.5", own, peer, "PEFT"))
    beside = mixing["beside-fp32"]["over_bare"], mixing["beside-bf16"]["over_bare"]
    merged, stacked, peer = (
        " / ".join(f"{found[key]:.2f}" for found in beside) for key in ("merged 8", "stacked 8", "diffusers 8")
    )
    rows.append(
        ("forward with 8 adapters over the bare UNet, fp32 / bf16", f"{stacked}; merged {merged}", peer, "diffusers")
    )
    batch = mixing["beside-fp32"]["eight_pictures_over_bare"]
    what = "8 pictures, each with another adapter, over the same batch without"
    rows.append((what, f"{batch['batched']:.2f}", f"{batch['diffusers']:.2f}", "diffusers, one by one"))
    scales, load = mixing["scales"], core["load"]["from_6"]
    rows.append(
        ("new scales for 8 merged adapters", f"{scales['ours_s']:.2f} s", f"{scales['diffusers_s']:.2f} s", "diffusers")
    )
    what = "an adapter read and put beside 6 others"
    rows.append((what, f"{load['ours_s']:.3f} s", f"{load['diffusers_s']:.3f} s", "diffusers"))
    wrong = results("formats")["dynamic"]
    what = f"modules that act otherwise than their file says, of {wrong['modules']} of a kohya file with an alpha per module"
    rows.append((what, str(wrong["visionlora"]), str(wrong["diffusers"]), "diffusers"))
    for part, what in (("digits", "scikit-learn's digits"), ("styles", "the style of an emoji, concepts never seen")):
        lora, probe, full = (mean_of(classes[part][name]) for name in ("lora", "linear-probe", "full"))
        share = percent_of(classes[part]["lora"]["trained_share"])
        rows.append(
            (
                f"`classify`, top-1 of {what}",
                f"{lora} ({share} trained)",
                f"{full}, {probe}",
                "full fine-tuning, linear probe",
            )
        )
    lines = ["| | visionlora | peer | which is |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    used = [r["machine"] for r in (core, mixing, training)]
    machines = dict.fromkeys(f"{machine['processor']}, {machine['threads']} threads" for machine in used)
    style = results("style_transfer")
    lower = [style[name]["loss_reduction"] for name in LEARNED]
    return "\n".join(lines) + (
        f"\n\nOn concepts that it never saw in a style, the embedded model's loss is {percent(min(lower))} to "
        f"{percent(max(lower))} lower with an adapter of that style.\n\n"
        f"Times and memory are of {' and '.join(machines)}. How each was measured, on which machine, and all else, also what "
        "does not pay: "
        "[benchmarks/RESULTS.md](benchmarks/RESULTS.md). `make bench` measures again."
    )


def documents() -> dict[Path, str]:
    """What each document should say between its markers."""
    both = f"{style_table()}\n\n{fidelity_text()}\n{auto_rank_text()}\n\n{machine_text('style_transfer')}"
    training = train_sd_text()
    parts = [
        both,
        *(["## Training, end to end", training] if training else []),
        "## The core",
        core_table(),
        *(["## One picture", one] if (one := one_picture_text()) else []),
        "## Several adapters at once",
        mixing_text(),
        "## Classification",
        classify_text(),
        "## Adapter files",
        formats_text(),
    ]
    return {
        ROOT / "README.md": headlines(),
        ROOT / "assets" / "emoji-vit" / "README.md": f"{retrieval_text()}\n\n{machine_text('classify')}",
        ROOT / "benchmarks" / "RESULTS.md": "\n\n".join(parts),
        ROOT / "assets" / "emoji-64" / "README.md": f"{fidelity_text()}\n\n{machine_text('prompt_fidelity')}",
    }


def filled(text: str, numbers: str) -> str:
    """`text` with `numbers` between its markers."""
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{numbers}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    """Rewrites or checks."""
    stale = []
    for path, numbers in documents().items():
        text = path.read_text()
        if (new := filled(text, numbers)) != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(new)
    print(f"stale: {', '.join(stale)}" if stale else "All documents say what the results say.")
    if stale and "--check" in sys.argv:
        sys.exit(1)


if __name__ == "__main__":
    main()
