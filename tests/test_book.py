"""The book: built once from the stored notebooks, then every page, link, figure and equation of it is looked at."""

import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from bdlib.book import __main__ as command
from bdlib.book import front, glossary, outputs, pages, prose
from tests.stored import NOTEBOOKS, ROOT, cells, figures, source

MB = 1_000_000
LOADED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}


@pytest.fixture(scope="session")
def book(built):
    """Every page, parsed, by its file."""
    process, out = built
    assert process.returncode == 0, process.stderr
    return {
        file: BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser") for file in sorted(out.rglob("*.html"))
    }


def page(book, name: str) -> BeautifulSoup:
    return next(tree for file, tree in book.items() if file.name == f"{name}.html")


def loads(tree: BeautifulSoup) -> list[str]:
    """The addresses of all that a browser fetches to show the page."""
    found = [tag[name] for kind, name in LOADED.items() for tag in tree.find_all(kind) if tag.get(name)]
    found += [link["href"] for link in tree.find_all("link") if {"stylesheet", "icon", "preload"} & set(link["rel"])]
    styles = [*(tag["style"] for tag in tree.find_all(style=True)), *(tag.get_text() for tag in tree.find_all("style"))]
    return found + [address for style in styles for address in style_loads(style)]


def style_loads(style: str) -> list[str]:
    imports = re.findall(r"@import\s+['\"]([^'\"]+)", style)
    return imports + re.findall(r"url\(\s*['\"]?([^'\")]+)", style)


def on_disk(file: Path, address: str) -> Path:
    return (file.parent / unquote(urlsplit(address).path)).resolve()


def fetched(file: Path, tree: BeautifulSoup) -> set[Path]:
    """The files that the page and its style sheets load, itself among them; data: addresses are part of it."""
    files = {file}
    for address in loads(tree):
        if not address.startswith("data:"):
            files.add(on_disk(file, address))
    for sheet in [path for path in files if path.suffix == ".css"]:
        files |= {
            on_disk(sheet, address) for address in style_loads(sheet.read_text()) if not address.startswith("data:")
        }
    return files


def test_sphinx_has_nothing_to_complain_of(built):
    process, _ = built
    assert process.returncode == 0, process.stderr
    assert "WARNING" not in process.stderr


def test_the_site_and_its_first_page_are_small(built, book):
    _, out = built
    assert sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) <= 40 * MB
    first = out / "index.html"
    assert sum(file.stat().st_size for file in fetched(first, book[first])) < MB


def test_nothing_is_loaded_from_a_network(built, book):
    _, out = built
    addresses = [address for tree in book.values() for address in loads(tree)]
    addresses += [address for sheet in out.rglob("*.css") for address in style_loads(sheet.read_text())]
    assert addresses
    assert [address for address in addresses if address.startswith(("http:", "https:", "//"))] == []
    for file, tree in book.items():
        assert [path for path in fetched(file, tree) if not path.is_file()] == [], file.name


def test_every_link_leads_somewhere(book):
    anchors = {
        file: {tag["id"] for tag in tree.find_all(id=True)}
        | {tag["name"] for tag in tree.find_all("a", attrs={"name": True})}
        for file, tree in book.items()
    }
    broken = []
    for file, tree in book.items():
        for link in tree.find_all("a", href=True):
            address = urlsplit(link["href"])
            if address.scheme:
                continue
            target = on_disk(file, link["href"]) if address.path else file
            if not target.is_file() or (
                address.fragment and unquote(address.fragment) not in anchors.get(target, set())
            ):
                broken.append((file.name, link["href"]))
    assert broken == []


def test_every_figure_has_a_text(book):
    images = [(file.name, img) for file, tree in book.items() for img in tree.find_all("img")]
    assert len(images) >= 40
    assert [(name, img["src"][:80]) for name, img in images if not img.get("alt", "").strip()] == []
    assert [name for name, img in images if "(1) " in img["alt"] or "_images/" in img["alt"]] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_that_draws_has_a_text(notebook):
    drawing = [cell for cell in cells(notebook, "code") if figures(cell)]
    assert drawing
    without = [source(cell)[:60] for cell in drawing if not alt(cell)]
    assert without == []
    for cell in drawing:
        count = len(figures(cell))
        assert len(re.findall(r"\(\d\) ", alt(cell))) == (count if count > 1 else 0)


