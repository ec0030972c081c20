"""The page in a browser: no errors, everything drawn, the script at work, phone, dark and paper."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from tests import finished_runs
from tgeo_jax import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None) or (
    shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed here"),
    pytest.mark.xdist_group("browser"),
]
NAMES = ["kd", "tgeo", "plain student"]


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """A page of three runs, one of them with samples."""
    folder = tmp_path_factory.mktemp("page")
    counts = {"last": {"test": [[[3, 1], [0, 4]]]}}
    accuracies = ((0.9, 0.92), (0.95, 0.99), (0.5, 0.6))
    runs = {
        name: finished_runs.write(folder / name, accuracy=accuracy, confusion=counts)
        for name, accuracy in zip(NAMES, accuracies, strict=True)
    }
    finished_runs.write_samples(runs["tgeo"])
    return report.write(runs, folder / "report", "Three runs").as_uri()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, address):
    """Opens the page; what it logs and asks for is in `page.said`."""
    contexts = []

    def open_page(**how):
        contexts.append(browser.new_context(**how))
        page = contexts[-1].new_page()
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.said.append(request.url[:99]))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()


def _first_column(page) -> list[str]:
    return page.locator("#runs tbody tr:visible td:first-child").all_inner_texts()


def test_it_logs_no_error_asks_for_nothing_and_draws_everything(opened, address):
    page = opened()
    asked = [said for said in page.said if not said.startswith("data:image/")]
    assert asked == [address]
    sizes = page.eval_on_selector_all("img", "all => all.map(img => img.naturalWidth)")
    assert sizes == [8] * 32
    charts = page.eval_on_selector_all(
        ".chart > svg", "all => all.map(svg => [svg.getBBox().width, svg.clientWidth])"
    )
    assert len(charts) == 1 + 3 + 3  # curves; situations, epochs, histogram; confusions
    assert all(drawn > 100 and shown > 100 for drawn, shown in charts)
    shades = page.eval_on_selector_all("svg image", "all => all.map(it => it.getBBox().width)")
    assert len(shades) == 1 + 3
    assert min(shades) > 50
    assert page.locator("svg:not([aria-label]), img:not([alt])").count() == 0


def test_a_click_or_a_key_sorts_the_table(opened):
    page = opened()
    head = page.locator("#runs th", has_text="test accuracy (%), last")
    assert _first_column(page) == NAMES
    assert head.get_attribute("aria-sort") is None
    head.locator("button").click()
    assert _first_column(page) == ["plain student", "kd", "tgeo"]
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert _first_column(page) == ["tgeo", "kd", "plain student"]
    assert head.get_attribute("aria-sort") == "descending"
    page.locator("#runs th", has_text="run").first.locator("button").click()
    assert _first_column(page) == ["kd", "plain student", "tgeo"]  # words by the alphabet
    assert head.get_attribute("aria-sort") is None


def test_the_difference_from_the_best_sorts_as_numbers(opened):
    page = opened()
    page.locator("#runs th", has_text="against the best").locator("button").click()
    assert _first_column(page) == ["plain student", "kd", "tgeo"]  # -42, -6, best


def test_words_choose_rows(opened):
    page = opened()
    page.get_by_label("Show runs with").fill("TGEO stud")
    assert _first_column(page) == ["plain student"]  # its ratio is tgeo
    page.get_by_label("Show runs with").fill("")
    assert _first_column(page) == NAMES


def test_choosing_a_sample_shows_its_triangle(opened):
    page = opened()
    shown = page.locator(".triangle:visible")
    assert page.locator(".triangle").count() == 32
    assert shown.count() == 1
    before = shown.locator("circle").first.evaluate("it => it.outerHTML")
    assert "Sample 0," in shown.inner_text()
    page.locator(".cards a").nth(20).click()  # the fifth of those trusted most, of 40
    assert shown.count() == 1
    assert "Sample 35," in shown.inner_text()
    assert shown.locator("circle").nth(1).evaluate("it => it.outerHTML") != before
    assert page.locator(".cards a[aria-current=true]").count() == 1
    page.get_by_label("Triangle of").select_option(index=2)
    assert "Sample 2," in shown.inner_text()
    assert shown.bounding_box()["height"] > 100


def test_a_link_to_a_sample_shows_that_one(opened, address):
    page = opened()
    page.goto(f"{address}#{page.locator('.triangle').nth(4).get_attribute('id')}")
    page.reload()
    assert "Sample 4," in page.locator(".triangle:visible").inner_text()


def test_without_a_script_everything_is_there(opened):
    page = opened(java_script_enabled=False)
    assert page.locator(".triangle").count() == 32
    assert all(triangle.is_visible() for triangle in page.locator(".triangle").all()[::8])
    assert _first_column(page) == NAMES
    assert not page.locator(".filter").first.is_visible()
    assert not page.locator(".chooser").is_visible()


@pytest.mark.parametrize("width", [320, 390, 768, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_never_wider_than_the_screen(opened, width, scheme):
    page = opened(viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 390:  # letters of figures can be read: 10 px and more
        sizes = page.eval_on_selector_all(
            "#accuracy svg text", "all => all.map(text => text.getBoundingClientRect().height)"
        )
        assert min(sizes) >= 10


def _luminance(colour: str) -> float:
    """Relative luminance by the definition in WCAG 2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_stand_out_from_the_paper(opened, scheme):
    page = opened(color_scheme=scheme)
    paper = _luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper < 0.05) == (scheme == "dark")
    for selector in ("body", "figcaption", ".right", ".wrong", "#accuracy svg text"):
        what = "fill" if "svg" in selector else "color"
        found = page.eval_on_selector(selector, f"it => getComputedStyle(it).{what}")
        high, low = sorted((_luminance(found), paper), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector


def test_paper_is_white_and_what_needs_a_screen_is_left_out(opened):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for selector in ("nav", "details", ".filter", ".chooser"):
        assert not page.locator(selector).first.is_visible(), selector
    assert page.locator("#configuration ~ .box").first.is_visible()  # how the runs differ
    assert len(page.pdf()) > 20_000
