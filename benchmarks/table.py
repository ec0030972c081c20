"""One row of the table of benchmarks, the table as Markdown, and the file it is kept in."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.measure import Costs, Peak, Ratio, Times


@dataclasses.dataclass(frozen=True)
class Row:
    """A comparison measured in one run.

    Attributes:
        part: of the suite.
        case: what was measured.
        against: what it is compared with.
        ratio: median; what it is of, `unit` says.
        low: lower quartile over the rounds.
        high: upper quartile.
        unit: of the ratio, "times the time" if nothing else is said.
        milliseconds: of the case.
        against_milliseconds: of what it is compared with.
        expected: the ratio that theory gives for `flops_ratio`, or the target for `ratio`.
        flops: compiled, of one step of the case.
        flops_ratio: to those of what it is compared with.
        bytes: moved, as the compiler counts them.
        temporary: bytes of working space.
        peak_share: FLOPs a second over those of a matrix product in this run.
        copy_share: bytes a second over those of a copy in this run.
        note: what else to know.
    """

    part: str
    case: str
    against: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = "time"
    milliseconds: float | None = None
    against_milliseconds: float | None = None
    expected: str = ""
    flops: float | None = None
    flops_ratio: float | None = None
    bytes: float | None = None
    temporary: float | None = None
    peak_share: float | None = None
    copy_share: float | None = None
    note: str = ""


def compared(
    part: str,
    case: str,
    against: str,
    times: tuple[Times, Times],
    *,
    costs: Costs | None = None,
    base_costs: Costs | None = None,
    peak: Peak | None = None,
    bfloat16: bool = False,
    **rest: Any,
) -> Row:
    """A row from the times of a case and of what it is compared with.

    Args:
        part: of the suite.
        case: what was measured.
        against: what it is compared with.
        times: of both.
        costs: of one step of the case.
        base_costs: of one step of the other.
        peak: of this machine.
        bfloat16: whether the case computes in bfloat16.
        **rest: further fields of the row.
    """
    time, base = times
    ratio: Ratio = time.over(base)
    row = Row(part, case, against, *ratio)
    row = dataclasses.replace(
        row, milliseconds=time.milliseconds, against_milliseconds=base.milliseconds, **rest
    )
    if costs is None:
        return row
    row = dataclasses.replace(row, flops=costs.flops, bytes=costs.bytes, temporary=costs.temporary)
    if base_costs is not None and base_costs.flops:
        row = dataclasses.replace(row, flops_ratio=costs.flops / base_costs.flops)
    if peak is not None:
        seconds = time.milliseconds / 1e3
        best = peak.bfloat16_flops_per_second if bfloat16 else peak.flops_per_second
        row = dataclasses.replace(
            row,
            peak_share=costs.flops / seconds / best,
            copy_share=costs.bytes / seconds / peak.bytes_per_second,
        )
    return row


_HEADER = (
    "case", "against", "ratio", "quartiles", "ms", "expected", "FLOPs", "GFLOP", "MB moved",
    "MB work", "of peak", "of copy", "note",
)  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The rows as Markdown tables, one for each part.

    Examples:
        >>> print(markdown([Row("step", "meta", "plain", ratio=2.5, low=2.25, high=3.0)]))
        ### step
        <BLANKLINE>
        | case | against | ratio | quartiles |
        |---|---|---|---|
        | meta | plain | 2.50 | 2.25 to 3.00 |
    """
    parts = dict.fromkeys(row.part for row in rows)
    return "\n\n".join(
        f"### {part}\n\n" + _part([row for row in rows if row.part == part]) for part in parts
    )


def _part(rows: Sequence[Row]) -> str:
    cells = [_cells(row) for row in rows]
    used = [any(line[i] for line in cells) for i in range(len(_HEADER))]
    lines = [[h for h, keep in zip(_HEADER, used, strict=True) if keep]]
    lines.append(["---"] * len(lines[0]))
    lines += [[c for c, keep in zip(line, used, strict=True) if keep] for line in cells]
    return "\n".join(
        f"|{'|'.join(line)}|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines
    )


def _cells(row: Row) -> list[str]:
    spread = ""
    if row.low is not None and row.high is not None:
        spread = f"{_number(row.low)} to {_number(row.high)}"
    return [
        row.case,
        row.against,
        _number(row.ratio) + ("" if row.unit == "time" else f" {row.unit}"),
        spread,
        _number(row.milliseconds),
        row.expected,
        _number(row.flops_ratio),
        _number(None if row.flops is None else row.flops / 1e9),
        _number(None if row.bytes is None else row.bytes / 1e6),
        _number(None if row.temporary is None else row.temporary / 1e6),
        _percent(row.peak_share),
        _percent(row.copy_share),
        row.note,
    ]


def _number(value: float | None) -> str:
    """Three figures or so.

    Examples:
        >>> _number(None), _number(0.01234), _number(1.234), _number(1234.5)
        ('', '0.0123', '1.23', '1,234')
    """
    if value is None:
        return ""
    if value and abs(value) < 0.1:
        return f"{value:.3g}"
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def write(path: pathlib.Path, rows: Iterable[Row], about: dict[str, Any]) -> None:
    """Appends rows to a file of JSON lines, each with what it was measured on.

    Args:
        path: made if it is not there.
        rows: of one run.
        about: device, versions, commit, date.
    """
    with path.open("a") as file:
        for row in rows:
            filled = {k: v for k, v in dataclasses.asdict(row).items() if v not in (None, "")}
            file.write(json.dumps({**filled, **about}) + "\n")


def read(path: pathlib.Path) -> list[tuple[Row, dict[str, Any]]]:
    """The rows of a file, each with what it was measured on."""
    known = {field.name for field in dataclasses.fields(Row)}
    found = []
    for line in path.read_text().splitlines():
        values = json.loads(line)
        row = Row(**{k: v for k, v in values.items() if k in known})
        found.append((row, {k: v for k, v in values.items() if k not in known}))
    return found
