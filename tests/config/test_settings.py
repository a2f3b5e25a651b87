"""Every key: what it takes, what it refuses, what it is by default, and which keys exclude each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from config import Settings
from config.combinations import warnings
from config.settings import API_ONLY, KEYS, PROCESS_FIELDS, RING_FIELDS
from tests.config.conftest import Load, Refuse
from tests.running_server import PROJECT

# key, the default, (text as in .env, its value), …, then values that must be refused
CASES: list[tuple[str, Any, list[tuple[str, Any]], list[str]]] = [
    ("MODEL_REPO", "builtin", [("a/b", "a/b"), ("~/models/my model", "~/models/my model")], []),
    ("MODEL_NAME", "builtin", [("mine", "mine")], []),
    ("TRUST_REMOTE_CODE", False, [("true", True), ("Yes", True), ("0", False)], ["maybe"]),
    ("RING_SIZE", 2, [("1", 1), ("3", 3)], ["0", "-1", "two", "1.5", "2 3"]),
    ("WORKER_HOSTS", (), [("me@a,b.local", ("me@a", "b.local")), ("a, b ,", ("a", "b"))], ["-oProxyCommand=x", "a;b"]),
    ("RING_HOST", "", [("10.0.0.1", "10.0.0.1"), ("fe80::1%en0", "fe80::1%en0")], ["a b", "-x"]),
    ("RING_PORT", 32323, [("40000", 40000)], ["0", "65536", "http"]),
    ("SSH_OPTIONS", "", [('"-F /a/b -p 2222"', "-F /a/b -p 2222")], []),
    ("WORKER_DIR", "~/.mlx-ring-server", [("/srv/ring", "/srv/ring")], []),
    ("LAYER_SPLIT", (), [("AUTO", ()), ("16,14", (16, 14)), ("16 14", (16, 14))], ["16,0", "16,x", "16.5,14"]),
    ("RANK_MEMORY_LIMIT_MB", (), [("100", (100,)), ("100,200", (100, 200))], ["0", "100,lots"]),
    ("KV_CACHE_RESERVED_MEMORY_MB", 2048, [("1", 1)], ["0", "2GB"]),
    ("KV_CACHE_MAX_SIZE", None, [("4096", 4096), ("", None)], ["0", "4k"]),
    ("MAX_SEQUENCE_LENGTH", None, [("100", 100), ("", None)], ["0", "long"]),
    ("KV_CACHE_BITS", None, [("8", 8), ("4", 4), ("", None)], ["2", "16", "eight", "8.5"]),
    ("PREFIX_CACHE", True, [("false", False), ("on", True)], ["perhaps"]),
    ("PREFILL_CHUNK_TOKENS", None, [("auto", None), ("512", 512)], ["0", "some"]),
    ("MICRO_BATCH_GROUPS", None, [("auto", None), ("2", 2)], ["0", "all"]),
    ("MAX_CONCURRENT_REQUESTS", None, [("Auto", None), ("8", 8)], ["0", "many"]),
    ("MAX_QUEUED_REQUESTS", 256, [("0", 0), ("9", 9)], ["-1", "off"]),
    ("MAX_PROMPT_LEN_BYTES", None, [("off", None), ("1000", 1000), ("64 KiB", 65536)], ["0", "-5", "auto"]),
    ("MAX_BODY_BYTES", 33554432, [("33", 33), ("1 MiB", 1048576), ("2MB", 2000000)], ["0", "32 XB", "off", "-1"]),
    ("DEFAULT_MAX_TOKENS", None, [("512", 512), ("", None)], ["0", "all"]),
    ("DEFAULT_TEMPERATURE", None, [("0", 0.0), ("0.7", 0.7), ("2", 2.0)], ["-0.1", "2.1", "hot", "nan"]),
    ("DEFAULT_TOP_P", None, [("1", 1.0), ("0.9", 0.9)], ["0", "1.1", "inf"]),
    ("UNKNOWN_FIELDS", "reject", [("Warn", "warn")], ["ignore"]),
    ("RESPONSES_STORE_MAX", 1000, [("0", 0), ("9", 9)], ["-1", "off"]),
    ("RESPONSES_STORE_MAX_BYTES", 268435456, [("1 MiB", 1048576), ("9000", 9000)], ["0", "off", "-1"]),
    ("REQUEST_TIMEOUT", 120.0, [("0.5", 0.5)], ["0", "2m", "inf"]),
    ("START_TIMEOUT", 600.0, [("30", 30.0)], ["0", "-1"]),
    ("STEP_TIMEOUT", 60.0, [("5", 5.0)], ["0", "nan"]),
    ("POLL_INTERVAL", 0.1, [("0.01", 0.01)], ["0", "often"]),
    ("SHUTDOWN_GRACE_S", 30.0, [("0", 0.0), ("1.5", 1.5)], ["-1", "soon"]),
    ("API_HOST", "127.0.0.1", [("0.0.0.0", "0.0.0.0"), ("::1", "::1"), ("", "127.0.0.1")], ["http://a", "a b"]),
    ("API_PORT", 8100, [("80", 80)], ["0", "65536", "http"]),
    ("MAX_CONCURRENT_REQUESTS_PER_KEY", None, [("4", 4), ("", None)], ["0", "many", "1.5"]),
    ("MAX_QUEUED_REQUESTS_PER_KEY", None, [("0", 0), ("9", 9), ("", None)], ["-1", "off"]),
    ("CORS_ALLOW_ORIGINS", ("*",), [("", ()), ("http://a:1 https://b", ("http://a:1", "https://b"))], ["a", "http://a/"]),
    ("LOG_LEVEL", "INFO", [("debug", "DEBUG"), ("ERROR", "ERROR")], ["loud"]),
    ("LOG_FORMAT", "text", [("JSON", "json")], ["xml"]),
]  # fmt: skip
ELSEWHERE = {"API_KEYS", "HOSTFILE", "CONFIG_FILE"}  # have tests of their own


def test_every_key_has_a_case() -> None:
    assert {key for key, *_ in CASES} | ELSEWHERE == set(KEYS)


def test_every_key_says_whether_a_new_ring_applies_it_or_a_new_api_process() -> None:
    assert RING_FIELDS | PROCESS_FIELDS == set(KEYS.values())
    assert not RING_FIELDS & PROCESS_FIELDS
    assert API_ONLY <= PROCESS_FIELDS
    text = (PROJECT / "docs" / "configuration.md").read_text()
    section = text[text.index("## What restart does with a key") : text.index("A change of any other key")]
    assert {KEYS[key] for key in re.findall(r"`([A-Z_]+)`", section)} == RING_FIELDS


@pytest.mark.parametrize(("key", "default"), [(key, default) for key, default, *_ in CASES])
def test_a_key_has_its_default_when_it_is_missing_or_empty(load: Load, key: str, default: Any) -> None:
    assert getattr(load(), KEYS[key]) == default
    if key != "CORS_ALLOW_ORIGINS":
        assert getattr(load(f"{key}="), KEYS[key]) == default
    assert getattr(load(file={key: None}), KEYS[key]) == default


@pytest.mark.parametrize(
    ("key", "text", "value"), [(k, text, value) for k, _, good, _ in CASES for text, value in good]
)
def test_a_value_is_read_from_dotenv_and_from_the_environment(load: Load, key: str, text: str, value: Any) -> None:
    assert getattr(load(f"{key}={text}"), KEYS[key]) == value
    assert getattr(load(environ={key: text.strip('"')}), KEYS[key]) == value
    assert getattr(load(file={key: text.strip('"')}), KEYS[key]) == value


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, _, _, bad in CASES for text in bad])
def test_a_refusal_names_the_key_the_value_where_it_was_set_and_the_mend(refuse: Refuse, key: str, text: str) -> None:
    message = refuse(f"# a comment\n\n{key}={text}\n")
    assert message.startswith(f"{key}={text} (.env line 3): must be ")
    assert refuse(environ={key: text}).startswith(f"{key}={text} (the environment): must be ")
    assert refuse(file={key: text}).startswith(f"{key}={text} (my.json): must be ")


def test_json_values_keep_their_types(load: Load) -> None:
    settings = load(
        file={"LAYER_SPLIT": [3, 4], "RANK_MEMORY_LIMIT_MB": 9, "TRUST_REMOTE_CODE": True, "API_KEYS": ["a:b"]}
    )
    assert settings.layer_split == (3, 4)
    assert settings.rank_memory_limit_mb == (9,)
    assert settings.trust_remote_code is True
    assert settings.api_keys[0].label == "a"


@pytest.mark.parametrize(
    ("key", "value"),
    [("RING_SIZE", True), ("MAX_BODY_BYTES", True), ("LOG_LEVEL", 3), ("MODEL_REPO", ["a"]), ("API_KEYS", {})],
)
def test_a_json_value_of_the_wrong_type_is_refused(refuse: Refuse, key: str, value: Any) -> None:
    message = refuse(file={key: value})
    assert message.startswith(key) and "(my.json): must be " in message


def test_api_keys_have_labels_and_are_in_no_repr_or_message(load: Load, refuse: Refuse) -> None:
    settings = load("API_KEYS=alice:s3cret:x, hunter2 # two of them")
    assert [(key.label, key.key.get_secret_value()) for key in settings.api_keys] == [
        ("alice", "s3cret:x"),
        ("key-2", "hunter2"),
    ]
    assert "s3cret" not in repr(settings) and "hunter2" not in settings.model_dump_json()
    message = refuse("API_KEYS=hunter2,alice:")
    assert message == "API_KEYS=*** (.env line 1): must be key or label:key, several with commas between them (entry 2 has an empty label or key)"  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("dotenv", "names"),
    [
        ("WORKER_HOSTS=a\nHOSTFILE=h.json", ["WORKER_HOSTS=a (.env line 1)", "HOSTFILE=h.json (.env line 2)"]),
        ("LAYER_SPLIT=1,2,3", ["LAYER_SPLIT=1,2,3", "RING_SIZE=2 (default)", "2 in all"]),
        ("LAYER_SPLIT=1,2\nWORKER_HOSTS=a,b", ["LAYER_SPLIT=1,2", "WORKER_HOSTS=a,b", "3 in all"]),
        ("RANK_MEMORY_LIMIT_MB=1,2,3", ["RANK_MEMORY_LIMIT_MB=1,2,3", "RING_SIZE=2 (default)"]),
        ("KV_CACHE_MAX_SIZE=9\nMAX_SEQUENCE_LENGTH=10", ["KV_CACHE_MAX_SIZE=9", "MAX_SEQUENCE_LENGTH=10", "raise"]),
        ("DEFAULT_MAX_TOKENS=9\nMAX_SEQUENCE_LENGTH=9", ["DEFAULT_MAX_TOKENS=9", "MAX_SEQUENCE_LENGTH=9"]),
        ("DEFAULT_MAX_TOKENS=9\nKV_CACHE_MAX_SIZE=9", ["DEFAULT_MAX_TOKENS=9", "KV_CACHE_MAX_SIZE=9"]),
        ("API_PORT=9001\nRING_PORT=9000", ["API_PORT=9001", "RING_PORT=9000", "9000 to 9001"]),
        ("RING_PORT=65535", ["RING_PORT=65535", "65536"]),
        ("POLL_INTERVAL=9\nSTEP_TIMEOUT=5", ["POLL_INTERVAL=9", "STEP_TIMEOUT=5"]),
    ],
)
def test_an_impossible_combination_names_both_keys_and_their_values(
    refuse: Refuse, dotenv: str, names: list[str]
) -> None:
    message = refuse(dotenv)
    assert [name for name in names if name not in message] == []


@pytest.mark.parametrize(
    "dotenv",
    [
        "KV_CACHE_MAX_SIZE=10\nMAX_SEQUENCE_LENGTH=10",
        "DEFAULT_MAX_TOKENS=8\nMAX_SEQUENCE_LENGTH=9",
        "RING_PORT=65534",
        "API_PORT=9001\nRING_PORT=9000\nRING_SIZE=1",
        "API_PORT=9001\nRING_PORT=9000\nWORKER_HOSTS=a,b",
        "LAYER_SPLIT=1,2,3\nWORKER_HOSTS=a,b\nRING_SIZE=7",
    ],
)
def test_a_combination_at_the_border_is_accepted(load: Load, dotenv: str) -> None:
    assert load(dotenv)


def test_a_split_is_checked_against_the_hostfile_too(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text('[{"ssh": "a"}, {"ssh": "b"}, {"ssh": "c"}]')
    assert refuse("HOSTFILE=h.json\nLAYER_SPLIT=1,2").startswith(
        "LAYER_SPLIT=1,2 (.env line 2), HOSTFILE=h.json (.env line 1): "
    )


def test_a_ring_on_the_apis_default_port_loads_on_the_ranks_too(load: Load) -> None:
    settings = load("RING_PORT=8100\nAPI_PORT=9000")
    assert Settings.from_ranks(settings.for_ranks()).ring_port == 8100


def test_the_world_size_comes_from_workers_hostfile_or_ring_size(load: Load, tmp_path: Path) -> None:
    (tmp_path / "hosts.json").write_text(json.dumps([{"ssh": "a"}, {"ssh": "b"}, {"ssh": "c"}]))
    assert load("RING_SIZE=5").world_size_hint == 5
    assert load("RING_SIZE=5\nWORKER_HOSTS=a,b").world_size_hint == 3
    settings = load("RING_SIZE=5\nHOSTFILE=hosts.json")
    assert settings.world_size_hint == 3
    assert settings.hostfile == str(tmp_path / "hosts.json")


@pytest.mark.parametrize("content", [None, "", "{}", "[]", "[1,"])
def test_a_hostfile_that_cannot_be_used_is_refused(refuse: Refuse, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "hosts.json").write_text(content)
    assert refuse("HOSTFILE=hosts.json").startswith("HOSTFILE=hosts.json (.env line 1): ")


def test_settings_never_change_and_never_read_the_environment(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load()
    with pytest.raises(ValidationError):
        settings.ring_size = 3  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setenv("RING_SIZE", "7")
    assert Settings.from_ranks(settings.for_ranks()).ring_size == 2
    assert Settings.from_ranks({}).ring_size == 2


def test_what_travels_to_the_ranks_is_json_without_the_apis_own(load: Load) -> None:
    dotenv = "API_KEYS=a:s3cret\nHF_TOKEN=t0ken\nLAYER_SPLIT=1,2\nDEFAULT_TOP_P=0.5\nMODEL_NAME=m\nMAX_BODY_BYTES=1 MiB"
    settings = load(dotenv)
    text = json.dumps(settings.for_ranks())
    assert "s3cret" not in text and "t0ken" not in text
    there = Settings.from_ranks(json.loads(text))
    left_out = API_ONLY | {"project_root", "passthrough_env"}
    assert there.model_dump(exclude=set(left_out)) == settings.model_dump(exclude=set(left_out))
    assert not any(field in json.loads(text) for field in left_out)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_who_listens_to_this_machine_alone_is_not_warned(host: str) -> None:
    assert list(warnings(Settings(api_host=host))) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "mac1.local"])
def test_who_lets_other_machines_in_without_keys_is_warned(host: str, load: Load) -> None:
    assert [f"API_HOST={host}" in text and "API_KEYS" in text for text in warnings(Settings(api_host=host))] == [True]
    assert list(warnings(load(f"API_HOST={host}\nAPI_KEYS=a:b"))) == []
