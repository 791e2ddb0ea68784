"""What a linter does not check: docstrings of modules, the length of files, paths of one machine, the tree in the README."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedtune", "strategies", "server", "client", "simulations")
GENERATED = ("client/trainer_pb2.py", "client/trainer_pb2_grpc.py")
LONGEST = 300  # lines
IGNORED = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line)]
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:work|root|home|Users|opt|mnt|media)/\w")
BINARY = (".safetensors", ".png")


def files(folder: Path = ROOT) -> Iterator[PurePosixPath]:
    """Every file of the repository that git does not ignore, relative to its root."""
    for path in sorted(folder.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in IGNORED):
            continue
        if path.is_dir():
            yield from files(path)
        else:
            yield PurePosixPath(path.relative_to(ROOT).as_posix())


def text(path: PurePosixPath | str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def modules() -> list[PurePosixPath]:
    return [path for path in files() if path.suffix == ".py" and str(path) not in GENERATED]


def test_a_module_says_what_it_is() -> None:
    """In tests the names of file and functions may do."""
    silent = [str(path) for path in modules() if path.parts[0] != "tests" and not ast.get_docstring(ast.parse(text(path)))]
    assert silent == [], "wanted a docstring whose first line says what the file is"


def test_modules_are_short() -> None:
    lengths = {str(path): len(text(path).splitlines()) for path in modules() if path.parts[0] in PACKAGES}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}, "split by what its parts are about"


def test_no_path_of_one_machine() -> None:
    found = [
        f"{path}: {match[0]}" for path in files() if path.suffix not in BINARY for match in MACHINE_PATH.finditer(text(path))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "found"),
    [("open('/" + "home/ann/x')", True), ("https://example.org/home/ann", False), ("a/home/ann", False), ("/path/to/x", False)],
)
def test_what_a_path_of_one_machine_is(line: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) is found


def named_in_the_tree(readme: str) -> dict[str, str]:
    """Path -> comment of each line in the README's tree; a folder's path ends with a slash."""
    tree = readme.partition("## The files")[2].partition("```\n")[2].partition("```")[0]
    named: dict[str, str] = {}
    above: list[str] = []
    for line in tree.splitlines():
        match = re.fullmatch(r"( *)(\S+)(?: {2,}(\S.*))?", line)
        assert match, f"a line of the README's tree that is no file: {line!r}"
        above = above[: len(match[1]) // 4]
        named["".join([*above, match[2]])] = match[3] or ""
        if match[2].endswith("/"):
            above = [*above, match[2]]
    return named


def test_the_readme_s_tree_names_every_file_and_no_other() -> None:
    named = named_in_the_tree(text("README.md"))
    existing = {str(path) for path in files()}
    opened = {str(PurePosixPath(path).parent) + "/" for path in named}  # folders whose files stand below them
    closed = tuple(path for path in named if path.endswith("/") and path not in opened)
    wanted = {path for path in existing if not path.startswith(closed)}
    given = {path for path in named if not path.endswith("/")}
    assert wanted - given == set(), "files without a line in the README's tree"
    assert given - wanted == set(), "lines in the README's tree without a file"
    assert [folder for folder in closed if not any(path.startswith(folder) for path in existing)] == []


def test_each_file_in_the_tree_has_a_comment_unless_its_name_is_one() -> None:
    speak_for_themselves = ("__init__.py", ".gitignore", "CHANGELOG.md", "README.md", "docs/")
    named = named_in_the_tree(text("README.md"))
    assert named
    assert [path for path, comment in named.items() if not comment and not path.endswith(speak_for_themselves)] == []
