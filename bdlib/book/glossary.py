"""The terms of notebooks/glossary.md, and where a page mentions them first."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

ENTRY = re.compile(r"^### (?P<heading>[^\n]+)\n\n(?P<meaning>[^|#\n][^\n]*(?:\n[^\n]+)*)", re.MULTILINE)


@dataclass(frozen=True)
class Term:
    """One entry of the glossary."""

    heading: str  # "Attack success rate (ASR)"
    meaning: str  # the paragraph below it

    @property
    def forms(self) -> list[str]:
        """The ways in which prose mentions it: what stands before the parentheses, and what in them, between commas."""
        return [form.strip() for form in re.split(r"[(),]", self.heading) if form.strip()]

    @property
    def anchor(self) -> str:
        return "term-" + re.sub(r"[^a-z0-9]+", "-", self.forms[0].lower()).strip("-")


def terms(text: str) -> list[Term]:
    """The entries of the glossary: headings of the third level with a paragraph below; below those of symbols stands a table."""
    return [Term(found["heading"], " ".join(found["meaning"].split())) for found in ENTRY.finditer(text)]


def pattern(known: Iterable[Term]) -> tuple[re.Pattern, dict[str, Term]]:
    """What finds any mention of any term, the longest first, and the term of each of its groups."""
    forms = sorted(((form, term) for term in known for form in term.forms), key=lambda pair: -len(pair[0]))
    groups = {f"form{index}": term for index, (_, term) in enumerate(forms)}
    ways = (f"(?P<{group}>{expression(form)})" for group, (form, _) in zip(groups, forms, strict=True))
    return re.compile(rf"(?<![\w/-])(?:{'|'.join(ways)})(?![\w/-])"), groups


def expression(form: str) -> str:
    """A regular expression of the form, its words joined by spaces or hyphens.

    A name with capitals stands as it is, other words in any case and also as a plural.
    """
    words = r"[\s-]+".join(re.escape(word) for word in re.split(r"[\s-]+", form))
    if sum(letter.isupper() for letter in form) > 1:
        return words
    return rf"(?i:{words}(?:s|es)?)"


def first_mentions(texts: Iterable[str], known: Iterable[Term]) -> Iterator[list[tuple[slice, Term]]]:
    """For each text in turn: where terms stand in it that no text before it mentions."""
    finder, groups = pattern(known)
    seen = set()
    for text in texts:
        found = []
        for mention in finder.finditer(text):
            term = groups[mention.lastgroup]
            if term not in seen:
                seen.add(term)
                found.append((slice(*mention.span()), term))
        yield found
