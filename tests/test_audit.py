"""What the audit of the pinned versions makes of pip-audit's answers."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def verdict():
    loader = importlib.machinery.SourceFileLoader("audit", str(ROOT / ".ci" / "audit"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("audit", loader))
    loader.exec_module(module)
    return module.verdict


FINE = {"name": "jax", "version": "0.10.2", "vulns": []}
FLAWED = {
    "name": "pillow",
    "version": "8.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["8.1", "9.0"]}, {"id": "X", "fix_versions": []}],
}
UNKNOWN = {"name": "moto", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("dependencies", "status", "said"),
    [
        ([FINE], 0, "audit: 1 versions asked about, 0 known vulnerabilities"),
        ([FINE, FLAWED], 1, "audit: pillow 8.0: PYSEC-1, fixed in 8.1, 9.0"),
        ([FLAWED], 1, "audit: pillow 8.0: X, fixed in no version yet"),
        ([FINE, UNKNOWN], 0, "audit: NOT AUDITED, no advisories for: moto"),
        ([UNKNOWN] * 7, 0, "moto, moto, moto, moto, moto, and 2 more"),
        ([FLAWED, UNKNOWN], 1, "audit: 1 versions asked about, 2 known vulnerabilities"),
    ],
)
def test_a_known_vulnerability_fails_and_what_nobody_looked_at_is_said(
    verdict, dependencies, status, said
):
    text, found = verdict(json.dumps({"dependencies": dependencies}), "")
    assert found == status
    assert said in text


def test_without_an_answer_the_last_line_of_the_complaint_is_shown(verdict):
    text, status = verdict("", "Traceback\nConnectionError: no such host\n")
    assert (text, status) == (
        "audit: NOT AUDITED, the advisories could not be asked: ConnectionError: no such host",
        0,
    )


def test_every_version_is_pinned_once_for_each_python():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    pinned = re.compile(r"[\w.-]+==[\w.+]+(; python_version (<|>=) \"3.12\")?")
    assert all(map(pinned.fullmatch, lines))
    names = [re.split("==|;", line)[0].lower() for line in lines if "python_version" not in line]
    assert len(names) == len(set(names))
