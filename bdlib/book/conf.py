"""Sphinx's settings for the book; bdlib/book/__main__.py runs it."""

from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
# MathJax as SVG, from the wheel of sphinx-mathjax-offline: one file with its glyphs inside works from file:// and needs no network.
# The native MathML of latex2mathml depends on the reader's fonts; the pictures of ziamath have no text that a screen reader can say.
MATHJAX = Path(find_spec("sphinx-mathjax-offline").submodule_search_locations[0]) / "static" / "mathjax" / "tex-svg.js"

project = "Five backdoor defenses, rerun"
html_title = project
author = "the authors of bdlib"
copyright = "prose and figures CC BY 4.0, code MIT"
language = "en"

extensions = ["myst_nb", "bdlib.book.tree"]
root_doc = "index"
smartquotes = False
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # no scripts from a network
myst_enable_extensions = ["attrs_block", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_static_path = [str(HERE / "static"), str(MATHJAX)]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_favicon = str(HERE / "static" / "favicon.svg")
html_copy_source = False
html_show_sourcelink = False
html_use_index = False
html_show_search_summary = False  # it fetches pages, which a browser refuses on file://
pygments_style = "friendly"
pygments_dark_style = "github-dark"
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}  # the menu would load files that are not here
