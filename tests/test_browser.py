"""What a reader sees, in headless Chromium: JupyterLab as `make lab` opens it, a notebook run by hand, the panel of 00, the book."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat.sign
import pytest

from bdlib import places
from tests.stored import NOTEBOOKS, ROOT, cells, figures, source

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOTS = ROOT / "build" / "screenshots"
MINUTE = 60_000  # milliseconds
DESK, PHONE = {"width": 1400, "height": 1000}, {"width": 390, "height": 844}
HERE = re.compile(r"https?://(127\.0\.0\.1|localhost)[:/]|data:|blob:")
# What JupyterLab 4 draws errors as, and what a cell writes to standard error.
ERROR, STDERR = (f'[data-mime-type="application/vnd.jupyter.{kind}"]' for kind in ("error", "stderr"))
DEAD = ("Error displaying widget", "Loading widget")
INDICATOR = ".jp-Notebook-ExecutionIndicator"
PROMPTS = "[...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')].map(e => e.textContent.trim())"

# Once in dozens of runs on a busy machine a page of JupyterLab stands still; what is wrong here fails twice.
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: neither chromium nor google-chrome is installed"),
    pytest.mark.flaky(reruns=1),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox does not work for root, nor in most containers.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """An empty page of a desk's size; other hosts than this one are out of reach."""
    opened = browser.new_page(viewport=DESK)
    opened.route(lambda url: not HERE.match(url), lambda route: route.abort())
    yield opened
    opened.close()


