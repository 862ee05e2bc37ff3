"""The documentation keeps its promises: its code runs, its commands parse, what it lists is complete.

Fences: ```python is run and ```pycon is compared with its output; all blocks of a page share a namespace and a
temporary folder. ``<!-- not run: reason -->`` before a fence leaves it out, ``<!-- slow: reason -->`` runs it (with
all others of its page) among the slow tests only. In ```console blocks each ``$ stemloop ...`` must be a command line
that the program takes, and each ``$ ./scripts/...`` a script that is there.
"""

import doctest
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from stemloop import cli
from stemloop.core.errors import MissingExtra

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "_build" not in path.parts
}
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>not run|slow): (?P<reason>[^\n]+?) -->\n+)?"
    r"```(?P<kind>python|pycon|console)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    kind: str
    code: str
    line: int
    mark: str | None


def blocks(path, *kinds):
    text = path.read_text(encoding="utf-8")
    return [
        Block(m["kind"], m["code"], text[: m.start("code")].count("\n"), m["mark"])
        for m in FENCE.finditer(text)
        if m["kind"] in kinds
    ]


def code(page, *, slow):
    found = [b for b in blocks(PAGES[page], "python", "pycon") if b.mark != "not run"]
    return found if slow else [b for b in found if b.mark != "slow"]


def run(page, chosen):
    namespace = {"__name__": "__main__"}
    for block in chosen:
        if block.kind == "python":
            exec(compile("\n" * block.line + block.code, page, "exec"), namespace)
            continue
        test = doctest.DocTestParser().get_doctest(block.code, namespace, page, page, block.line)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        said = []
        runner.run(test, out=said.append, clear_globs=False)
        namespace.update(test.globs)
        assert runner.failures == 0, "".join(said)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEMLOOP_CACHE", str(tmp_path / "energies"))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


@pytest.mark.parametrize("page", [page for page in PAGES if code(page, slow=False)])
def test_the_code_of_a_page_runs(page, elsewhere):
    try:
        run(page, code(page, slow=False))
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if code(page, slow=True) != code(page, slow=False)])
def test_the_slow_code_of_a_page_runs(page, elsewhere):
    run(page, code(page, slow=True))


def test_every_fence_of_code_is_seen():
    # a fence that the pattern above does not match would silently not run
    for page, path in PAGES.items():
        fences = re.findall(r"^\s*```(?:python|pycon|console)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == len(blocks(path, "python", "pycon", "console")), page


COMMANDS = [
    (page, line[2:])
    for page, path in PAGES.items()
    for block in blocks(path, "console")
    if block.mark != "not run"
    for line in block.code.splitlines()
    if line.startswith("$ ")
]


@pytest.mark.parametrize("page, line", COMMANDS)
def test_a_command_of_a_page_is_one(page, line, capsys):
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[0].startswith("./scripts/"):
        assert os.access(ROOT / words[0], os.X_OK), f"{page}: {words[0]} is not there"
        if words[0] != "./scripts/demo":
            return
        words = ["stemloop", "demo", *words[1:]]
    if words[0] != "stemloop":
        return
    try:
        cli.parser().parse_args(words[1:])
    except SystemExit as left:  # --help and --version leave with 0
        assert left.code == 0, f"{page}: {line}: {capsys.readouterr().err}"


def options(parser):
    for action in parser._actions:
        yield from (o for o in action.option_strings if o.startswith("--"))
        if isinstance(getattr(action, "choices", None), dict):
            yield from action.choices
            for child in action.choices.values():
                yield from options(child)


def test_the_reference_names_every_verb_and_option():
    page = PAGES["docs/reference/command.md"].read_text()
    missing = {word for word in options(cli.parser()) if f"`{word}" not in page and word not in ("--help",)}
    assert not missing


def test_the_reference_names_every_key_of_the_summary():
    from stemloop.campaign.recipes import DiffractionRecipe
    from stemloop.campaign.run import Run

    page = PAGES["docs/reference/run-folder.md"].read_text()
    source = inspect.getsource(Run) + inspect.getsource(DiffractionRecipe.extras)
    written = inspect.getsource(Run._summarise) + inspect.getsource(DiffractionRecipe.extras)
    keys = set(re.findall(r'^\s+"(\w+)":', written, re.MULTILINE)) | set(re.findall(r'summary\["(\w+)"\] =', source))
    assert len(keys) > 15
    assert not {key for key in keys if f"`{key}`" not in page}


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"(?<!!)\[[^]]*\]\(([^)#]+)", PAGES["README.md"].read_text()):
        assert "://" in target or (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="sphinx is not installed (the dependency group docs)")
    pytest.importorskip("myst_parser")
    pytest.importorskip("pydata_sphinx_theme")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", str(ROOT / "docs"), str(tmp_path)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
