"""python -m bdlib.book [--out build/book] [--for-students]: build the site from the notebooks' stored outputs; nothing is executed."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from bdlib.book import pages
from bdlib.places import project_root


def main(arguments: list[str] | None = None) -> int:
    """0 if the site stands in --out, else Sphinx's status: any warning, such as a broken link, and --out stays as it was."""
    parser = argparse.ArgumentParser(prog="python -m bdlib.book", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=project_root() / "build" / "book", help="folder of the site (default: build/book)"
    )
    parser.add_argument(
        "--for-students",
        action="store_true",
        help="leave out the exercises' solutions and tests, and the teacher's guide with its answer key",
    )
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if not replaceable(out):
        parser.error(
            f"--out must be a folder that is new, empty or an earlier book, as all in it is deleted: got {out}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        work = Path(folder)
        pages.assemble(project_root(), work / "source", for_students=options.for_students)
        status = run_sphinx(work)
        if status == 0:
            shutil.rmtree(out, ignore_errors=True)
            (work / "html").rename(out)
            print(f"the book: {out / 'index.html'}")
    return status


def replaceable(out: Path) -> bool:
    """Whether a book may take this folder's place: nothing is there, or a site that Sphinx wrote."""
    return not out.exists() or (out.is_dir() and ((out / ".buildinfo").exists() or not any(out.iterdir())))


def run_sphinx(work: Path) -> int:
    """Sphinx's exit status for work/source, with the site in work/html; all warnings are shown, and each is an error."""
    from sphinx.cmd.build import main as sphinx

    settings = Path(__file__).parent
    options = ["-b", "html", "-q", "-W", "--keep-going", "-c", str(settings), "-d", str(work / "doctrees")]
    return sphinx([*options, str(work / "source"), str(work / "html")])


if __name__ == "__main__":
    sys.exit(main())
