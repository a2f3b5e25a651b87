"""Where settings come from: .env as people write it, who wins, the registry, and names nobody reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from config import ConfigError, Settings, export_passthrough, load_config, with_origins
from config.settings import KEYS
from tests.config.conftest import Load, Refuse

ROOT = Path(__file__).parent.parent.parent


def test_it_starts_without_any_file(tmp_path: Path) -> None:
    settings = load_config(tmp_path, {})
    assert settings.model_repo == settings.model_name == "builtin"
    assert settings.project_root == tmp_path.resolve()


def test_the_root_is_the_folder_above_the_package() -> None:
    assert Settings.model_fields["project_root"].exclude
    assert load_config(environ={"RING_SIZE": "1"}).project_root == ROOT.resolve()


@pytest.mark.parametrize(
    "line",
    [
        "RING_SIZE=3",
        "RING_SIZE=3 # three of them",
        "RING_SIZE = 3\t# three",
        "  RING_SIZE='3'  # three",
        'export RING_SIZE="3"',
        'export  RING_SIZE = " 3 " # three',
        "RING_SIZE=3\r",
        "\ufeffRING_SIZE=3",
        "RING_SIZE=2\nRING_SIZE=3",
    ],
)
def test_dotenv_is_read_as_people_write_it(load: Load, line: str) -> None:
    assert load(f"{line}\n").ring_size == 3


def test_a_whole_dotenv_of_windows_is_read(load: Load, refuse: Refuse) -> None:
    dotenv = "# mine\r\n\r\nWORKER_HOSTS= # none yet\r\nMODEL_REPO='C:\\models\\my model' # here\r\n\r\nAPI_PORT=9\r\n"
    settings = load(dotenv)
    assert (settings.worker_hosts, settings.model_repo, settings.api_port) == ((), "C:\\models\\my model", 9)
    assert "(.env line 7)" in refuse(dotenv + "API_PORT=x\r\n")


def test_a_dollar_and_a_hash_inside_a_value_stand_for_themselves(load: Load) -> None:
    assert load("API_KEYS=a:x${HOME}#y").api_keys[0].key.get_secret_value() == "x${HOME}#y"


@pytest.mark.parametrize("line", ["RING_SIZE 3", "RING_SIZE", 'RING_SIZE="3', "RING_SIZE='3"])
def test_a_line_that_is_no_setting_is_refused(refuse: Refuse, line: str) -> None:
    assert refuse(f"\n# c\n{line}\n") == (
        "RING_SIZE (.env line 3): must read KEY=value, with both quotes if the value has any"
    )


def test_a_dotenv_that_is_no_utf_8_or_no_file_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    assert "is not UTF-8 text" in refuse("RING_SIZE=1".encode("utf-16"))
    (tmp_path / ".env").unlink()
    (tmp_path / ".env").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path, {})


def test_the_environment_wins_over_dotenv_and_dotenv_over_the_file(load: Load) -> None:
    file = {"RING_SIZE": 3, "API_PORT": 3, "RING_PORT": 3000}
    settings = load("RING_SIZE=4\nAPI_PORT=4", environ={"RING_SIZE": "5"}, file=file)
    assert (settings.ring_size, settings.api_port, settings.ring_port) == (5, 4, 3000)


def test_an_empty_value_stands_for_the_default_over_the_sources_below(load: Load) -> None:
    assert load("WORKER_HOSTS=a", environ={"WORKER_HOSTS": ""}).worker_hosts == ()
    assert load("KV_CACHE_MAX_SIZE=", file={"KV_CACHE_MAX_SIZE": 7}).kv_cache_max_size is None
    assert load("CONFIG_FILE=missing.json", environ={"CONFIG_FILE": ""}).config_file == ""


MODELS = {"small": {"MODEL_REPO": "org/small-4bit", "DEFAULT_TEMPERATURE": 0.1, "KV_CACHE_MAX_SIZE": 100}}


def test_a_short_name_gives_the_repository_its_name_and_its_settings(load: Load) -> None:
    settings = load("MODEL_REPO=small", file={"KV_CACHE_MAX_SIZE": 50, "MODEL_NAME": "other", "models": MODELS})
    assert (settings.model_repo, settings.model_name) == ("org/small-4bit", "small")
    assert (settings.default_temperature, settings.kv_cache_max_size) == (0.1, 100)
    assert load("MODEL_REPO=small\nMODEL_NAME=", file={"models": MODELS}).model_name == "small"


def test_the_environment_and_dotenv_win_over_an_entry(load: Load) -> None:
    dotenv = "MODEL_REPO=small\nDEFAULT_TEMPERATURE=0.2\nMODEL_NAME=mine"
    settings = load(dotenv, environ={"KV_CACHE_MAX_SIZE": "9"}, file={"models": MODELS})
    assert (settings.default_temperature, settings.kv_cache_max_size, settings.model_name) == (0.2, 9, "mine")


def test_an_entry_counts_only_for_its_own_model(load: Load) -> None:
    settings = load("MODEL_REPO=org/small-4bit", file={"models": MODELS})
    assert (settings.model_name, settings.default_temperature) == ("org/small-4bit", None)
    assert load(file={"MODEL_REPO": "small", "models": MODELS}).model_repo == "org/small-4bit"


def test_a_wrong_value_in_an_entry_names_the_entry(refuse: Refuse) -> None:
    models = {"small": {"MODEL_REPO": "a/b", "DEFAULT_TOP_P": 7}}
    message = refuse("MODEL_REPO=small", file={"models": models})
    assert message.startswith('DEFAULT_TOP_P=7 (my.json, "models", "small"): must be ')


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("{", "my.json: is not valid JSON"),
        ("[]", "my.json: must be a JSON object"),
        ({"models": []}, '"models" must be an object of objects'),
        ({"models": {"a": "org/a"}}, '"models" must be an object of objects'),
        ({"models": {"a": {}}}, 'my.json, "models", "a": needs "MODEL_REPO"'),
        ({"models": {"a": {"MODEL_REPO": "x/y", "API_PORT": 1}}}, "API_PORT=1 (my.json"),
        ({"models": {"a": {"MODEL_REPO": "x/y", "DEFAULT_TOPP": 1}}}, "did you mean DEFAULT_TOP_P?"),
        ({"RING_SIZ": 2}, "RING_SIZ=2 (my.json): no such key here; did you mean RING_SIZE?"),
        ({"ring_size": 2}, "ring_size=2 (my.json): no such key here; did you mean RING_SIZE?"),
        ({"model": {}}, "model={} (my.json): no such key"),
        ({"CONFIG_FILE": "x"}, "CONFIG_FILE=x (my.json): not a key for this place"),
    ],
)
def test_a_config_file_with_a_mistake_is_refused(refuse: Refuse, file: Any, says: str) -> None:
    assert says in refuse(file=file)


def test_a_config_file_with_the_mark_windows_puts_first_is_read(load: Load) -> None:
    assert load(file='\ufeff{"RING_SIZE": 3}').ring_size == 3


def test_a_config_file_that_is_not_there_is_refused(refuse: Refuse) -> None:
    assert refuse("CONFIG_FILE=no.json").startswith("CONFIG_FILE=no.json (.env line 1): there is no such file")


@pytest.mark.parametrize(("written", "meant"), [("smal", "small"), ("bultin", "builtin")])
def test_a_near_miss_of_a_short_name_is_refused(
    refuse: Refuse, load: Load, tmp_path: Path, written: str, meant: str
) -> None:
    message = refuse(f"MODEL_REPO={written}", file={"models": MODELS})
    assert message.startswith(f"MODEL_REPO={written} (.env line 1)") and f"did you mean {meant}?" in message
    (tmp_path / written).mkdir()
    assert load(f"MODEL_REPO={written}", file={"models": MODELS}).model_repo == written


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("RING_SIZ", "RING_SIZE"),
        ("ring_size", "RING_SIZE"),
        ("RNIG_SIZE", "RING_SIZE"),
        ("WORKER_HOST", "WORKER_HOSTS"),
        ("HOST_FILE", "HOSTFILE"),
        ("KV_CACHE_SIZE", "KV_CACHE_MAX_SIZE"),
        ("MAX_CONCURENT_REQUEST", "MAX_CONCURRENT_REQUESTS"),
        ("REQUEST_TIMEOUT_S", "REQUEST_TIMEOUT"),
        ("API_KEY", "API_KEYS"),
    ],
)
def test_a_near_miss_is_refused_everywhere_with_the_name_that_was_meant(
    refuse: Refuse, written: str, meant: str
) -> None:
    for message, origin in (
        (refuse(f"{written}=1"), ".env line 1"),
        (refuse(environ={written: "1"}), "the environment"),
        (refuse(file={written: "1"}), "my.json"),
    ):
        value = "***" if "KEY" in written else "1"
        assert message.startswith(f"{written}={value} ({origin}): no such key")
        assert f"did you mean {meant}?" in message


def test_a_far_miss_in_dotenv_gets_a_suggestion_or_the_list(refuse: Refuse) -> None:
    assert "did you mean MAX_BODY_BYTES?" in refuse("MAX_BODY_LENGTH=1")
    assert refuse("FAVOURITE_COLOUR=blue").endswith("remove it (docs/configuration.md lists the keys)")


def test_variables_of_other_programs_never_stop_the_start(load: Load) -> None:
    names = (
        "PATH HOME HOSTNAME HOSTTYPE HOST PORT MODEL MODELS MODEL_PATH MODEL_DIR LOG_DIR LOG_PATH APP_PORT APP_HOST "
        "DEBUG API_URL API_BASE OPENAI_API_KEY RING_API_KEY VLLM_HOST_IP HF_TOKEN MLX_RANK OMP_NUM_THREADS http_proxy "
        "SSH_AUTH_SOCK SSH_CONNECTION MAX_TOKENS TIMEOUT CONFIG CONFIG_DIR STOP_TIMEOUT DB_HOST DB_PORT"
    )
    environ = dict.fromkeys(names.split(), "whatever")
    assert load(environ=environ) == load()
    assert load(environ={"MODEL_NAME": "theirs"}).model_name == "theirs"


def test_a_near_miss_another_program_needs_is_settled_by_setting_our_key(load: Load) -> None:
    assert load("API_KEYS=", environ={"API_KEY": "theirs"}).api_keys == ()
    assert load("API_KEYS=a:b", environ={"API_KEY": "theirs"}).api_keys[0].label == "a"


def test_names_of_others_in_dotenv_pass_through_and_the_environment_wins(load: Load) -> None:
    dotenv = "HF_TOKEN=s3cret # mine\nHTTPS_PROXY=http://p\nno_proxy=a\nMLX_METAL_DEBUG=1\nHF_HOME='/a b'"
    settings = load(dotenv, environ={"HF_HOME": "/c", "HF_HUB_OFFLINE": "1"})
    assert settings.passthrough_env == {
        "HF_TOKEN": "s3cret",
        "HTTPS_PROXY": "http://p",
        "no_proxy": "a",
        "MLX_METAL_DEBUG": "1",
        "HF_HOME": "/c",
    }
    assert "s3cret" not in repr(settings)
    environ = {"HTTPS_PROXY": "http://q"}
    export_passthrough(settings, environ)
    assert (environ["HTTPS_PROXY"], environ["HF_TOKEN"]) == ("http://q", "s3cret")


def test_all_mistakes_are_told_in_one_go(refuse: Refuse) -> None:
    message = refuse("RING_SIZ=2\nAPI_PORT=x\nLOG_LEVEL=loud", environ={"STEP_TIMEOUT": "-1"}, file={"FOO": 1})
    assert [line.split("=")[0] for line in sorted(message.splitlines())] == [
        *("API_PORT", "FOO", "LOG_LEVEL", "RING_SIZ", "STEP_TIMEOUT"),
    ]


def test_loading_leaves_the_environment_as_it_was(load: Load) -> None:
    before = dict(os.environ)
    load("HF_TOKEN=x\nRING_SIZE=3")
    assert dict(os.environ) == before


def test_the_example_dotenv_names_every_key_and_changes_nothing(load: Load) -> None:
    text = (ROOT / ".env.example").read_text()
    assert load(text) == load()
    lines = [line.removeprefix("# ") for line in text.splitlines() if line.split("=")[0].removeprefix("# ") in KEYS]
    assert sorted(line.split("=")[0] for line in lines) == sorted(KEYS)
    assert load("\n".join(lines)) == load()


def test_the_example_config_file_loads(tmp_path: Path) -> None:
    example = ROOT / "config" / "config.example.json"
    settings = load_config(tmp_path, {"CONFIG_FILE": str(example), "MODEL_REPO": "smollm2"})
    assert (settings.model_repo, settings.model_name, settings.default_temperature) == ("builtin", "smollm2", 0.2)
    plain = load_config(tmp_path, {"CONFIG_FILE": str(example)})
    assert plain.model_copy(update={"config_file": ""}) == load_config(tmp_path, {})


def test_the_docs_name_every_key_with_its_default(load: Load) -> None:
    rows = [line for line in (ROOT / "docs" / "configuration.md").read_text().splitlines() if line.startswith("| `")]
    cells = {row.split("|")[1].strip(" `"): row.split("|")[2].strip() for row in rows}
    assert sorted(cells) == sorted(KEYS)
    stated = {key: cell.strip("`") for key, cell in cells.items() if cell.startswith("`")}
    assert load("\n".join(f"{key}={value}" for key, value in stated.items())) == load()


def test_a_later_message_gets_the_places_where_its_keys_were_set(load: Load, tmp_path: Path) -> None:
    load("RING_SIZE=4\n\nRANK_MEMORY_LIMIT_MB=10", file={"models": MODELS})
    environ = {"API_PORT": "4", "MODEL_REPO": "small"}
    message = "Rank 0 has 10 MiB: lower KV_CACHE_RESERVED_MEMORY_MB or raise RANK_MEMORY_LIMIT_MB"
    assert with_origins(message, tmp_path, environ) == f"{message}\n(set: RANK_MEMORY_LIMIT_MB in .env line 3)"
    assert "(set: API_PORT in the environment, RING_SIZE in" in with_origins("API_PORT=4, RING_SIZE", tmp_path, environ)
    assert 'MODEL_REPO in my.json, "models", "small"' in with_origins("MODEL_REPO=x/y: no", tmp_path, environ)
    for enough in ("RING_SIZE=4 (.env line 1): must be", "RING_SIZES", "nothing of ours"):
        assert with_origins(enough, tmp_path, environ) == enough
    (tmp_path / ".env").write_bytes("RING_SIZE=1".encode("utf-16"))
    assert with_origins(message, tmp_path, environ) == message
