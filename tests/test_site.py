"""The site builds strictly, its links lead somewhere, it asks nothing of a network, it is true."""

from __future__ import annotations

import ast
import html.parser
import importlib
import posixpath
import re
import sys
import types
import urllib.parse

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import tgeo_jax
from tests.conftest import ROOT
from tgeo_jax import bilevel, losses, models
from tgeo_jax import config as configs

DOCS = ROOT / "docs"
_PARTS = ("data", "loss", "ratio", "role", "student", "teacher")  # with sections of their values


class _Page(html.parser.HTMLParser):
    """What a page shows and loads, where it leads, and what can be led to in it."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.links, self.ids, self.tags = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append((tag, values.get("class") or ""))
        self.ids |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a":
            self.links += [values["href"]] if values.get("href") else []
        elif values.get("rel") != "canonical":
            found = [values.get(name) for name in ("src", "href", "data", "poster")]
            self.loads += [value for value in found if value]


@pytest.fixture(scope="session")
def site(command, tmp_path_factory):
    """The pages by their path in the site."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command("-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={folder}")
    return folder, {
        str(path.relative_to(folder)): _Page(path.read_text()) for path in folder.rglob("*.html")
    }


@pytest.mark.xdist_group("site")
def test_nothing_is_loaded_from_elsewhere(site):
    folder, pages = site
    assert len(pages) > 50
    for name, page in pages.items():
        assert page.loads
        for address in page.loads:
            assert not re.match(r"(https?:)?//", address), (name, address)
    for style in folder.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text()), style


@pytest.mark.xdist_group("site")
def test_every_link_and_anchor_leads_somewhere(site):
    folder, pages = site
    counted = 0
    for name, page in pages.items():
        if name == "404.html":  # served at any depth
            continue
        for link in page.links + page.loads:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or link == ".":
                continue
            path = urllib.parse.unquote(parts.path)
            there = posixpath.normpath(posixpath.join(posixpath.dirname(name), path or ""))
            there = there if path else name
            assert (folder / there).is_file(), (name, link)
            if parts.fragment and there in pages and not parts.fragment.startswith("__"):
                assert urllib.parse.unquote(parts.fragment) in pages[there].ids, (name, link)
                counted += 1
    assert counted > 300


@pytest.mark.xdist_group("site")
def test_formulas_are_mathml_and_links_into_the_repository_are_pages(site):
    _, pages = site
    tags = [tag for tag, _ in pages["mathematics.html"].tags]
    assert tags.count("math") > 40
    assert not any("arithmatex" in css for page in pages.values() for _, css in page.tags)
    assert "repository/tgeo_jax/losses.py.html" in pages
    notebook = pages["repository/notebooks/whom_to_trust.ipynb.html"]
    assert sum(source.startswith("data:image/png") for source in notebook.loads) == 4


@pytest.mark.xdist_group("site")
def test_the_reference_has_what_the_library_offers(site):
    _, pages = site
    for name in ("bilevel", "geometry", "losses", "ratios", "roles", "ranking", "distill"):
        module = importlib.import_module(f"tgeo_jax.{name}")
        for public in getattr(module, "__all__", ["one_step"] if name == "bilevel" else []):
            documented = getattr(getattr(module, public), "__doc__", None)
            if callable(getattr(module, public)) and documented and not public[0].isupper():
                ids = pages[f"reference/{name}.html"].ids
                assert any(found.endswith(f".{public}") for found in ids), (name, public)


def _python_blocks():
    for path in sorted(DOCS.rglob("*.md")):
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S)):
            yield pytest.param(block, id=f"{path.stem}{number}")


@pytest.mark.parametrize("block", list(_python_blocks()))
def test_python_in_the_pages_runs(block, monkeypatch, capsys):
    tables = (losses.SOFT_LOSSES, models.MODELS)
    known = [dict(table) for table in tables]
    monkeypatch.setitem(sys.modules, "page", types.ModuleType("page"))  # as Linen modules want it
    try:
        exec(compile(block, "page.md", "exec"), vars(sys.modules["page"]))
    finally:
        for table, before in zip(tables, known, strict=True):  # what it registers is forgotten
            table.clear()
            table.update(before)
    printed = capsys.readouterr().out
    if "batchmean" in block:
        assert printed == "True False\n"


def test_every_field_of_the_configuration_is_explained():
    text = (DOCS / "choosing.md").read_text()
    missing = [path for path in _fields(configs.default(), "") if f"`{path}`" not in text]
    assert not missing


