"""What the site needs beyond mkdocs: repository files as pages, notebooks as pages, MathML.

The pages in docs/ are read in two places. In the repository their links lead to any file of it; in
the site there is nothing but docs/. So every file that is linked to becomes a page below
`repository/` (or, if it is neither text nor code, a copy), and links are turned there. No address
of a repository is needed, and the site can be read without a network.
"""

from __future__ import annotations

import html
import json
import pathlib
import posixpath
import re
from collections.abc import Iterator

from latex2mathml import converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from mkdocs.utils import log

ROOT = pathlib.Path(__file__).resolve().parent.parent
PREFIX = "repository/"
_LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".cfg": "ini", ".sh": "sh", ".yml": "yaml", "": "text"}
_MATHS = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
    re.DOTALL,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page, or a copy, for every file outside docs/ that some page links to."""
    todo = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    known = set[str]()
    while todo:
        path, text = todo.pop()
        for target in _targets(path, text):
            if target in known or _inside(target):
                continue
            known.add(target)
            content = _page(target)
            if content is None:
                where = str(ROOT / target)
                files.append(File.generated(config, PREFIX + target, abs_src_path=where))
                continue
            added = File.generated(
                config,
                _uri(target),
                content=content,
                inclusion=InclusionLevel.NOT_IN_NAV,
            )
            files.append(added)
            todo.append((target, content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that leave docs/ to where `on_files` put what they lead to."""
    del config, files
    uri = page.file.src_uri
    path = f"docs/{uri}"
    if uri.startswith(PREFIX):
        path = uri.removeprefix(PREFIX)
        path = path if (ROOT / path).exists() else path.removesuffix(".md")
    here = posixpath.dirname(uri)

    def turned(link: re.Match) -> str:
        target = _resolved(path, link[2])
        if target is None:
            return link[0]
        inside = _inside(target)
        if inside and not uri.startswith(PREFIX):
            return link[0]
        there = target.removeprefix("docs/") if inside else _uri(target)
        if not (ROOT / target).exists():
            log.warning(f"{path}: link to '{link[2]}', which is not in the repository")
        return f"{link[1]}{posixpath.relpath(there, here)}{link[3] or ''}{link[4]}"

    return _outside_of_fences(markdown, lambda text: _LINK.sub(turned, text))


def on_page_content(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns TeX into MathML, which browsers show without a script."""
    del config, files

    def turned(found: re.Match) -> str:
        display = "block" if found[1] == "div" else "inline"
        try:
            made = converter.convert(html.unescape(found[2]), display=display)
        except Exception as error:  # whatever the converter trips over is ours to mend
            log.warning(f"{page.file.src_uri}: formula {found[2]!r}: {error!r}")
            return found[0]
        return f'<div class="formula">{made}</div>' if found[1] == "div" else made

    return _MATHS.sub(turned, text)


def notebook(path: pathlib.Path) -> str:
    """A notebook as Markdown: its text, its code, and what the code printed and drew."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [_output(output) for output in cell["outputs"]]
    return "\n\n".join(parts)


def _output(output: dict) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        encoded = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="figure drawn by the code above" src="data:image/png;base64,{encoded}">'
    text = "".join(output.get("text", data.get("text/plain", [])))
    return f"```text\n{text.rstrip()}\n```"


def _page(target: str) -> str | None:
    """The Markdown of a repository file's page; None for what is copied as it is."""
    path = ROOT / target
    if path.is_dir():
        names = sorted(
            f"{child.name}/" if child.is_dir() else child.name
            for child in path.iterdir()
            if not child.name.startswith(("__pycache__", "."))
        )
        return f"# {target}\n\nFiles of this folder: {', '.join(f'`{name}`' for name in names)}."
    if path.suffix == ".md":
        return path.read_text()
    if path.suffix == ".ipynb":
        return notebook(path)
    if path.suffix in _LANGUAGES:
        code = path.read_text()
        return f"# {target}\n\n````{_LANGUAGES[path.suffix]}\n{code}````\n"
    return None


def _uri(target: str) -> str:
    """Where a repository file lies in the site's sources."""
    path = ROOT / target
    if path.suffix == ".md" or not (path.is_dir() or path.suffix in {*_LANGUAGES, ".ipynb"}):
        return PREFIX + target
    return f"{PREFIX}{target}.md"


def _targets(path: str, text: str) -> Iterator[str]:
    """Files of the repository that a page at this path of it links to."""
    for link in _LINK.finditer(_FENCE.sub("", text)):
        target = _resolved(path, link[2])
        if target is not None and (ROOT / target).exists():
            yield target


def _inside(target: str) -> bool:
    """Whether mkdocs itself has that file; it leaves out the scripts."""
    return target.startswith("docs/") and not target.endswith(".py")


def _resolved(path: str, link: str) -> str | None:
    """A relative link as a path of the repository; None for what leaves the repository."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return None if target.startswith((".", "/")) else target


def _outside_of_fences(markdown: str, change) -> str:
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])
