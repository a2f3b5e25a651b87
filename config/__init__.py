"""The settings of the whole server, from the environment, .env and a JSON file, and the set-up of its logs."""

from config.errors import ConfigError
from config.load import export_passthrough, load_config, with_origins
from config.settings import Settings
from config.values import ApiKey

__all__ = ["ApiKey", "ConfigError", "Settings", "export_passthrough", "load_config", "with_origins"]
