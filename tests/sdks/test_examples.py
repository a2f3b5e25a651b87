"""The examples of README.md and docs/examples.md, run from the page as a reader would run them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running_server import PROJECT, RunningServer

pytestmark = pytest.mark.ring

BASE_URL, MODEL = "http://127.0.0.1:8100", '"builtin"'
EXAMPLE_S = 120.0


def examples(page: Path, languages: str) -> list[tuple[str, str]]:
    """Language and text of each block of the page that is written in one of these languages."""
    return re.findall(rf"^```({languages})\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


EXAMPLES = [
    *examples(PROJECT / "README.md", "python"),
    *examples(PROJECT / "docs" / "examples.md", r"\w*"),
]


def test_the_pages_have_examples_of_both_kinds():
    languages = [language for language, _ in EXAMPLES]
    assert set(languages) == {"python", "sh"} and len(languages) >= 8


@pytest.mark.parametrize(("language", "text"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs_as_it_stands_on_its_page(server: RunningServer, language: str, text: str):
    assert BASE_URL in text and MODEL in text
    text = text.replace(BASE_URL, server.url).replace(MODEL, f'"{server.model}"')
    interpreter = [sys.executable, "-c"] if language == "python" else ["bash", "-ec"]
    done = subprocess.run([*interpreter, text], capture_output=True, text=True, timeout=EXAMPLE_S)
    assert (done.returncode, done.stderr) == (0, ""), text
    assert done.stdout.strip() and '"error"' not in done.stdout
    assert ("data: [DONE]" in done.stdout) == ('"stream": true' in text)
