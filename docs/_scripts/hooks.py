"""What MkDocs is told while it builds: pages that are made of other files, and links out of here.

MkDocs calls the functions named `on_…`.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

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
    """Adds the pages that are files elsewhere in the repository, with the pictures they show."""
    for page, source in _SHOWN.items():
        text = (_ROOT / source).read_text()
        folder = posixpath.dirname(source)
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            files.append(File.generated(config, picture, abs_src_path=_ROOT / folder / picture))
        files.append(File.generated(config, page, content=_with_links(text, folder)))
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
