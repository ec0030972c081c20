"""A table as Markdown, CSV and LaTeX, each figure beside the published one."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reproduction import outcomes
from experiments.reproduction.declared import Part, Published, Table
from experiments.reproduction.outcomes import ACCURACY, BEST, LAST, Found
from tgeo_jax import comparison
from tgeo_jax.results_table import NONE

_WHICH = {LAST: "last epoch", BEST: "best by validation", "first": "first epoch"}
_IN_PERCENT = ("accuracy", "gap")
_NAMES = {
    "gap": "training less test accuracy",
    "samples/outlier_ratio": "ratio of outliers",
    "samples/other_ratio": "ratio of the others",
    "test/teacher_kl": "KL(teacher, student)",
    **{
        f"train/ratio_{right}_{edge}_edge": f"ratio, teacher {right}, {edge} ST edge"
        for right in ("right", "wrong")
        for edge in ("large", "small")
    },
}


@dataclasses.dataclass(frozen=True)
class Finished:
    """A table with what its runs say.

    Attributes:
        table: what was declared.
        found: by (row, column).
        teachers: by column, the result of its teacher's run, where it has finished.
        about: what trained it, in a sentence.
    """

    table: Table
    found: Mapping[tuple[str, str], Found]
    teachers: Mapping[str, Mapping[str, Any]]
    about: str

    def column(self, column: Part) -> dict[str, Found]:
        """By row."""
        return {row.name: self.found[row.name, column.name] for row in self.table.rows}

    def published(self, row: Part, column: Part, figure: str = ACCURACY) -> Published | None:
        """A paper's figure of a cell."""
        return self.table.published.get((row.name, column.name, figure))


def provenance(results: Sequence[Mapping[str, Any]]) -> str:
    """What trained a table, in a sentence: devices, versions, commits.

    Examples:
        >>> provenance([])
        'Nothing has been trained yet.'
    """
    if not results:
        return "Nothing has been trained yet."
    devices = sorted({result["device"] for result in results})
    versions = {
        f"{name} {version}" for result in results for name, version in result["versions"].items()
    }
    commits = sorted({result["commit"] for result in results})
    return (
        f"{len(results)} runs on {', '.join(devices)}; {', '.join(sorted(versions))}; commit "
        f"{', '.join(commits)}."
    )


