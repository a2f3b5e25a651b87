"""What can be wrong with the configuration.

    ConfigError    one or more keys, or a file that holds them, cannot be used

`str(error)` is the whole message for the user: each line names the key, its value, where it was set and what to change.
"""

from __future__ import annotations


class ConfigError(Exception):
    """The configuration cannot be used; `problems` are the sentences, one a mistake, all found in one go."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