def _fields(section: ConfigDict, prefix: str):
    for name, value in section.items():
        path = f"{prefix}{name}"
        if path == "meta.optimizer" or (isinstance(value, ConfigDict) and prefix[:-1] in _PARTS):
            continue  # as `optimizer`; options of methods and networks have pages of their own
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{path}.")
        else:
            yield path


def test_every_field_that_the_pages_name_exists():
    pattern = re.compile(
        r"`(?:--config\.)?((?:data|teacher|student|loss|ratio|role|optimizer|meta|train|mesh)"
        r"(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`"
    )
    default = configs.default()
    named = {
        (path.stem, field)
        for path in DOCS.glob("*.md")
        for field in pattern.findall(path.read_text())
    }
    assert len(named) > 80
    files = re.compile(r"\.(md|py|sh|txt|csv|jsonl|json|train_step|run)$")
    mine = ("loss.mine", "loss.squared")  # of the page about methods of one's own
    for page, field in named:
        if files.search(field) or field.startswith(mine):
            continue
        assert configs.unknown_field(default, field) is None, (page, field)


def test_messages_that_the_page_explains_exist():
    source = "".join(path.read_text() for path in (ROOT / "tgeo_jax").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)  # adjacent strings are one
    _, _, table = (DOCS / "choosing.md").read_text().partition("## When it fails")
    quoted = [cell for cell in re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)]
    assert len(quoted) > 6
    for message in quoted:
        for part in message.split("..."):
            part = part.strip(" =':")
            assert re.sub(r"='$", "", part) in source, message


def test_tangents_of_the_figure_are_finite_differences(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(DOCS))
    figures = importlib.import_module("figures")
    try:
        figures.main(tmp_path)
        _, curve, points = figures.outer_loss_over_ratio()
    finally:
        sys.modules.pop("figures")
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = set(re.findall(r"images/(\w+\.svg)", (DOCS / "mathematics.md").read_text()))
    assert drawn == shown == {path.name for path in (DOCS / "images").glob("*.svg")}
    for index, (_, value, slope) in zip((20, 50, 80), points, strict=True):
        assert value == pytest.approx(curve[index])
        assert slope == pytest.approx((curve[index + 1] - curve[index - 1]) / 0.02, rel=1e-2)


def test_the_ratios_derivative_is_the_formula_of_the_page():
    """`d L_out / d alpha_i = -(eta / B) <grad L_out(p'), grad D_i - grad CE_i>` for plain SGD."""
    random = np.random.RandomState(3)
    inputs, held_out = (jnp.asarray(random.randn(4, 3), jnp.float32) for _ in range(2))
    labels, said = jnp.array([0, 1, 1, 0]), jnp.asarray(random.randn(4, 2), jnp.float32)
    params, alpha = jnp.asarray(random.randn(3, 2), jnp.float32), jnp.array([0.2, 0.5, 0.9, 0.4])

    def terms(params):
        logits = inputs @ params
        return losses.cross_entropy(logits, labels), losses.kl(logits, said, temperature=2.0)

    def inner(params, alpha):
        hard_B, soft_B = terms(params)
        return jnp.mean((1 - alpha) * hard_B + alpha * soft_B)

    def outer(params):
        return jnp.mean(losses.cross_entropy(held_out @ params, labels))

    sgd = optax.sgd(0.3)
    found = bilevel.one_step(inner, outer, params, alpha, sgd, sgd.init(params))
    pull = jax.jacobian(lambda p: terms(p)[1] - terms(p)[0])(params)
    want = -0.3 / 4 * jnp.einsum("fk,bfk->b", jax.grad(outer)(found.params), pull)
    np.testing.assert_allclose(found.meta_grads, want, rtol=1e-4)


def test_imports_point_downwards_as_the_tour_of_the_code_says():
    tour = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (?:mathematics|the step|devices): (.*?) \|", tour, re.MULTILINE)
    allowed = {"errors", "numeric", "shapes", "models", "data", "classification", "simulated"}
    assert len(rows) == 3
    for row in rows:
        modules = re.findall(r"`(\w+)`", row)
        allowed |= set(modules)
        for module in modules:
            tree = ast.parse((ROOT / "tgeo_jax" / f"{module}.py").read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module == "tgeo_jax":
                    assert {alias.name for alias in node.names} <= allowed, module
                elif isinstance(node, ast.ImportFrom) and node.module.startswith("tgeo_jax."):
                    assert node.module.split(".")[1] in allowed, module


def test_the_version_to_cite_is_the_packages():
    pattern = r"^ *version *[:=] *[{\"]?([\d.]+)"
    for path in (ROOT / "CITATION.cff", DOCS / "citation.md"):
        assert re.findall(pattern, path.read_text(), re.MULTILINE) == [tgeo_jax.__version__], path