def screenshot(page, name):
    """Keep what the page shows as build/screenshots/NAME.png."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


# JupyterLab


class Lab:
    """A running JupyterLab: its address with the token, and what it opened in the browser by itself."""

    def __init__(self, port: int, folder: Path):
        self.address, self.folder = f"http://127.0.0.1:{port}", folder

    def opened(self) -> str:
        """The address that JupyterLab gave to the browser."""
        return re.search(r'href="([^"]+)"', (self.folder / "opened.html").read_text()).group(1)

    def notebook(self, name: str) -> str:
        """The address of another notebook, in an empty workspace."""
        return self.opened().replace("00_backdoors", name) + "&reset"

    def kernel_answers(self) -> bool:
        """Whether the server has heard a kernel say that it is idle, and a page is connected with it."""
        kernels = [session["kernel"] for session in self.ask("sessions")]
        return any(kernel["execution_state"] == "idle" and kernel["connections"] for kernel in kernels)

    def end_kernels(self) -> None:
        """Shut every kernel down: they hold memory."""
        for session in self.ask("sessions"):
            self.ask(f"sessions/{session['id']}", "DELETE")

    def ask(self, what: str, method: str = "GET"):
        """What the server's API answers."""
        request = urllib.request.Request(f"{self.address}/api/{what}?token=known", method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def lab_command() -> list[str]:
    """What `make lab` runs after its `python -m`."""
    recipe = re.search(r"^lab:.*\n\t\$\(PYTHON\) -m (.+)$", (ROOT / "Makefile").read_text(), re.M).group(1)
    return [sys.executable, "-m", *shlex.split(recipe)]


def copy_notebooks(folder: Path) -> None:
    """The stored notebooks in folder/notebooks, and in folder/notebooks/empty the same without outputs."""
    (folder / "notebooks" / "empty").mkdir(parents=True)
    for path in NOTEBOOKS:
        shutil.copy(path, folder / "notebooks")
        stored = json.loads(path.read_text(encoding="utf-8"))
        for cell in stored["cells"]:
            if cell["cell_type"] == "code":
                cell.update(outputs=[], execution_count=None)
        (folder / "notebooks" / "empty" / path.name).write_text(json.dumps(stored), encoding="utf-8")


def lab_environment(folder: Path) -> dict[str, str]:
    """Ours, with Jupyter's and IPython's folders in this one, a "browser" that keeps what it is given, and settings for a test."""
    own = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    jupyter = {f"JUPYTER_{name}": str(folder / name) for name in own} | {"IPYTHONDIR": str(folder / "ipython")}
    jupyter |= {f"JUPYTERLAB_{name}_DIR": str(folder / name) for name in ("SETTINGS", "WORKSPACES")}
    settings = {
        "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page, in sight or not
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, values in settings.items():
        path = folder / "SETTINGS" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    keep = folder / "browser.sh"
    keep.write_text(f'#!/bin/sh\ncp "${{1#file://}}" {folder}/part && mv {folder}/part {folder}/opened.html\n')
    keep.chmod(0o755)
    return os.environ | jupyter | {"PYTHONPATH": places.python_path(), "BROWSER": f"{keep} %s"}


@contextmanager
def running(command: list[str], folder: Path, ready: Path):
    """The command in this folder, its output in folder/log.txt, from the time that the file `ready` is there; ended in any case."""
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=lab_environment(folder),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()[-4000:]
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """JupyterLab by the command of `make lab`, on a copy of the notebooks; kernels find bdlib and the store as any process here."""
    folder, port = tmp_path_factory.mktemp("lab"), free_port()
    copy_notebooks(folder)
    options = [f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=known", "--allow-root"]
    with running([*lab_command(), *options], folder, folder / "opened.html"):
        yield Lab(port, folder)


@pytest.fixture
def lab(server):
    yield server
    server.end_kernels()


def stored_cells(name):
    """The code cells of a stored notebook."""
    return cells(ROOT / "notebooks" / f"{name}.ipynb", "code")


def open_notebook(page, lab, address):
    """Open a notebook in JupyterLab and wait until its kernel answers and all of its cells are there."""
    page.goto(address)
    page.wait_for_selector(f'{INDICATOR}[data-status="idle"]', timeout=2 * MINUTE)
    # The page can say "idle" before there is a process, and then lose what it is asked to run.
    deadline = time.monotonic() + 120
    while not lab.kernel_answers():
        assert time.monotonic() < deadline, f"no kernel of {address} answered.  {state(page)}"
        page.wait_for_timeout(200)  # not time.sleep: the page's own requests pass through this process
    count = len(stored_cells(re.search(r"(\w+)\.ipynb", address).group(1)))
    page.wait_for_function(f"() => {PROMPTS}.length === {count}", timeout=MINUTE, polling=500)


def choose(page, menu, item):
    """Click on an item of one of JupyterLab's menus."""
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem", name=item, exact=True).click()


def run_by_menu(page, item):
    """Click on an item of the menu "Run", and see that a cell waits or has run."""
    choose(page, "Run", item)
    begun = f"() => {PROMPTS}.some(prompt => prompt !== '[ ]:')"
    try:
        page.wait_for_function(begun, timeout=MINUTE / 2, polling=100)
    except sync_api.TimeoutError:
        pytest.fail(f"{item!r} began nothing.  {state(page)}")


def wait_for_cell(page, number, timeout):
    """Wait until the code cell at this position has an execution number, or any cell has failed; a dead kernel, too, ends it."""
    ended = f"""() => /^\\[\\d+\\]/.test({PROMPTS}.at({number})) || document.querySelector('{ERROR}, .jp-Dialog')
        || document.querySelector('{INDICATOR}').dataset.status.match(/dead|restarting|disconnected/)"""
    try:
        page.wait_for_function(ended, timeout=timeout, polling=500)  # an idle page draws no frames to look at
    except sync_api.TimeoutError:
        pytest.fail(f"code cell {number} did not run within {timeout / MINUTE:g} minutes.  {state(page)}")
    assert page.locator(".jp-Dialog").count() == 0, state(page)
    assert page.locator(INDICATOR).get_attribute("data-status") in ("idle", "busy"), state(page)


def state(page):
    """What a page that went wrong shows, for the message of a failed test; its picture is build/screenshots/failed.png."""
    screenshot(page, "failed")
    kernel, dialogs = page.locator(INDICATOR).get_attribute("data-status"), page.locator(".jp-Dialog").all_inner_texts()
    said = page.locator(STDERR).all_inner_texts()[-3:]
    return f"kernel: {kernel}; cells: {page.evaluate(PROMPTS)}; dialogs: {dialogs}; standard error: {said}"


def complaints_of_cells(page):
    """Every error, and every line on standard error but the store's that another test's process trains a model just now."""
    lines = "".join(page.locator(STDERR).all_inner_texts()).splitlines()
    waiting = re.compile(r"another process is making model \w+: waiting for it")
    return page.locator(ERROR).all_inner_texts() + [line for line in lines if not waiting.fullmatch(line)]


def pictures(page):
    """Width in pixels of each figure below a cell."""
    return page.evaluate("[...document.querySelectorAll('.jp-OutputArea-output img')].map(e => e.naturalWidth)")


def stored_pictures(name):
    """How many figures a stored notebook has."""
    return sum(len(figures(cell)) for cell in stored_cells(name))


def test_make_lab_opens_on_00_beside_the_other_notebooks(lab, page):
    open_notebook(page, lab, lab.opened())
    assert page.title().startswith("00_backdoors")
    beside = page.locator(".jp-DirListing-itemText").all_inner_texts()
    assert [name for name in beside if name.endswith(".ipynb")] == sorted(path.name for path in NOTEBOOKS)
    screenshot(page, "make_lab")


def test_run_all_of_02_ends_without_an_error_and_shows_its_figures(lab, page):
    open_notebook(page, lab, lab.notebook("empty/02_awm"))
    assert not pictures(page) and set(page.evaluate(PROMPTS)) == {"[ ]:"}
    run_by_menu(page, "Run All Cells")
    wait_for_cell(page, -1, 20 * MINUTE)  # four when nothing else runs
    screenshot(page, "02_awm_last_cell")
    assert complaints_of_cells(page) == []
    prompts = page.evaluate(PROMPTS)
    assert prompts == [f"[{number}]:" for number in range(1, len(prompts) + 1)]
    assert len(pictures(page)) == stored_pictures("02_awm") > 0 and min(pictures(page)) > 0
    page.locator(".jp-OutputArea-output img").last.scroll_into_view_if_needed()
    screenshot(page, "02_awm_last_figure")


def test_moving_a_slider_of_the_panel_changes_what_is_shown(lab, page):
    open_notebook(page, lab, lab.notebook("empty/00_backdoors"))
    number = next(k for k, cell in enumerate(stored_cells("00_backdoors")) if "play.show(" in source(cell))
    cell, expect = page.locator(".jp-CodeCell").nth(number), sync_api.expect
    editor = cell.locator(".jp-InputArea-editor")
    editor.click()
    expect(cell).to_have_class(re.compile("jp-mod-active"))  # or "above" may mean above another cell
    run_by_menu(page, "Run All Above Selected Cell")
    wait_for_cell(page, number - 1, 10 * MINUTE)
    editor.click()
    expect(cell).to_have_class(re.compile("jp-mod-active"))
    page.keyboard.press("Control+Enter")
    wait_for_cell(page, number, 10 * MINUTE)
    assert complaints_of_cells(page) == []
    panel = page.locator(".bdlib-play")
    panel.scroll_into_view_if_needed()
    screenshot(page, "panel_full_strength")
    clean, triggered = panel.locator("img").all()
    assert "called circle bar" in triggered.get_attribute("alt") and "called circle bar" not in clean.get_attribute(
        "alt"
    )
    full = triggered.get_attribute("src")
    strength = panel.locator(".widget-slider", has_text="strength").locator(".noUi-handle")
    strength.press("ArrowLeft")
    expect(panel).to_contain_text("95% of it")
    expect(triggered).not_to_have_attribute("src", full)
    strength.press("Home")
    expect(panel).to_contain_text("0% of it")
    expect(triggered).to_have_attribute("src", clean.get_attribute("src"))
    assert "called circle bar" not in triggered.get_attribute("alt")
    screenshot(page, "panel_strength_0")


def trust(path: Path) -> None:
    """Sign a notebook, as JupyterLab does when its reader trusts it: only then does it draw a widget, a dead one too."""
    notary = nbformat.sign.NotebookNotary(data_dir=str(path.parents[1] / "DATA_DIR"))
    notary.sign(nbformat.read(path, 4))
    notary.store.close()


def test_the_stored_00_shows_the_static_figure_and_no_dead_widget(lab, page):
    trust(lab.folder / "notebooks" / "00_backdoors.ipynb")
    open_notebook(page, lab, lab.notebook("00_backdoors"))
    cells = page.locator(".jp-CodeCell")
    figure = cells.filter(has_text="play.figure(").locator(".jp-OutputArea-output img")
    figure.scroll_into_view_if_needed()
    assert figure.evaluate("e => e.naturalWidth") > 500
    assert len(pictures(page)) == stored_pictures("00_backdoors") and min(pictures(page)) > 0
    (said,) = cells.filter(has_text="play.show(").locator(".jp-OutputArea-output").all_inner_texts()
    assert said.startswith("Live in JupyterLab") and not [
        text for text in DEAD if text in page.locator(".jp-Notebook").inner_text()
    ]
    screenshot(page, "00_stored")


# The book


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def book(built):
    """The folder of the book, built from the stored notebooks."""
    process, folder = built
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def pages(book):
    """The address of every page of the book."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=book))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    start = f"http://127.0.0.1:{server.server_port}/"
    yield [start + path.relative_to(book).as_posix() for path in sorted(book.rglob("*.html"))]
    server.shutdown()
    server.server_close()


@pytest.fixture
def complaints(page):
    """What goes wrong while pages load, a line each: console errors, exceptions, requests that fail or go elsewhere."""
    found = []
    page.on("console", lambda message: message.type == "error" and found.append(f"{page.url}: console: {message.text}"))
    page.on("pageerror", lambda error: found.append(f"{page.url}: {error}"))
    page.on("requestfailed", lambda request: found.append(f"{page.url}: {request.url} {request.failure}"))
    page.on(
        "response", lambda answer: answer.status >= 400 and found.append(f"{page.url}: {answer.url} {answer.status}")
    )
    return found


# Images that load only when they come into sight are told to load; resolves to the addresses of those that cannot be shown.
BROKEN_IMAGES = """async () => {
  const images = [...document.images];
  images.forEach(image => image.loading = 'eager');
  await Promise.all(images.map(image => image.decode().catch(() => 0)));
  return images.filter(image => !image.naturalWidth).map(image => image.src);
}"""
# Text of a page that a reader sees as TeX: not in code, and not what the renderer keeps for copying.
RAW_TEX = r"""() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  for (let node; (node = walker.nextNode());)
    if (/\$\$|\$[^\s$][^$]*\$|\\(frac|mathcal|ell|odot|delta|begin|text|max)\b|\\[(\[]/.test(node.data)
        && !node.parentElement.closest('pre, code, script, style, math, mjx-container, .katex'))
      found.push(node.data.trim().slice(0, 80));
  return found;
}"""
FORMULAS = "mjx-container, .katex, math"
LINKS = "[...document.querySelectorAll('a[href]')].map(e => e.href)"
IDS = "[...document.querySelectorAll('[id]')].map(e => e.id)"
# Pixels by which the text is wider than a box around it that scrolls or cuts, up to the window: nobody should move it sideways.
OVERFLOW = """() => {
  const wider = [document.documentElement.scrollWidth - innerWidth];
  for (let box = document.querySelector('article'); box; box = box.parentElement)
    if (getComputedStyle(box).overflowX !== 'visible') wider.push(box.scrollWidth - box.clientWidth);
  return Math.max(...wider);
}"""


def test_every_page_of_the_book_loads_whole(pages, page, complaints):
    for address in pages:
        page.goto(address, wait_until="networkidle")
        complaints += [f"{address}: image {source}" for source in page.evaluate(BROKEN_IMAGES)]
    assert complaints == [] and len(pages) > len(NOTEBOOKS)


def test_no_link_of_the_book_leads_nowhere(pages, page):
    links, ids = {}, {}
    for address in pages:
        page.goto(address)
        links[address], ids[address] = page.evaluate(LINKS), set(page.evaluate(IDS))
    start = pages[0][: pages[0].index("/", len("http://")) + 1]
    dead = []
    for address, targets in links.items():
        for target in (target for target in targets if target.startswith(start)):
            place, anchor = urldefrag(target)
            place += "index.html" if place.endswith("/") else ""
            gone = anchor and unquote(anchor) not in ids.get(place, ()) if place in ids else not answers(place)
            dead += [f"{address}: {target}"] if gone else []
    assert dead == [] and sum(map(len, links.values())) > 100


def answers(address: str) -> bool:
    """Whether there is something at this address."""
    try:
        with urllib.request.urlopen(address, timeout=10):
            return True
    except urllib.error.HTTPError:
        return False


def test_mathematics_is_rendered(pages, page):
    raw, rendered = [], {}
    for address in pages:
        page.goto(address, wait_until="networkidle")
        raw += [f"{address}: {text}" for text in page.evaluate(RAW_TEX)]
        rendered[address] = page.locator(FORMULAS).count()
    assert raw == []
    for path in (ROOT / "notebooks").glob("0[0-5]*.ipynb"):
        assert max(count for address, count in rendered.items() if path.stem in address) > 0, path.stem


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_no_page_is_wider_than_the_screen(pages, page, size, scheme):
    page.set_viewport_size(size)
    page.emulate_media(color_scheme=scheme)
    wide = {}
    for address in pages:
        page.goto(address, wait_until="networkidle")
        wide[address] = page.evaluate(OVERFLOW)
        if address.endswith(("/index.html", "/02_awm.html")):
            screenshot(page, f"book_{Path(address).stem}_{size['width']}_{scheme}")
    assert {address: pixels for address, pixels in wide.items() if pixels > 0} == {}


def test_dark_mode_is_dark(pages, page):
    page.goto(next(address for address in pages if address.endswith("02_awm.html")))
    brightness = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness[scheme] = max(map(int, re.findall(r"\d+", color)[:3]))
    assert brightness["dark"] < 60 and brightness["light"] > 200
