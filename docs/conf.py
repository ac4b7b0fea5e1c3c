"""How Sphinx builds the site: `make docs`. Pages with code cells are executed, and one that fails fails the build."""

import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

# Cells call `lasnn` and `python` of this environment; one thread each, so that the same page has the same figures.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("OMP_NUM_THREADS", "1")
# IPython asks for colours, which lasnn leaves out of what is piped.
os.environ |= {"TTY_COMPATIBLE": "0", "NO_COLOR": "1", "COLUMNS": "100"}
# The kernels' profile, which goes with this process.
ipython = TemporaryDirectory()
startup = Path(ipython.name, "profile_default", "startup")
startup.mkdir(parents=True)
shutil.copy(HERE / "bash_cell.py", startup)
os.environ["IPYTHONDIR"] = ipython.name
os.environ["MATPLOTLIBRC"] = str(HERE / "matplotlibrc")

from lasnn import __version__ as release  # noqa: E402

project = "lasnn"
author = "the lasnn authors"
version = release
extensions = ["myst_nb", "generated"]
exclude_patterns = ["_build", "study"]
nitpicky = True
# Of blocks that do not say.
highlight_language = "none"
# Types in signatures are of PyTorch and of Python, which have no pages here.
nitpick_ignore_regex = [("py:.*", ".*")]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

nb_execution_mode = "force"
nb_execution_in_temp = True
# A cell that fails is a warning, which `make docs` makes an error once all pages were tried.
nb_execution_show_tb = True
# Seconds a cell, for what hangs: on a machine with nothing else to do none takes two minutes.
nb_execution_timeout = 900
nb_merge_streams = True
# Nothing is fetched when a page is read.
nb_ipywidgets_js = {}

html_theme = "furo"
html_title = f"lasnn {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
# An option's two dashes stay two dashes.
smartquotes = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#a8441c", "color-brand-content": "#a8441c"},
    "dark_css_variables": {"color-brand-primary": "#f0976a", "color-brand-content": "#f0976a"},
}
