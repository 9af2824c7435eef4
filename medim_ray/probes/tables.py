"""The tables of result.json in a terminal. Reads the result only, so that a stored one prints alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Numbers = Mapping[str, float | None]


def title(encoder: str) -> str:
    """How a table calls an encoder."""
    return {"pixels": "raw pixels"}.get(encoder, encoder)


def format_estimate(numbers: Numbers | None, digits: int = 2) -> str:
    """`0.72 [0.59, 0.83]`; a dash where undefined."""
    if numbers is None or numbers["value"] is None:
        return "-"
    value, low, high = (numbers[key] for key in ("value", "low", "high"))
    if low is None or high is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _value(numbers: Numbers) -> str:
    return "-" if numbers["value"] is None else f"{numbers['value']:.2f}"


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """Every table of the result, then warnings and notes."""
    if result["labels"]:
        console.print(_probe_table(result))
        for label, facts in result["labels"].items():
            counts = ", ".join(f"{name} {num}" for name, num in facts["counts"].items())
            _say(
                console,
                f"{label}: {facts['num_images']} images of {facts['num_patients']} patients ({counts}); "
                f"{facts['protocol']}",
            )
        if result["mean"]["fractions"]:
            _print_fractions(result, console)
    if result["finetune"]["labels"]:
        console.print(_finetune_table(result["finetune"]))
    if result["regression"]:
        _print_regression(result["regression"], console)
    for name, reason in result["not_available"].items():
        console.print(f"[yellow]{escape(f'{name}: not available here: {reason}')}", highlight=False)
    localisation = result["localisation"]
    if localisation["strategies"]:
        console.print(_localisation_table(localisation))
    else:
        _say(console, f"localisation: {localisation['note']}")
    _print_retrieval(result["retrieval"], console)
    _print_zero_shot(result["zero_shot"], console)
    _print_segmentation(result["segmentation"], console)
    _print_generation(result["generation"], console)
    for line in localisation["warnings"]:
        console.print(f"[yellow]{escape(f'warning: {line}')}", highlight=False)
    for note in result["notes"]:
        _say(console, note)


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False)


def _table(heading: str, columns: Sequence[str], caption: str = "") -> Table:
    table = Table(title=heading, caption=caption or None)
    for i, name in enumerate(columns):
        table.add_column(name, no_wrap=i > 1)
    return table


def _probe_table(result: Mapping[str, Any]) -> Table:
    table = _table(
        f"Linear probes of {result['checkpoint']}: value [95 % interval over patients]",
        ("label", "encoder", "AUROC", "AUPRC", "k-NN"),
        "k-NN: its AUROC",
    )
    sections = {_with_positive(label, facts): facts for label, facts in result["labels"].items()}
    if result["mean"]["num_labels"] > 1:
        sections[f"mean of {result['mean']['num_labels']} labels"] = result["mean"]
    for name, facts in sections.items():
        rows = [
            (
                title(encoder),
                format_estimate(numbers["auroc"]),
                format_estimate(numbers["auprc"]),
                _value(facts["knn"]["encoders"][encoder]["auroc"]),
            )
            for encoder, numbers in facts["encoders"].items()
        ]
        rows += [(missing, "not available here", "", "") for missing in result["not_available"]]
        _add_section(table, name, rows)
    return table


def _finetune_table(finetune: Mapping[str, Any]) -> Table:
    seeds = max(len(values) for facts in finetune["labels"].values() for values in facts["seeds"].values())
    table = _table(
        f"Fine-tuned encoders, mean of {seeds} seeds: value [95 % interval over patients]",
        ("label", "encoder", "AUROC", "AUPRC", "of seeds"),
        "of seeds: least and greatest AUROC",
    )
    sections = {_with_positive(label, facts): facts for label, facts in finetune["labels"].items()}
    if len(sections) > 1:
        sections[f"mean of {len(sections)} labels"] = finetune["mean"]
    for name, facts in sections.items():
        rows = []
        for encoder, numbers in facts["encoders"].items():
            values = [value for value in facts.get("seeds", {}).get(encoder, ()) if value is not None]
            spread = f"{min(values):.2f} to {max(values):.2f}" if values else ""
            both = (format_estimate(numbers[metric]) for metric in ("auroc", "auprc"))
            rows.append((title(encoder), *both, spread))
        _add_section(table, name, rows)
    return table


def _with_positive(label: str, facts: Mapping[str, Any]) -> str:
    return f"{label} ({facts['positive']})" if facts["positive"] not in (None, "1") else label


def _add_section(table: Table, name: str, rows: Sequence[tuple[str, ...]]) -> None:
    for i, row in enumerate(rows):
        table.add_row("" if i else name, *row, end_section=i == len(rows) - 1)


def _print_fractions(result: Mapping[str, Any], console: Console) -> None:
    """AUROC of the linear probe from shares of the labels; the last column is that of all labels."""
    shares = [part["fraction"] for part in result["mean"]["fractions"]]
    table = Table(title="Linear probes from shares of the labels: AUROC, mean of the draws [95 % interval]")
    table.add_column("encoder")
    for heading in (*(f"{share:.3g} of labels" for share in shares), "all labels"):
        table.add_column(heading, no_wrap=True)
    sections = {_with_positive(label, facts): facts for label, facts in result["labels"].items()}
    if len(sections) > 1:
        sections[f"mean of {len(sections)} labels"] = result["mean"]
    for name, facts in sections.items():
        table.add_row(f"[bold]{name}")
        for encoder, numbers in facts["encoders"].items():
            cells = [format_estimate(part["encoders"][encoder]["auroc"]) for part in facts["fractions"]]
            table.add_row(f"  {title(encoder)}", *cells, format_estimate(numbers["auroc"]))
        table.add_section()
    console.print(table)
    for label, facts in result["labels"].items():
        for part in facts["fractions"]:
            learned = f"{part['num_images']:.0f} images of {part['num_patients']:.0f} patients learned from"
            _say(
                console,
                f"{label} at {part['fraction']:.3g}: {part['num_draws']} draws, {learned}"
                + (f"; {part['note']}" if part["note"] else ""),
            )


def _print_regression(regression: Mapping[str, Any], console: Console) -> None:
    table = _table(
        "Ridge regression from frozen features: value [95 % interval over patients]",
        ("label", "encoder", "MAE", "R²"),
    )
    for label, facts in regression.items():
        encoders = {title(name): numbers for name, numbers in facts["encoders"].items()}
        rows = [
            (name, format_estimate(numbers["mae"]), format_estimate(numbers["r2"]))
            for name, numbers in (encoders | {"predicting the mean": facts["baseline"]}).items()
        ]
        _add_section(table, label, rows)
    console.print(table)
    for label, facts in regression.items():
        unreadable = f", {num} left out whose value is no number" if (num := facts["num_unreadable"]) else ""
        about = f"{facts['num_images']} images of {facts['num_patients']} patients{unreadable}"
        _say(console, f"{label}: {about}; {facts['protocol']}")


def _localisation_table(localisation: Mapping[str, Any]) -> Table:
    table = _table(
        f"Word-to-patch maps on {localisation['num_images']} held-out images with truth (chance 0.50 and 1.00)",
        ("strategy", "map from", "map AUROC", f"lesion lift at ratio {localisation['ratio']}"),
        "prior: anatomy of the mentions alone; both: trained x prior",
    )
    for strategy, sources in localisation["strategies"].items():
        rows = [
            (source, format_estimate(metrics["map_auroc"]), format_estimate(metrics["lesion_lift"]))
            for source, metrics in sources.items()
        ]
        _add_section(table, strategy.upper(), rows)
    return table


_DIRECTIONS = {"image_to_report": "to report", "report_to_image": "to image"}


def _print_retrieval(retrieval: Mapping[str, Any], console: Console) -> None:
    if not retrieval["directions"]:
        _say(console, f"retrieval: {retrieval['note']}")
        return
    columns = {"recall_at_1": "R@1", "recall_at_5": "R@5", "recall_at_10": "R@10", "median_rank": "median rank"}
    table = Table(
        title=f"Retrieval among {retrieval['num_images']} held-out images and their reports [95 % over patients]",
        caption=f"a report of the same words counts as right; {retrieval['note']}",
        box=SIMPLE_HEAD,  # narrow enough for 80 columns
    )
    digits = {name: 0 if name == "median_rank" else 2 for name in columns}
    for heading in ("encoder", *columns.values()):
        table.add_column(heading, no_wrap=True)
    for direction, facts in retrieval["directions"].items():
        table.add_row(f"[bold]{_DIRECTIONS[direction]}")
        for encoder, numbers in facts["encoders"].items():
            cells = {name: format_estimate(numbers[name], digits[name]) for name in columns}
            table.add_row(f" {title(encoder)}", *(cells | {"recall_at_5": _value(numbers["recall_at_5"])}).values())
        chance = facts["chance"]
        table.add_row(" chance", *(f"{chance[name]:.{digits[name]}f}" for name in columns))
        table.add_section()
    console.print(table)


def _print_zero_shot(zero_shot: Mapping[str, Any], console: Console) -> None:
    if not zero_shot["labels"]:
        _say(console, f"zero-shot: {zero_shot['note'] or 'no 0/1 label has both values among the held-out images'}")
        return
    table = _table(
        f"Zero-shot classification of {zero_shot['num_images']} held-out images from sentences [95 % over patients]",
        ("label", "encoder", "AUROC", "AUPRC"),
        zero_shot["note"],
    )
    for label, why in zero_shot["left_out"].items():
        _say(console, f"zero-shot {label}: left out, {why}")
    sections = dict(zero_shot["labels"])
    if len(sections) > 1:
        sections[f"mean of {len(sections)} labels"] = zero_shot["mean"]
    for label, facts in sections.items():
        rows = [
            (title(name), format_estimate(numbers["auroc"]), format_estimate(numbers["auprc"]))
            for name, numbers in facts["encoders"].items()
        ]
        _add_section(table, label, rows)
    console.print(table)


GENERATION = {"rouge_l": "ROUGE-L", "bleu_4": "BLEU-4", "macro_f1": "macro F1", "micro_f1": "micro F1"}


def _print_generation(generation: Mapping[str, Any], console: Console) -> None:
    if not generation["encoders"]:
        _say(console, f"report generation: {generation['note']}")
        return
    table = Table(
        title=f"Reports by {generation['lm']} for {generation['num_images']} held-out images [95 % over patients]",
        caption="F1 over 14 findings, read by our own tagger",
        box=SIMPLE_HEAD,
    )
    for heading in ("encoder", *GENERATION.values()):
        table.add_column(heading, no_wrap=True)
    for name, numbers in generation["encoders"].items():
        table.add_row(title(name), *(format_estimate(numbers[metric]) for metric in GENERATION))
    console.print(table)
    for metric, reason in generation["not_available"].items():
        _say(console, f"{metric}: not available here: {reason}")


def _print_segmentation(segmentation: Mapping[str, Any], console: Console) -> None:
    if segmentation["note"]:
        _say(console, f"segmentation: {segmentation['note']}")
    for title_, targets in segmentation_tables(segmentation).items():
        judged = {target: facts for target, facts in targets.items() if facts["encoders"]}
        for target, facts in targets.items():
            if target not in judged:
                _say(console, f"segmentation of {target}: {facts['note']}")
        if judged:
            console.print(_segmentation_table(title_, judged, segmentation["num_images"]))


_HEADS = {"linear": "Linear head", "upernet": "UPerNet", "setr": "SETR-PUP"}


def segmentation_tables(segmentation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What is asked of which head, in words -> `targets`."""
    tables: dict[str, Mapping[str, Any]] = {}
    if segmentation["targets"]:
        tables["Linear head on frozen patch tokens"] = segmentation["targets"]
    for name, targets in segmentation["heads"].items():
        head = _HEADS[name.removesuffix("_tuned")]
        tables[f"{head}, encoder trained with it" if name.endswith("_tuned") else f"{head} on a frozen encoder"] = (
            targets
        )
    return tables


def _segmentation_table(heading: str, judged: Mapping[str, Any], num_images: int) -> Table:
    table = _table(
        f"{heading}, {num_images} held-out images: Dice [95 % over patients]",
        ("target", "encoder", "with it", "all, empty/empty = 1"),
        "whole image: Dice of marking every pixel",
    )
    for target, facts in judged.items():
        rows = [
            (title(name), format_estimate(numbers["dice"]), format_estimate(numbers["dice_with_empty"]))
            for name, numbers in facts["encoders"].items()
        ]
        rows.append(("whole image", format_estimate(facts["whole_image"]), ""))
        _add_section(table, f"{target} ({facts['num_with']} with, {facts['num_without']} without)", rows)
    return table
