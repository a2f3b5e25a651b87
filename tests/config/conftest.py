"""A project folder to load a configuration from, with no environment but the one a test gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config import ConfigError, Settings, load_config

Load = Callable[..., Settings]
Refuse = Callable[..., str]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Writes the given .env and CONFIG_FILE, and loads the settings under the given environment."""

    def load_it(dotenv: str | bytes = "", *, environ: dict[str, str] | None = None, file: Any = None) -> Settings:
        text = dotenv.encode() if isinstance(dotenv, str) else dotenv
        if file is not None:
            (tmp_path / "my.json").write_text(file if isinstance(file, str) else json.dumps(file))
            text += b"\nCONFIG_FILE=my.json\n"
        (tmp_path / ".env").write_bytes(text)
        return load_config(tmp_path, environ or {})

    return load_it


@pytest.fixture
def refuse(load: Load) -> Refuse:
    """Loads what must be refused; returns the message."""

    def refuse_it(dotenv: str | bytes = "", **more: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            load(dotenv, **more)
        return str(caught.value)

    return refuse_it
