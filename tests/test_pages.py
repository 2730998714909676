"""The pages of the documentation: their examples run, and they describe all that is public."""

import ast
import pathlib
import re
import types

import pages
import pytest

import pararnn

DOCS = pages.ROOT / "docs"
PAGES = sorted(str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md"))
TEXTS = {page: (DOCS / page).read_text() for page in PAGES}
BLOCKS = {page: pages.blocks_of(text) for page, text in TEXTS.items() if "```python" in text}
FLAX = "coming_from/flax.md"
# Several pages share a process. Those of several devices, and of a package that may be missing, are
# by themselves.
APART = {page for page, blocks in BLOCKS.items() if pages.need_devices(blocks)} | {FLAX}
SHARED = [page for page in BLOCKS if page not in APART]
GROUPS = [*(SHARED[i::4] for i in range(4)), *([page] for page in sorted(APART))]


@pytest.mark.slow
@pytest.mark.parametrize("some", GROUPS, ids=lambda some: some[0])
def test_examples_of_pages(some):
    """If what is printed has changed for a reason: `python -m tests.pages docs/PAGE`."""
    if FLAX in some:
        pytest.importorskip("flax")
    printed = pages.run_all({page: BLOCKS[page] for page in some})
    for page in some:
        assert len(BLOCKS[page]) == TEXTS[page].count("```python\n")
        for block, text in zip(BLOCKS[page], printed[page], strict=True):
            if block.output is not None:
                assert pages.agree(block.output, text), f"{page}:{block.line} prints\n{text}"


def test_what_is_printed_is_compared():
    assert pages.agree("values: 2.4e-07 (200 steps)", "values:   3.6e-07 (199 steps)\n")
    assert pages.agree("0.50 and 1,000", "0.52 and 1,010")
    assert not pages.agree("values: 0.2", "values: 0.3")
    assert not pages.agree("12 iterations", "20 iterations")
    assert not pages.agree("agrees", "DISAGREES")
    assert pages.agree("correction=0.113, 1 step", "correction=7e-05, 1 step")
    assert not pages.agree("correction=0.9,", "correction=1.9,")
    assert not pages.agree("correction=0.9,", "correction=inf,")


def test_a_block_that_fails_is_told_by_its_line():
    text = "# A\n\n```python\na = 1\n```\n\n<!-- check\nassert a == 1\n-->\n\n"
    text += "```python\n\nb\n```\n"
    blocks = pages.blocks_of(text)
    assert pages.run("page.md", blocks[:1]) == [""]
    with pytest.raises(AssertionError, match='"page.md", line 13'):
        pages.run("page.md", blocks)
    with pytest.raises(AssertionError, match="check of line 3"):
        pages.run("page.md", [blocks[0]._replace(check="assert a == 2\n")])


def described() -> set[str]:
    texts = (file.read_text() for file in (DOCS / "api").glob("*.md"))
    return {name for text in texts for name in re.findall(r"^::: (\S+)$", text, re.M)}


def public(module: types.ModuleType) -> set[str]:
    names = (name for name in vars(module) if not name.startswith("_"))
    return {n for n in names if not isinstance(getattr(module, n), types.ModuleType)}


def test_every_public_name_is_described():
    found = described()
    assert {f"pararnn.{name}" for name in public(pararnn)} <= found
    rooms = re.findall(
        r"^from \. import (\w+) as", pathlib.Path(pararnn.__file__).read_text(), re.M
    )
    assert "solvers" in rooms
    for room in rooms:
        module = getattr(pararnn, room)
        for name in public(module):
            above = getattr(module, name) is getattr(pararnn, name, None)
            assert above or f"pararnn.{room}.{name}" in found, f"pararnn.{room}.{name}"


def test_what_is_described_is_public():
    for name in described():
        value = pararnn
        for part in name.split(".")[1:]:
            value = getattr(value, part)


def members_listed() -> dict[str, set[str]]:
    """By described name, the members that its page names."""
    texts = (file.read_text() for file in (DOCS / "api").glob("*.md"))
    pattern = r"^::: (\S+)\n    options:\n(?:        .*\n)*?        members: \[(.*)\]$"
    found = (match for text in texts for match in re.findall(pattern, text, re.M))
    return {name: set(members.split(", ")) for name, members in found}


def test_members_that_are_listed_exist():
    """The build leaves out, without a word, those that do not."""
    listed = members_listed()
    assert "propagate_defects" in listed["pararnn.solvers.Chunks"]
    for name, members in listed.items():
        value = pararnn
        for part in name.split(".")[1:]:
            value = getattr(value, part)
        assert members <= {*dir(value), *getattr(value, "__annotations__", ())}, name


def test_every_page_is_in_the_navigation():
    navigation = (pages.ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert navigation.count(f": {page}\n") == 1, page


def drawn() -> set[str]:
    """The names of the pictures that the script draws."""
    tree = ast.parse((DOCS / "_scripts" / "pictures.py").read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {name.removeprefix("draw_") for name in functions if name.startswith("draw_")}


def test_every_picture_is_drawn_by_the_script():
    """`python docs/_scripts/pictures.py` draws them."""
    there = {file.stem for file in (DOCS / "pictures").iterdir()}
    shown = set()
    for page in PAGES:
        text = (DOCS / page).read_text()
        shown |= {pathlib.Path(name).stem for name in re.findall(r"\]\((\S*pictures/\S+?)\)", text)}
    assert drawn() == there == shown


@pytest.mark.slow
def test_the_pictures_can_be_drawn(tmp_path):
    """Whatever they look like: a machine rounds the curves in its own way."""
    pages.python("docs/_scripts/pictures.py", "--folder", str(tmp_path))
    assert {file.stem for file in tmp_path.iterdir()} == drawn()
