"""What MkDocs is told while it builds: pages that are made of other files, and links out of here.

MkDocs calls the functions named `on_…`.
"""

import itertools
import pathlib
import posixpath
import re
import sys

from mkdocs.structure.files import File

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import notebooks  # noqa: E402

_ROOT = pathlib.Path(__file__).parents[2]
_SOURCE = "https://github.com/pararnn/pararnn/blob/main/"
# A page, and the file of the repository that it shows.
_SHOWN = {
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
# What docstrings refer to and is described elsewhere. (An inventory would have to be fetched.)
_ELSEWHERE = {
    "equinox.nn.GRUCell": "https://docs.kidger.site/equinox/api/nn/rnn/#equinox.nn.GRUCell",
    "equinox.nn.LSTMCell": "https://docs.kidger.site/equinox/api/nn/rnn/#equinox.nn.LSTMCell",
    "equinox.nn.inference_mode": (
        "https://docs.kidger.site/equinox/api/nn/inference/#equinox.nn.inference_mode"
    ),
}


def on_files(files, config):
    """Adds the pages that are files elsewhere in the repository, the plots they show, and
    the tutorials."""
    for page, source in _SHOWN.items():
        text = _with_links((_ROOT / source).read_text(), posixpath.dirname(source))
        files.append(File.generated(config, page, content=text))
    plots = [_ROOT.glob(f"{folder}/results/*.png") for folder in ("benchmarks", "examples")]
    for plot in itertools.chain(*plots):
        files.append(File.generated(config, f"results/{plot.name}", abs_src_path=plot))
    for source in sorted((_ROOT / "docs" / "tutorials").glob("*.py")):
        for name, content in notebooks.rendered(source).items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files


def on_env(env, config, files):
    """Tells where the objects of other packages are described."""
    for name, url in _ELSEWHERE.items():
        config.plugins["autorefs"].register_url(name, url)
    return env


def _with_links(text: str, folder: str) -> str:
    """With links to files of the repository as links to where it is published."""

    def published(match):
        label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        return f"[{label}]({_SOURCE}{posixpath.normpath(posixpath.join(folder, target))})"

    return re.sub(r"(?<!!)\[([^]]*)\]\(([^)\s]+)\)", published, text)