def alt(cell: dict) -> str:
    return cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "").strip()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_code_cell_can_be_folded(book, notebook):
    inputs = page(book, notebook.stem).select("div.cell_input")
    assert len(inputs) == len([cell for cell in cells(notebook, "code") if source(cell).strip()])
    for shown in inputs:
        fold = shown.find("details")
        assert fold.find("summary") and fold.find("pre")
        graded = {"tag_solution", "tag_check"} & set(shown.parent["class"])
        assert fold.has_attr("open") != bool(graded)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_equation_is_there_with_its_number(book, notebook):
    text = "\n\n".join(source(cell) for cell in cells(notebook, "markdown"))
    equations = re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)
    chapter, tree = int(notebook.name[:2]), page(book, notebook.stem)
    assert len(tree.select("div.math")) == len(equations)
    for number, equation in enumerate(equations, start=1):
        shown = tree.find(id=f"eq-{chapter}-{number}")
        assert shown.find(class_="eqno").get_text().startswith(f"({chapter}.{number})")
        assert "".join(equation.split()) in "".join(shown.get_text().split())


def test_every_term_is_in_the_glossary_and_linked(book):
    known = glossary.terms((ROOT / "notebooks" / "glossary.md").read_text(encoding="utf-8"))
    assert len(known) >= 60
    tree = page(book, "glossary")
    assert [term.heading for term in known if not tree.find(id=term.anchor)] == []
    links = {
        urlsplit(link["href"]).fragment
        for file, other in book.items()
        if file.name != "glossary.html"
        for link in other.select("a.term")
    }
    assert [term.heading for term in known if term.anchor not in links] == []


def test_a_page_links_a_term_once_and_not_in_code(book):
    for name in ("00_backdoors", "02_awm"):
        links = [link["href"] for link in page(book, name).select("article a.term")]
        assert len(links) == len(set(links)) > 5
        assert page(book, name).select("pre a.term, h1 a.term, h2 a.term, .cell_output a.term, code a.term") == []


def test_pictures_keep_their_colors_and_charts_do_not(book):
    awm = page(book, "02_awm").select("div.cell_output img")
    assert {"picture" in img.get("class", []) for img in awm} == {True, False}
    assert "picture" in awm[0]["class"]  # the strip of images


def test_first_page_prints_the_means_of_the_rows(book):
    rows = pd.read_csv(ROOT / "figures" / "awm_rows.csv")
    rows = rows[(rows["budget"] == 10) & (rows["variant"] == "soft") & (rows["dataset"] == "signs")]
    line = next(tr for tr in page(book, "index").find_all("tr") if "one-shot" in tr.get_text())
    shown = [float(number) for cell in line.find_all("td")[1:3] for number in re.findall(r"\d+\.\d", cell.get_text())]
    assert shown == [round(100 * rows[name].mean(), 1) for name in ("asr_before", "asr", "acc_before", "acc")]
    assert len(page(book, "index").select("table.papers tbody tr")) == len(front.LINES)


def test_a_line_without_rows_is_an_error():
    with pytest.raises(ValueError, match="one row a seed"):
        front.measured(ROOT, replace(front.LINES[0], attack="none such"))


def test_the_built_pages_name_no_machine(book):
    for file, tree in book.items():
        assert not re.search(r"/tmp/|/home/|site-packages", tree.get_text()), file.name


def test_a_book_for_students_answers_no_exercise(tmp_path):
    pages.assemble(ROOT, tmp_path, for_students=True)
    assert (
        not (tmp_path / "notebooks" / "teachers_guide.md").exists()
        and "Teach" not in (tmp_path / "index.md").read_text()
    )
    for path in NOTEBOOKS:
        whole, given = cells(path), cells(tmp_path / "notebooks" / path.name)
        graded = [cell for cell in whole if "nbgrader" in cell["metadata"]]
        assert len(graded) == (10 if "01" <= path.name < "06" else 0) and len(given) == len(whole) - len(graded)
        assert not any("BEGIN SOLUTION" in source(cell) for cell in given)


