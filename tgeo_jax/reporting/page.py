"""The page itself: everything that is told and drawn, put into one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

import jinja2
import matplotlib
import numpy as np

from tgeo_jax import geometry, storage
from tgeo_jax.reporting import extremes, facts, figures, style
from tgeo_jax.reporting.facts import Table, finished
from tgeo_jax.workdir import Workdir

__all__ = ["Table", "finished", "write"]
_FOLDER = resources.files("tgeo_jax") / "templates"


def write(
    runs: Mapping[str, Workdir],
    results: Mapping[str, dict[str, Any]],
    table: Table,
    measured: Table,
    directory: storage.Path,
    title: str,
) -> storage.Path:
    """Writes index.html and figures/*.png.

    Args:
        runs: by the name they are shown under.
        results: theirs.
        table: the main one; its second and its last column get company.
        measured: what else was measured of the test splits.
        directory: made if missing.
        title: heading; the runs' names if empty.

    Returns:
        The path of index.html.
    """
    target = directory / "figures"
    storage.make_folder(target)
    records = {name: figures.records_of(folder) for name, folder in runs.items()}
    configs = {name: folder.config() for name, folder in runs.items()}
    with matplotlib.rc_context(style.RC):
        general = _written(target, figures.of_all(runs, records, facts.also_chosen(results)))
        sections = [
            _section(target, *each, runs[name], results[name], records[name], configs[name])
            for each, name in zip(_slugs(runs), runs, strict=True)
        ]
    page = _template().render(
        title=title or " · ".join(runs),
        told=facts.summary(results),
        table=_with_methods(table, results, configs),
        measured=measured,
        figures=general,
        runs=sections,
        costs=facts.costs(results, records),
        differences=facts.config_differences(configs) if len(runs) > 1 else None,
        environment=facts.environment(results),
    )
    index = directory / "index.html"
    storage.write_atomically(index, page)
    return index


def _template() -> jinja2.Template:
    loader = jinja2.FunctionLoader(lambda name: (_FOLDER / name).read_text())
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    environment.lstrip_blocks = True
    return environment.get_template("report.html")


def _with_methods(
    table: Table, results: facts.Results, configs: Mapping[str, Mapping[str, Any]]
) -> Table:
    """The main table with what each run is, and how far behind the best."""
    differences = facts.differences(results)
    rows = [
        [row[0], facts.method(configs[row[0]]), *row[1:-1], difference, row[-1]]
        for row, difference in zip(table.rows, differences, strict=True)
    ]
    heads = [table.heads[0], "loss, ratio, role", *table.heads[1:-1]]
    return Table([*heads, "against the best (p)", table.heads[-1]], rows)


def _written(target: storage.Path, drawn: Iterable[figures.Drawn]) -> list[dict[str, Any]]:
    """Figures as files, and as what the page shows of them."""
    shown = []
    for name, title, caption, figure in drawn:
        storage.write_atomically(target / f"{name}.png", style.png(figure))
        svg = style.svg(figure, name, f"{title}. {caption}")
        shown.append({"name": name, "title": title, "caption": caption, "svg": svg})
    return shown


def _slugs(names: Iterable[str]) -> list[tuple[int, str, str]]:
    """Number of a run, what its files are named after, and its name."""
    found: list[tuple[int, str, str]] = []
    for number, name in enumerate(names):
        slug = "".join(c if c.isalnum() else "_" for c in name.lower())
        if any(slug == other for _, other, _ in found):
            slug += f"_{number}"
        found.append((number, slug, name))
    return found


def _section(
    target: storage.Path,
    number: int,
    slug: str,
    name: str,
    folder: Workdir,
    result: dict[str, Any],
    records: figures.Records,
    config: dict[str, Any],
) -> dict[str, Any]:
    """What is shown of one run by itself."""
    found: dict[str, Any] = {
        "id": f"run_{number}",
        "name": name,
        "method": facts.method(config),
        "result": result,
        "config": config,
        "teacher": facts.teacher(result),
        "trust": "",
        "ends": {},
        "story": [],
        "confusions": _written(target, figures.confusions(slug, result)),
    }
    if not storage.exists(folder.samples):
        return found
    arrays = storage.read_arrays(folder.samples)
    if not np.ptp(arrays["ratio"]) > 1e-3:
        return found  # a constant ratio has no story
    relations, saw = _seen(config)
    return found | {
        "trust": facts.trust(arrays),
        "story": _written(target, figures.of_ratio(slug, records, arrays)),
        "ends": extremes.of(arrays, relations),
        "saw": saw,
    }


def _seen(config: Mapping[str, Any]) -> tuple[str, str]:
    """The features to show, and in which sense the ratio has seen them."""
    ratio = config.get("ratio", {})
    if ratio.get("name") != "tgeo":
        said = f"The ratio {ratio.get('name', '')} does not look at these features; they are shown "
        return "full", said + "to compare."
    relations = ratio.get("tgeo", {}).get("relations", "full")
    geometry.relation_blocks(relations)
    several = config.get("role", {}).get("name") == "several"
    of_whom = "the mean of the teachers" if several else "the teacher"
    said = f"What went into the fusion network ({relations}); S the student, T {of_whom}, G the "
    return relations, said + "label, M the teacher's mean prediction for the class."
