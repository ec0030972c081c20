"""One page about finished runs: who won, how the ratio came about, what it cost.

    python -m experiments.report runs/digits/tgeo
    python -m experiments.report runs/comparison/noisy --output=runs/comparison/report

A folder that holds runs stands for all of them; see docs/report.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from experiments import commandline
from tgeo_jax import report, storage
from tgeo_jax.reporting import finding

_OUTPUT = flags.DEFINE_string(
    "output", "", "Folder of the page; empty: report/ in WORKDIR, of several beside the first."
)
_TITLE = flags.DEFINE_string("title", "", "Heading of the page; empty: what was named.")


def main(argv: Sequence[str]) -> None:
    named = argv[1:]
    found = finding.find(named)
    for folder in found.unfinished:
        print(f"{folder}: not finished, left out")
    folders = [storage.absolute(storage.path(name, "WORKDIR")) for name in named]
    output = (folders[0] if len(named) == 1 else folders[0].parent) / "report"
    if _OUTPUT.value:
        output = storage.path(_OUTPUT.value, "--output")
    title = _TITLE.value or " · ".join(folder.name for folder in folders)
    print(f"Report: {report.write(found.runs, output, title)}")


if __name__ == "__main__":
    commandline.run(main)