def test_no_folder_but_an_earlier_book_is_replaced(tmp_path, monkeypatch, capsys):
    def site(work):
        (work / "html").mkdir(parents=True)
        (work / "html" / ".buildinfo").write_text("Sphinx was here")
        return 0

    monkeypatch.setattr(command, "run_sphinx", site)
    monkeypatch.setattr(pages, "assemble", lambda *_, **__: None)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        command.main(["--out", str(tmp_path / "thesis")])
    assert stopped.value.code == 2 and str(tmp_path / "thesis") in capsys.readouterr().err
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/book", "new/book"):
        assert command.main(["--out", str(tmp_path / name)]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["book"]


def test_progress_ends_as_a_terminal_shows_it():
    bar = "\r 10%|#  | 1/10\r100%|###| 10/10"
    assert outputs.last_line_of_progress(bar + "\ndone\n") == "100%|###| 10/10\ndone\n"
    assert outputs.last_line_of_progress(bar + "\r      \rdone\n\nagain\n") == "done\n\nagain\n"
    assert outputs.last_line_of_progress(bar + "\r      \r\n") == "\n"


def test_outputs_lose_warnings_bars_and_dead_widgets():
    def stream(name, text):
        return {"output_type": "stream", "name": name, "text": text}

    widget = {outputs.WIDGET: {}, "text/plain": "HBox()"}
    kept = outputs.readable(
        [
            stream("stdout", "\r 10%"),
            stream("stderr", "TqdmWarning"),
            stream("stdout", "\r    \r"),
            {"output_type": "display_data", "data": dict(widget)},
            {"output_type": "display_data", "data": widget | {"image/png": "iVBO"}},
            stream("stdout", "yes\n"),
        ]
    )
    assert [each.get("text") or sorted(each["data"]) for each in kept] == [["image/png", "text/plain"], "yes\n"]


LINKS = {
    "[(2.1)](02_b.ipynb#eq-2-1)": "[(2.1)](#eq-2-1)",
    "[b](02_b.ipynb#The-Idea)": "[b](02_b.ipynb#the-idea)",
    "[rows](../figures/x.csv)": "[rows](../figures/x.csv)",
    "[guide](guide.md)": "guide",  # a page that is not written yet
    "[all](../figures)": "all",
    "[typo](missing.md)": "[typo](missing.md)",  # Sphinx complains of it
    "[web](https://a.b/c#D)": "[web](https://a.b/c#D)",
    "`[c](guide.md)`": "`[c](guide.md)`",
}


@pytest.fixture
def here(tmp_path):
    for place in ("notebooks/01_a.ipynb", "notebooks/02_b.ipynb", "figures/x.csv"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
    known = {"pages": frozenset({"notebooks/02_b.ipynb"}), "absent": frozenset({"notebooks/guide.md"})}
    return prose.Page(root=tmp_path, place="notebooks/01_a.ipynb", **known)


def test_links_become_what_the_book_resolves(here):
    changed, files = prose.prepare(" ".join(LINKS), here)
    assert changed == " ".join(LINKS.values())
    assert files == ["figures/x.csv"]


def test_equations_get_a_target_and_code_stays(here):
    text = "a\n\n$$x$$\n\n```\n$$y$$\n```\n\n> $$z$$\n"
    numbered, _ = prose.prepare(text, here, prose.equation_numbers(here))
    assert numbered == "a\n\n(eq-1-1)=\n$$x$$\n\n```\n$$y$$\n```\n\n> (eq-1-2)=\n> $$z$$\n"


def test_terms_are_found_in_all_their_forms():
    known = glossary.terms(
        "### Poison rate\n\nA share.\n\n### Attack success rate (ASR)\n\nAnother\nshare.\n\n### 00 · x\n\n| a |\n"
    )
    assert [(term.anchor, term.meaning) for term in known] == [
        ("term-poison-rate", "A share."),
        ("term-attack-success-rate", "Another share."),
    ]
    texts = ["no asr here, but Poison-rates", "and ASR, the poison rate, ASR", "FT-ASR"]
    found = list(glossary.first_mentions(texts, known))
    assert [[text[place] for place, _ in each] for text, each in zip(texts, found, strict=True)] == [
        ["Poison-rates"],
        ["ASR"],
        [],
    ]