class Notes:
    """Footnotes, numbered in the order in which they are first referred to."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        """The reference to a note, such as ` [1]`; empty for no text."""
        return f" [{self._numbers.setdefault(text, len(self._numbers) + 1)}]" if text else ""

    def lines(self) -> list[str]:
        """The notes."""
        return [f"{number}. {text}" for text, number in self._numbers.items()]


def markdown(finished: Finished) -> str:
    """The table for people, with a section for each column.

    Test accuracy is in percent: mean ± sample standard deviation over the seeds, after the last
    epoch and at the epoch that validation chose; then the difference from the best row that is not
    ours, seed by seed, with the p-value of the two-sided paired t-test; then the published figure
    and ours less it.
    """
    table, notes = finished.table, Notes()
    lines = [f"# {table.title}", "", table.about, "", finished.about, ""]
    for column in table.columns:
        lines += [f"## {column.label}", "", *_teacher(finished, column)]
        lines += [*_section(finished, column, notes), ""]
    lines += ["## Notes", "", *_legend(table), "", *notes.lines()]
    return "\n".join(lines).rstrip() + "\n"


def _section(finished: Finished, column: Part, notes: Notes) -> list[str]:
    table = finished.table
    found = finished.column(column)
    best = outcomes.best_baseline(table, found)
    published = any(finished.published(row, column) for row in table.rows)
    header = ["method", "seeds", "last epoch", "best by validation", "last, against the best other"]
    header += ["published", "difference"] if published else []
    shown = [key for f in table.figures for key in _whichs(found, f)]
    header += [f"{named(figure)}, {_WHICH[which]}" for figure, which in shown]
    header += ["seconds"]
    rows = [header, ["---"] * len(header)]
    for row in table.rows:
        own = found[row.name]
        cells = [row.label + notes.mark(own.missing), str(len(own.seeds)) if own.seeds else NONE]
        cells += [_shown(own, ACCURACY, which) for which in (LAST, BEST)]
        cells.append(_against(table, row.name, found, best))
        if published:
            cells += _beside(finished, row, column, notes)
        for figure, which in shown:
            told = finished.published(row, column, figure)
            said = _paper(told, notes) if told and which == LAST else ""
            cells.append(_shown(own, figure, which) + (f" (published {said})" if said else ""))
        rows.append([*cells, f"{own.seconds:.0f}" if own.seeds else NONE])
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def _teacher(finished: Finished, column: Part) -> list[str]:
    result = finished.teachers.get(column.name)
    if result is None:
        return []
    told = comparison.percent(result["test_accuracy"][LAST])
    paper = finished.table.published.get(("teacher", column.name, ACCURACY))
    beside = f" (published: {paper.value:.2f})" if paper else ""
    return [f"The teacher's test accuracy: {told}{beside}.", ""]


def _legend(table: Table) -> list[str]:
    others = ", ".join(row.label for row in table.rows if row.name in table.ours) or "none"
    return [
        "Test accuracy in percent, mean ± sample standard deviation over the seeds. Ours here: "
        f"{others}; the best other is the row not of ours with the highest mean after the last "
        "epoch, and p is that of the two-sided paired t-test over the seeds that both have. A "
        "difference is ours after the last epoch less the published figure.",
    ]


def _whichs(found: Mapping[str, Found], figure: str) -> list[tuple[str, str]]:
    """When a figure was measured, in any row."""
    return [
        (figure, which)
        for which in ("first", LAST, BEST)
        if any((figure, which) in own.values for own in found.values())
    ]


def named(figure: str) -> str:
    """What a figure is called.

    Examples:
        >>> named("gap"), named("test/auc")
        ('training less test accuracy', 'AUC')
    """
    return _NAMES.get(figure) or comparison.named(figure)


def _shown(found: Found, figure: str, which: str) -> str:
    mean = found.mean(figure, which)
    if mean is None:
        return NONE
    value = {"mean": mean, "std": found.std(figure, which)}
    is_share = figure.rpartition("/")[2] in _IN_PERCENT
    return comparison.percent(value) if is_share else comparison.decimal(value)


def _against(table: Table, row: str, found: Mapping[str, Found], best: str) -> str:
    if not best:
        return NONE
    if row == best:
        return "best other"
    told = outcomes.paired(found[row], found[best], LAST)
    if told is None:
        return NONE
    return comparison.difference(told)


def _beside(finished: Finished, row: Part, column: Part, notes: Notes) -> list[str]:
    told = finished.published(row, column)
    if told is None:
        return [NONE, NONE]
    own = finished.found[row.name, column.name].mean(ACCURACY, LAST)
    return [_paper(told, notes), NONE if own is None else f"{100 * own - told.value:+.2f}"]


def _paper(told: Published, notes: Notes) -> str:
    value = f"{told.value:.2f}" + ("" if told.std is None else f" ± {told.std:.2f}")
    return value + notes.mark(f"Published; epoch: {told.epoch}; source: {told.source}.")


def rows_of(finished: Finished) -> list[dict[str, Any]]:
    """The table for programs: a row for each cell and figure, shares not percent."""
    table, found = finished.table, []
    for column in table.columns:
        of_column = finished.column(column)
        best = outcomes.best_baseline(table, of_column)
        for row in table.rows:
            own = of_column[row.name]
            told = outcomes.paired(own, of_column[best], LAST) if best else None
            keys = [(ACCURACY, LAST), (ACCURACY, BEST)]
            keys += [key for figure in table.figures for key in _whichs(of_column, figure)]
            for figure, which in keys:
                is_main = (figure, which) == (ACCURACY, LAST)
                paper = finished.published(row, column, figure) if which == LAST else None
                found.append(
                    {
                        "table": table.name,
                        "column": column.name,
                        "row": row.name,
                        "figure": figure,
                        "which": which,
                        "seeds": " ".join(map(str, own.seeds)),
                        "mean": own.mean(figure, which),
                        "std": own.std(figure, which),
                        "best_other": best if is_main else None,
                        "difference": told[0] if told and is_main and row.name != best else None,
                        "p": told[1] if told and is_main and row.name != best else None,
                        "published": paper.value if paper else None,
                        "published_epoch": paper.epoch if paper else None,
                        "seconds": own.seconds,
                        "missing": own.missing,
                    }
                )
    return found


def comma_separated(finished: Finished) -> str:
    """`rows_of` as CSV; a field is empty where there is no figure."""
    rows = rows_of(finished)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def latex(finished: Finished) -> str:
    r"""The table for a paper: rows by columns, last epoch; needs `\usepackage{booktabs}`.

    The best mean of a column is bold; published figures stand under their row.
    """
    table, notes = finished.table, Notes()
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(table.title)}: test accuracy in percent after the last epoch, mean "
        r"$\pm$ sample standard deviation over the seeds (best by validation).}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(["", *(_tex(column.label) for column in table.columns)]) + r" \\",
        r"\midrule",
    ]
    bests = {column.name: _highest(finished, column) for column in table.columns}
    for row in table.rows:
        cells = []
        for column in table.columns:
            own = finished.found[row.name, column.name]
            shown = _tex(_shown(own, ACCURACY, LAST))
            if own.seeds:
                mean = own.mean(ACCURACY, BEST)
                assert mean is not None
                shown = rf"\textbf{{{shown}}}" if bests[column.name] == row.name else shown
                shown += f" ({100 * mean:.2f})"
            cells.append(shown + notes.mark(own.missing).strip())
        lines.append(" & ".join([_tex(row.label), *cells]) + r" \\")
        papers = [finished.published(row, column) for column in table.columns]
        if any(papers):
            told = [_tex(_paper(paper, notes)) if paper else NONE for paper in papers]
            lines.append(" & ".join([r"\quad published", *told]).replace(NONE, "--") + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\footnotesize {_tex(note)}" for note in notes.lines()]
    return "\n".join(lines).replace(NONE, "--") + "\n" + r"\end{table}" + "\n"


def _highest(finished: Finished, column: Part) -> str:
    means = {name: own.mean(ACCURACY, LAST) for name, own in finished.column(column).items()}
    known = {name: mean for name, mean in means.items() if mean is not None}
    return max(known, key=lambda name: known[name], default="")


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "±": r"$\pm$",
}  # fmt: skip


def _tex(text: str) -> str:
    """Text with what LaTeX reads as commands escaped.

    Examples:
        >>> print(_tex("5 % of a_b ± {1}"))
        5 \\% of a\\_b $\\pm$ \\{1\\}
    """
    return "".join(_TEX.get(letter, letter) for letter in text)
