"""Markdown for the book: equations with anchors, links that resolve there, an anchor for each term of the glossary."""

import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from bdlib.book.glossary import Term, terms

FENCE = re.compile(
    r"^(?P<mark>`{3,}|~{3,}).*?^(?P=mark)[ ]*$|^(?P<tick>`+)[^`]+(?P=tick)|(?<!`)`[^`\n]+`", re.DOTALL | re.MULTILINE
)
EQUATION = re.compile(r"^(?P<indent>(?:> ?)?)\$\$(?P<body>.+?)\$\$[ ]*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?P<text>!?\[[^\[\]]*\])\((?P<target>[^()\s]+)\)")
EQUATION_OF_NOTEBOOK = re.compile(r"eq-\d+-\d+")


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page of the book, by its place in the project."""

    root: Path  # of the project
    place: str  # such as notebooks/02_awm.ipynb
    pages: frozenset[str]  # the places of all pages
    absent: frozenset[str] = frozenset()  # of pages that the book would have, were they written


def prepare(text: str, page: Page, numbers: Iterator[str] | None = None) -> tuple[str, list[str]]:
    """The page's Markdown for the book, and the places of the files, no pages, that it links to.

    numbers: for its display equations, such as "2-1"; without them none is numbered.  Code stays as it is.
    """
    linked = []

    def change(prose: str) -> str:
        if numbers:
            prose = EQUATION.sub(lambda found: numbered(found, next(numbers)), prose)
        return LINK.sub(lambda found: resolved(found, page, linked), prose)

    return outside_code(text, change), linked


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with `change` made to all that is neither a block of code nor code in a line."""
    parts, end = [], 0
    for code in FENCE.finditer(text):
        parts += [change(text[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def equation_numbers(page: Page) -> Iterator[str]:
    """2-1, 2-2, ... for notebook 02."""
    chapter = int(posixpath.basename(page.place)[:2])
    return (f"{chapter}-{number}" for number in count(1))


def numbered(equation: re.Match, number: str) -> str:
    """The equation behind a target that links name; book/tree.py prints the number beside it."""
    indent = equation["indent"]
    return f"{indent}(eq-{number})=\n{indent}$${equation['body']}$$"


def resolved(link: re.Match, page: Page, linked: list[str]) -> str:
    """The link as Sphinx resolves it; its bare text where it names a folder or an absent page.

    The place of a file that is no page is appended to `linked`.  What does not exist stays, and Sphinx complains of it.
    """
    path, _, anchor = link["target"].partition("#")
    if ":" in path:  # http://..., mailto:...
        return link.group()
    if EQUATION_OF_NOTEBOOK.fullmatch(anchor):
        return f"{link['text']}(#{anchor})"
    anchor = anchor and "#" + re.sub(r"[^\w-]", "", anchor.lower())  # JupyterLab keeps capitals, Sphinx does not
    if not path:
        return f"{link['text']}({anchor})"
    place = posixpath.normpath(posixpath.join(posixpath.dirname(page.place), path))
    if place in page.absent or (page.root / place).is_dir():
        return link["text"].strip("![]")
    if place not in page.pages and (page.root / place).is_file():
        linked.append(place)
    return f"{link['text']}({path}{anchor})"


def anchors_of_terms(text: str) -> str:
    """The glossary with a target in front of each term's heading."""

    def with_target(term: Term) -> str:
        return f"({term.anchor})=\n### {term.heading}\n"

    for term in terms(text):
        text = text.replace(f"### {term.heading}\n", with_target(term), 1)
    return text
