"""The source folder that Sphinx reads: a copy of each page at its place in the project, prepared for the book."""

import json
from pathlib import Path

from bdlib import names
from bdlib.book import front, outputs, prose

GLOSSARY = "notebooks/glossary.md"
# Part of the table of contents -> its pages, in order: place in the project, title there ("": the page's own).
PARTS = {
    "Read": {f"notebooks/{name}.ipynb": "" for name in names.PAPERS} | {"notebooks/paper_scale.md": ""},
    "Look up": {GLOSSARY: "Glossary", "figures/README.md": "Which row was measured how"},
    "Use": {
        "README.md": "About, and how to use it",
        "CLUSTER.md": "Many runs, many machines",
        "CONTRIBUTING.md": "How to add a method",
    },
    "Teach": {"notebooks/teachers_guide.md": "Teacher's guide"},
}


def assemble(root: Path, source: Path, *, for_students: bool = False) -> None:
    """Fill `source` with the pages of the project at `root`, the files that they link to, and the first page.

    for_students: without what answers the exercises, the guide that explains the answers too.
    """
    planned = [place for places in PARTS.values() for place in places]
    present = [place for place in planned if (root / place).exists() and not (for_students and place in PARTS["Teach"])]
    for place in present:
        (source / place).parent.mkdir(parents=True, exist_ok=True)
        page = prose.Page(root=root, place=place, pages=frozenset(present), absent=frozenset(planned) - set(present))
        if place.endswith(".ipynb"):
            found = notebook(page, source / place, for_students=for_students)
        else:
            found = markdown(page, source / place)
        for linked in found:
            copy(root / linked, source / linked)
    contents = {}
    for part, places in PARTS.items():
        if listed := [(place, title) for place, title in places.items() if place in present]:
            contents[part] = listed
    (source / "index.md").write_text(front.page(root, contents), encoding="utf-8")


def markdown(page: prose.Page, target: Path) -> list[str]:
    """Write the prepared page; the places of the files that it links to."""
    text, linked = prose.prepare((page.root / page.place).read_text(encoding="utf-8"), page)
    if page.place == GLOSSARY:
        text = prose.anchors_of_terms(text)
    target.write_text(text, encoding="utf-8")
    return linked


def notebook(page: prose.Page, target: Path, *, for_students: bool) -> list[str]:
    """Write the prepared notebook, with the outputs that it is stored with; the places of the files that it links to.

    for_students: of the exercises their texts alone.
    """
    content = json.loads((page.root / page.place).read_text(encoding="utf-8"))
    content["metadata"].pop("widgets", None)  # Sphinx would load a widget manager from the network
    if for_students:
        content["cells"] = [cell for cell in content["cells"] if "nbgrader" not in cell["metadata"]]
    numbers, linked = prose.equation_numbers(page), []
    for cell in content["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cell["outputs"] = outputs.readable(cell["outputs"])
            cell["metadata"]["tags"] = outputs.tags(cell["metadata"])
        elif cell["cell_type"] == "markdown":
            text, found = prose.prepare(text, page, numbers)
            linked += found
        cell["source"] = text
    target.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return linked


def copy(source: Path, target: Path) -> None:
    """Copy one file, with the folders on its way."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
