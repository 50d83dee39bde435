"""What Sphinx does to each page of the book beside its usual work: an extension, named in conf.py."""

import re

from bdlib.book.glossary import Term, first_mentions, terms
from bdlib.book.pages import GLOSSARY

# Tag of a code cell -> the line that opens it.  These are folded at first; all other code is open.
FOLDED = {"solution": "Solution", "check": "Test of the exercise"}


def setup(app) -> dict:
    """Sphinx's entry point."""
    app.connect("doctree-resolved", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def finish(app, tree, page: str) -> None:
    """Number, fold, describe and link, in place."""
    number_equations(tree)
    fold_code(tree)
    share_alt_texts(tree)
    known = terms((app.srcdir / GLOSSARY).read_text(encoding="utf-8"))
    address = app.builder.get_relative_uri(page, GLOSSARY.removesuffix(".md"))
    if page == GLOSSARY.removesuffix(".md"):
        link_terms_of_glossary(tree, known, address)
    elif page != "index":  # the first page explains its words itself
        link_terms(tree, known, address)


def number_equations(tree) -> None:
    """(2.1) beside the equation whose target is eq-2-1."""
    from docutils import nodes

    for equation in tree.findall(nodes.math_block):
        for name in equation["ids"]:
            if found := re.fullmatch(r"eq-(\d+)-(\d+)", name):
                equation["number"] = f"{found[1]}.{found[2]}"


def fold_code(tree) -> None:
    """The code of each cell becomes an element that a click folds."""
    from docutils import nodes

    for cell in list(tree.findall(nodes.container)):
        if cell.get("nb_element") != "cell_code_source":
            continue
        tag = next((tag for tag in FOLDED if f"tag_{tag}" in cell.parent["classes"]), None)
        opened = f'<details class="code {tag}">' if tag else '<details class="code" open>'
        line = f"{opened}<summary>{FOLDED.get(tag, 'Code')}</summary>"
        cell.children = [nodes.raw("", line, format="html"), *cell.children, nodes.raw("", "</details>", format="html")]


def share_alt_texts(tree) -> None:
    """A cell with several figures has one text for all, "(1) ... (2) ...": each figure gets its own part."""
    from docutils import nodes

    for output in tree.findall(nodes.container):
        if output.get("nb_element") != "cell_code_output":
            continue
        figures = list(output.findall(nodes.image))
        parts = re.split(r"\(\d\) ", figures[0].get("alt", ""))[1:] if figures else []
        for figure, part in zip(figures, parts, strict=False):
            figure["alt"] = part.strip()


def link_terms_of_glossary(tree, known: list[Term], address: str) -> None:
    """In each definition, its first mention of every other term."""
    from docutils import nodes

    for section in tree.findall(nodes.section):
        own = [term for term in known if term.anchor in section["ids"]]
        if own:
            link_terms(section, [term for term in known if term not in own], address)


def link_terms(tree, known: list[Term], address: str) -> None:
    """The first mention of each term below `tree` becomes a link to the glossary at `address`."""
    texts = prose(tree)
    mentions = first_mentions([text.astext() for text in texts], known)
    for text, found in zip(texts, mentions, strict=True):
        if found:
            text.parent.replace(text, linked(text.astext(), found, address))


def prose(tree) -> list:
    """The texts that are neither code, heading, link, formula nor output of a cell."""
    from docutils import nodes

    apart = (
        nodes.literal,
        nodes.FixedTextElement,
        nodes.title,
        nodes.reference,
        nodes.math,
        nodes.math_block,
        nodes.raw,
    )

    def is_prose(text) -> bool:
        node = text.parent
        while node is not None and node is not tree.parent:
            if isinstance(node, apart) or "cell_output" in node.get("classes", []):
                return False
            node = node.parent
        return True

    return [text for text in tree.findall(nodes.Text) if is_prose(text)]


def linked(text: str, found: list[tuple[slice, Term]], address: str) -> list:
    """The text's nodes, with a link at each place found; its tip is the definition."""
    from docutils import nodes

    result, end = [], 0
    for place, term in found:
        result.append(nodes.Text(text[end : place.start]))
        tip = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`$]", r"\1", term.meaning)
        link = nodes.reference("", text[place], refuri=f"{address}#{term.anchor}", internal=True, reftitle=tip)
        link["classes"].append("term")
        result.append(link)
        end = place.stop
    return [*result, nodes.Text(text[end:])]
