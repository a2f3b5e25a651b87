"""Which name was meant, and which names are other programs' own.

A typing slip in a key must not go unnoticed, and a variable that belongs to another program must never stop the start.
So in the environment only names within a slip of ours are judged; in our own files every unknown name is.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

# Names no other program uses are recognized from their first words, however they go on.
_OUR_PREFIXES = ("KV_CACHE_", "RANK_MEMORY_", "PREFILL_CHUNK")
_FOREIGN_PREFIXES = (
    *("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "MLX_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_"),
    *("OMP_", "OPENBLAS_", "VECLIB_", "SSL_CERT_", "REQUESTS_CA_", "CURL_CA_", "PYTHON", "UV_", "PIP_"),
)
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_LONG_NAME = 13  # from this many letters on, two slips are still a slip


def is_foreign(name: str) -> bool:
    """True for names that belong to the libraries and tools the ranks use, such as HF_TOKEN or https_proxy."""
    return name.upper().startswith(_FOREIGN_PREFIXES) or name.upper() in _PROXIES


def near_miss(name: str, known: Collection[str]) -> str | None:
    """The known name that `name` is a slip of (case, a letter more, less or swapped), or None; `name` is not known."""
    name = _normal(name)
    for other in known:
        allowed = 2 if min(len(name), len(other)) >= _LONG_NAME else 1
        if abs(len(name) - len(other)) <= allowed and _slips(name, other) <= allowed:
            return other
    return closest(name, known) if name.startswith(_OUR_PREFIXES) else None


def closest(name: str, known: Collection[str]) -> str | None:
    """The known name most like `name`, or None where none is like it."""
    return next(iter(difflib.get_close_matches(_normal(name), known, n=1)), None)


def _normal(name: str) -> str:
    return name.strip().upper().replace("-", "_")


def _slips(a: str, b: str) -> int:
    """How many letters to insert, delete or swap with their neighbour until `a` is `b` (optimal string alignment).

    Putting one letter for another counts as two, since that makes other words of short names: APP_PORT is not API_PORT.
    """
    rows = [list(range(len(b) + 1))]
    for i in range(1, len(a) + 1):
        row = [i]
        for j in range(1, len(b) + 1):
            replaced = rows[i - 1][j - 1] + (0 if a[i - 1] == b[j - 1] else 2)
            row.append(min(rows[i - 1][j] + 1, row[j - 1] + 1, replaced))
            if i > 1 and j > 1 and a[i - 2 : i] == b[j - 1] + b[j - 2]:
                row[j] = min(row[j], rows[i - 2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]
