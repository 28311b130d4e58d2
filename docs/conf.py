"""Sphinx's settings: `sphinx-build -W --keep-going -n -b html docs build/docs`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import fusedrnn
from fusedrnn import cli

# Where links to files outside docs/ lead. To be set when the repository has its place.
REPOSITORY = "https://github.com/fusedrnn/fusedrnn"

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("KERAS_BACKEND", "torch")  # autodoc imports fusedrnn.keras

project = "fusedrnn"
author = "The fusedrnn developers"
copyright = author
version = release = fusedrnn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
smartquotes = False  # h' is a state, not a quotation
default_role = "py:obj"
highlight_language = "none"
maximum_signature_line_length = 88

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes and types
autodoc_preserve_defaults = True
nitpick_ignore_regex = [
    ("py:obj", r"(torch|keras)\..*|Figure"),  # PyTorch's, Keras' and matplotlib's own pages
    ("py:class", r"(torch|typing|numpy)\..*|Generic|StateT"),  # bases
]

myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"fusedrnn {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}

# Links


def _with_links(text: str, folder: Path) -> str:
    """Turn a page's links to files outside docs/ into links to the repository."""

    def mend(link: re.Match[str]) -> str:
        target, hash_, anchor = link[1].partition("#")
        path = (folder / target).resolve()
        if not target or not path.is_relative_to(ROOT) or not path.exists():
            return link[0]
        if path.is_relative_to(ROOT / "docs"):
            return f"]({os.path.relpath(path, ROOT / 'docs')}{hash_}{anchor})"
        kind = "tree" if path.is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{path.relative_to(ROOT)}{hash_}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", mend, text)


def _read(_: Sphinx, name: str, source: list[str]) -> None:
    """Mend a page's links, those of a page of the repository that it includes too."""

    def include(match: re.Match[str]) -> str:
        path = ROOT / "docs" / match[1]
        return _with_links(path.read_text("utf-8"), path.resolve().parent)

    text = re.sub(r"^```\{include\} (\S+)\n```$", include, source[0], flags=re.M)
    is_below = "/" in name  # such pages link nothing outside but by absolute addresses
    source[0] = text if is_below else _with_links(text, ROOT / "docs")


# Docstrings: `name: text` below an underlined heading becomes a definition

_HEADINGS = ("Parameters", "Attributes", "Returns", "Raises", "Notes")
_NAMES = r"((?:\w+Error|[a-z_]\w*|[TBIHRW]\b)(?:(?:, (?:and )?| … )[\w ]+)*)"
_ITEM = re.compile(rf"(?:^|(?<=\. )){_NAMES}: (?=\S)")


def _definitions(lines: list[str]) -> list[str]:
    """Return a section's paragraph, its items as a definition list."""
    items: list[str] = []
    for line in lines:
        if items and line.startswith(" "):
            items[-1] += " " + line.strip()
        else:
            items.append(line)
    if not all(_ITEM.match(item) for item in items):
        return [*lines, ""]
    made = []
    for item in items:
        _, *parts = _ITEM.split(item)
        for names, text in zip(parts[::2], parts[1::2], strict=True):
            names = re.sub(r"\w+", r"``\g<0>``", names) if " of " not in names else names
            made += [names, f"    {text.strip()}", ""]
    return made


def _docstring(
    _app: Sphinx, _what: str, _name: str, _obj: Any, _opt: Any, lines: list[str]
) -> None:
    made: list[str] = []
    paragraph: list[str] = []
    in_notes = False
    for line, after in zip([*lines, ""], [*lines[1:], "", ""], strict=True):
        if line in _HEADINGS and set(after) == {"-"}:
            made += [f".. rubric:: {line}", ""]
            in_notes = line == "Notes"
        elif line and set(line) == {"-"}:
            continue
        elif line:
            paragraph.append(line)
        else:
            made += [*paragraph, ""] if in_notes or not paragraph else _definitions(paragraph)
            paragraph = []
    lines[:] = made


# The command line


class Usage(SphinxDirective):
    """The help of the command `fusedrnn` and of each of its own."""

    def run(self) -> list[nodes.Node]:
        """Ask the parsers themselves."""
        os.environ |= {"COLUMNS": "88", "NO_COLOR": "1"}
        parser = cli._parser()
        made: list[nodes.Node] = [
            nodes.literal_block(text=parser.format_help(), language="text")
        ]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, command in action.choices.items():
                    section = nodes.section(ids=[f"fusedrnn-{name}"], names=[name])
                    section += nodes.title(text=f"fusedrnn {name}")
                    section += nodes.literal_block(text=command.format_help(), language="text")
                    made.append(section)
        return made


def setup(app: Sphinx) -> None:
    """Register what is defined here."""
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _docstring)
    app.add_directive("usage", Usage)
