"""Every setting of the server: its type and its default.

A `Settings` is made by `config.load_config` on the api's side and by `Settings.from_ranks` on the ranks; it never
changes and never reads the environment by itself. A field is the key of docs/configuration.md in lower case.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from config import values as v
from config.errors import ConfigError

API_ONLY = frozenset({"api_host", "api_port", "api_keys", "cors_allow_origins"})
NOT_KEYS = frozenset({"project_root", "passthrough_env"})  # found by load_config, no key of the user's

# Every key is in one of the two. `restart` applies a change of these with a new ring under the same api process, which
# keeps the requests; nobody but supervisor, launcher and ranks may read them. (CONFIG_FILE: what is in it counts.)
RING_FIELDS = frozenset(
    {
        *("ring_size", "worker_hosts", "ring_host", "hostfile", "ring_port", "ssh_options", "worker_dir"),
        *("layer_split", "rank_memory_limit_mb", "kv_cache_reserved_memory_mb", "kv_cache_max_size", "kv_cache_bits"),
        *("config_file", "max_sequence_length", "prefix_cache", "prefill_chunk_tokens", "micro_batch_groups"),
        *("max_concurrent_requests", "start_timeout", "step_timeout", "poll_interval", "shutdown_grace_s"),
    }
)
# A change of these needs another api process: the model, whose tokenizer made all requests' ids, and the api's own.
PROCESS_FIELDS = frozenset(
    {
        *("model_repo", "model_name", "trust_remote_code", "max_queued_requests", "max_prompt_len_bytes"),
        *("max_body_bytes", "default_max_tokens", "default_temperature", "default_top_p", "unknown_fields"),
        *("responses_store_max", "responses_store_max_bytes", "request_timeout", "api_host", "api_port", "api_keys"),
        *("max_concurrent_requests_per_key", "max_queued_requests_per_key", "cors_allow_origins"),
        *("log_level", "log_format"),
    }
)


class Settings(BaseSettings):
    """What the user chose, checked. Lists are empty and numbers None where the program is to find the value itself."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, str_strip_whitespace=True)

    project_root: Path = Field(default=Path("."), exclude=True)
    # Names of others (HF_TOKEN, proxies) that .env sets; they may be secrets, so they are in no dump and no repr.
    passthrough_env: dict[str, str] = Field(default_factory=dict, exclude=True, repr=False)

    config_file: v.Text = ""
    # the model
    model_repo: v.Text = "builtin"
    model_name: v.Text = Field(default_factory=lambda data: data.get("model_repo", "builtin"))
    trust_remote_code: v.Switch = False
    # the ring
    ring_size: v.Count = 2
    worker_hosts: v.Hosts = ()
    ring_host: v.Host = ""
    hostfile: v.Text = ""
    ring_port: v.Port = 32323
    ssh_options: v.Text = ""
    worker_dir: v.Text = "~/.mlx-ring-server"
    layer_split: v.LayerCounts = ()
    rank_memory_limit_mb: v.CountsPerRank = ()
    # the KV cache and the scheduler
    kv_cache_reserved_memory_mb: v.Count = 2048
    kv_cache_max_size: v.OptionalCount = None
    max_sequence_length: v.OptionalCount = None
    kv_cache_bits: v.CacheBits = None
    prefix_cache: v.Switch = True
    prefill_chunk_tokens: v.AutoCount = None
    micro_batch_groups: v.AutoCount = None
    max_concurrent_requests: v.AutoCount = None
    max_queued_requests: v.CountOrZero = 256
    # requests
    max_prompt_len_bytes: v.OptionalSize = None
    max_body_bytes: v.Size = 32 * 1024 * 1024
    default_max_tokens: v.OptionalCount = None
    default_temperature: v.Temperature = None
    default_top_p: v.TopP = None
    unknown_fields: v.UnknownFields = "reject"
    responses_store_max: v.CountOrZero = 1000
    responses_store_max_bytes: v.Size = 256 * 1024 * 1024
    # times
    request_timeout: v.Seconds = 120.0
    start_timeout: v.Seconds = 600.0
    step_timeout: v.Seconds = 60.0
    poll_interval: v.Seconds = 0.1
    shutdown_grace_s: v.SecondsOrZero = 30.0
    # the api
    api_host: v.Host = "127.0.0.1"
    api_port: v.Port = 8100
    api_keys: v.ApiKeys = ()
    max_concurrent_requests_per_key: v.OptionalCount = None
    max_queued_requests_per_key: v.OptionalCountOrZero = None
    cors_allow_origins: v.Origins = ("*",)
    # the logs
    log_level: v.LogLevel = "INFO"
    log_format: v.LogFormat = "text"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: a rank must not pick up what its own machine's environment happens to hold."""
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _blank_is_the_default(cls, data: dict[str, Any]) -> dict[str, Any]:
        """`KEY=` and JSON's null stand for the default; an empty list stands for no entries (CORS off)."""
        return {field: value for field, value in data.items() if not cls._is_blank(field, value)}

    @classmethod
    def _is_blank(cls, field: str, value: Any) -> bool:
        if field in cls.model_fields and isinstance(cls.model_fields[field].default, tuple):
            return value is None
        return value is None or (isinstance(value, str) and not value.strip())

    @field_validator("hostfile", "config_file")
    @classmethod
    def _from_project_root(cls, path: str, info: ValidationInfo) -> str:
        return str(info.data["project_root"] / os.path.expanduser(path)) if path else ""

    @property
    def world_size_hint(self) -> int:
        """How many ranks the settings ask for. Raises ConfigError where HOSTFILE cannot be read."""
        if not self.hostfile:
            return 1 + len(self.worker_hosts) if self.worker_hosts else self.ring_size
        try:
            entries = json.loads(Path(self.hostfile).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.hostfile} cannot be read as JSON ({error})") from error
        if isinstance(entries, dict):  # as mlx.launch writes it: {"backend": …, "envs": […], "hosts": […]}
            entries = entries.get("hosts")
        if not isinstance(entries, list) or not entries:
            raise ConfigError(f"{self.hostfile} must hold a JSON list with one entry a rank, as mlx.launch takes it")
        return len(entries)

    def for_ranks(self) -> dict[str, Any]:
        """The settings as JSON values, without what only the api may know; `from_ranks` reads them back."""
        return self.model_dump(mode="json", exclude=set(API_ONLY))

    @classmethod
    def from_ranks(cls, dump: dict[str, Any]) -> Self:
        """The settings another process dumped with `for_ranks`."""
        return cls(**dump)


KEYS: dict[str, str] = {field.upper(): field for field in Settings.model_fields if field not in NOT_KEYS}
