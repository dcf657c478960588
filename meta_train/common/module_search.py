"""The search for modules with task families of a user's own: beside the configuration, then as Python does."""

import sys
from pathlib import Path

_folders: list[Path] = []


def search_in(folder: Path) -> None:
    """Look for modules in this folder first."""
    folder = folder.resolve()
    if folder in _folders:
        _folders.remove(folder)
    _folders.insert(0, folder)
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))


def searched_folders() -> list[Path]:
    """The folders of configurations, the latest first."""
    return list(_folders)


def find_file(path: Path) -> Path:
    """A file that is named relative to a configuration or to the current folder; the path itself if there is none."""
    candidates = [folder / path for folder in _folders] if not path.is_absolute() else []
    return next((candidate for candidate in candidates if candidate.is_file()), path)
