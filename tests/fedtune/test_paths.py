"""Where the parts lie: the repository in a checkout, `_app` in an installed wheel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedtune import paths


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as if it lay in an empty site-packages."""
    folder = tmp_path / "fedtune"
    folder.mkdir()
    monkeypatch.setattr(paths, "__file__", str(folder / "paths.py"))
    return folder


def test_a_checkout() -> None:
    assert {"server", "client", "strategies", "simulations"} <= {folder.name for folder in paths.app_root().iterdir()}


def test_without_app_it_is_the_folder_around_the_package(package: Path) -> None:
    assert paths.app_root() == package.parent


def test_with_app_it_is_that(package: Path) -> None:
    (package / "_app").mkdir()
    assert paths.app_root() == package / "_app"
    assert paths.base_model() == package / "_app" / "simulations" / "base_model"


def test_it_stands_first_on_the_path_and_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["elsewhere"])
    paths.put_app_on_path()
    paths.put_app_on_path()
    assert sys.path == [str(package.parent), "elsewhere"]
