"""What tests of base models share: a folder whose configuration a test changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from support import random_models as models
from support.model_folders import Folder, change


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A copy of a tiny model with fields of its config.json changed; a field of None is taken out."""

    def make(architecture: str = "llama", **fields: Any) -> Path:
        path = tmp_path / architecture
        shutil.copytree(models.folder_of(architecture), path)
        change(path, **fields)
        return path

    return make
