"""The command line: keys, settings, and what `serve` says before it serves."""

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from app.access import create_key, list_keys
from app.cli import app, engine_options
from app.database import own_directory
from app.engines.local import EngineSettings
from app.engines.local.__main__ import settings_from
from app.settings import EmbeddedSettings
from tests.migrated import migrated
from tests.service import description

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)


def process(*arguments: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command as a person would."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HALLMARK_", "OTEL_"))}
    return subprocess.run(
        [sys.executable, "-m", "app", *map(str, arguments)],
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(ROOT), **(env or {})},
        capture_output=True,
        text=True,
        timeout=50,
    )


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory in which there is a database."""
    return migrated(tmp_path / "hallmark.db").parent


# --- keys ---


def test_a_key_is_printed_once_listed_and_revoked(tmp_path):
    made = run("keys", "create", "chat page", "--tenant", "acme", "--scope", "chat", "--data-dir", tmp_path)
    assert made.exit_code == 0, made.output
    secret = made.stdout.strip()
    assert re.fullmatch(r"hm_[a-z2-7]{8}_[a-z2-7]{52}", secret)
    assert "acme: chat" in made.stderr
    key_id = secret.split("_")[1]

    listed = run("keys", "list", "--data-dir", tmp_path)
    assert listed.exit_code == 0
    assert re.search(rf"{key_id}.*chat page.*acme.*chat.*active", listed.stdout)
    assert secret.split("_")[2] not in listed.stdout

    revoked = run("keys", "revoke", key_id, "--data-dir", tmp_path)
    assert (revoked.exit_code, revoked.stdout) == (0, f"{key_id} is revoked\n")
    assert "revoked" in run("keys", "list", "--data-dir", tmp_path).stdout
    assert list_keys(tmp_path / "hallmark.db")[0].revoked_at is not None


def test_a_key_is_for_reading_and_asking_unless_said_otherwise(data_dir):
    run("keys", "create", "plain", "--data-dir", data_dir)
    run("keys", "create", "two", "--scope", "metrics", "--scope", "admin", "--data-dir", data_dir)
    assert [key.scopes for key in list_keys(data_dir / "hallmark.db")] == [
        ("chat", "documents:read"),
        ("admin", "metrics"),
    ]


def test_a_key_can_be_made_to_expire_and_is_listed_so(data_dir):
    assert run("keys", "create", "short", "--expires-in-days", "2", "--data-dir", data_dir).exit_code == 0
    in_two_days = time.time() + 2 * 86_400
    (key,) = list_keys(data_dir / "hallmark.db")
    assert key.expires_at is not None
    assert abs(key.expires_at / 1000 - in_two_days) < 60
    create_key(data_dir / "hallmark.db", name="old", expires_at=1_700_000_000_000)
    listed = run("keys", "list", "--data-dir", data_dir, env={"COLUMNS": "200"}).stdout
    day = datetime.fromtimestamp(key.expires_at / 1000, UTC).date()
    assert re.search(rf"short.*active until {day}", listed)
    assert re.search(r"old.*expired 2023-11-14", listed)
    assert run("keys", "create", "x", "--expires-in-days", "0", "--data-dir", data_dir).exit_code == 2


def test_a_key_can_be_given_a_priority_and_limits_and_others_later(data_dir):
    limits = ("--priority", "low", "--requests-per-minute", "60", "--tokens-per-minute", "9000")
    made = run("keys", "create", "report", *limits, "--data-dir", data_dir)
    key_id = made.stdout.split("_")[1]
    listed = run("keys", "list", "--data-dir", data_dir, env={"COLUMNS": "200"}).stdout
    assert "low priority, 60 requests/min, 9000 tokens/min" in listed
    changed = run("keys", "update", key_id, "--priority", "high", "--tokens-per-minute", "0", "--data-dir", data_dir)
    assert (changed.exit_code, changed.stdout) == (0, f"{key_id}: high priority, 60 requests/min\n")
    (key,) = list_keys(data_dir / "hallmark.db")
    assert (key.priority, key.requests_per_minute, key.tokens_per_minute) == ("high", 60, None)
    for wrong in (("--priority", "urgent"), ("--requests-per-minute", "-1"), ("--tokens-per-minute", str(10**10))):
        assert run("keys", "update", key_id, *wrong, "--data-dir", data_dir).exit_code == 2
    assert list_keys(data_dir / "hallmark.db") == [key]
    assert run("keys", "update", "nobodys", "--priority", "low", "--data-dir", data_dir).exit_code == 1


def test_keys_are_those_of_the_configured_database(tmp_path, postgres):
    url = postgres.create_database()
    env = {"HALLMARK_DATABASE_URL": url}
    made = run("keys", "create", "shared", "--data-dir", tmp_path, env=env)
    assert made.exit_code == 0, made.output
    (key,) = list_keys(url)
    assert key.id == made.stdout.split("_")[1]
    assert "shared" in run("keys", "list", "--data-dir", tmp_path, env=env).stdout
    assert run("keys", "revoke", key.id, "--data-dir", tmp_path, env=env).exit_code == 0
    assert list_keys(url)[0].revoked_at is not None
    assert not list(tmp_path.iterdir())  # Nothing was made beside it.


def test_names_are_shown_as_they_are(data_dir):
    run("keys", "create", "[red]:key:[/]", "--data-dir", data_dir)
    assert "[red]:key:[/]" in run("keys", "list", "--data-dir", data_dir).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "x", "--scope", "everything"), "no scope 'everything'"),
        (("create", "x", "--tenant", " "), "tenant must not be empty"),
        (("create", ""), "name must not be empty"),
    ],
)
def test_a_wrong_key_is_refused_with_2(data_dir, arguments, said):
    result = run("keys", *arguments, "--data-dir", data_dir)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""


def test_an_unknown_key_cannot_be_revoked(data_dir):
    result = run("keys", "revoke", "nobodys", "--data-dir", data_dir)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no API key 'nobodys'" in result.stderr


def test_a_data_directory_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").write_text("I am no directory")
    result = run("keys", "list", "--data-dir", tmp_path / "file")
    assert result.exit_code == 1
    assert "file" in result.stderr
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "hallmark.db").write_bytes(b"I am no database" * 100)
    result = run("keys", "list", "--data-dir", tmp_path / "data")
    assert result.exit_code == 1
    assert "cannot be used" in result.stderr


# --- settings ---


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"HALLMARK_PORT": "eighty"}, "setting port:"),
        ({"HALLMARK_ENGINE_DIALECT": "gpt"}, "setting engine.dialect:"),
        ({"HALLMARK_ENGINE_URRL": "http://x"}, "setting engine.urrl:"),
        ({"HALLMARK_RETRIEVAL_PASSAGE_TOKENS": "9"}, "setting retrieval.passage_tokens:"),
        ({"HALLMARK_ENGINE_ADAPTERS": "[broken"}, 'setting HALLMARK_ENGINE_ADAPTERS: it is read as JSON, such as ["'),
        ({"HALLMARK_CORS_ORIGINS": "https://x", "HALLMARK_HOST": "https://x"}, "setting HALLMARK_CORS_ORIGINS: "),
        ({"HALLMARK_PRIVACY_REDACT": "email,card"}, "setting HALLMARK_PRIVACY_REDACT: "),
        ({"HALLMARK_PRIVACY_TENANTS": "acme"}, 'setting HALLMARK_PRIVACY_TENANTS: it is read as JSON, such as {"'),
        ({"HALLMARK_ENGINES": "big"}, 'setting HALLMARK_ENGINES: it is read as JSON, such as {"'),
        ({"HALLMARK_ENGINE": "http://x", "HALLMARK_URL": "http://x"}, "HALLMARK_ENGINE_NAME is one setting of it"),
        ({"HALLMARK_ENGINES": '{"big": {}}'}, "setting engines.big.urls: name at least one engine"),
        ({"HALLMARK_HOST": ""}, "setting host: "),
        ({"HALLMARK_ENGINE_URL": "localhost:8000"}, "must start with http:// or https://"),
    ],
    ids=lambda value: "=".join(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_named_and_exits_with_2(tmp_path, env, said):
    result = run("serve", "--data-dir", tmp_path, env=env)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Value error" not in result.stderr  # What pydantic says before our own words.


def test_a_wrong_settings_file_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, said in (
        (b"port = 1\n[limits]\nmax = 1\n", "limits.max"),
        (b"port = = 1", "hallmark.toml: Invalid value (at line 1"),
        (b"\xff", "hallmark.toml: "),
    ):
        (tmp_path / "hallmark.toml").write_bytes(text)
        result = run("serve")
        assert result.exit_code == 2
        assert said in result.stderr


def test_the_environment_goes_before_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hallmark.toml").write_text('data_dir = "from-file"\nport = "no number"\n')
    result = run("keys", "create", "x", env={"HALLMARK_PORT": "8081"})
    assert result.exit_code == 0
    assert (tmp_path / "from-file" / "hallmark.db").exists()


# --- engine ---


def test_the_engine_by_itself_goes_by_the_settings_and_its_options_before_them(tmp_path):
    (tmp_path / "hallmark.toml").write_text('[embedded]\nmodel = "/nowhere/file"\n')
    variable = {"HALLMARK_EMBEDDED_MODEL": "/nowhere/variable"}
    for options, env, said in (
        ((), {}, "/nowhere/file"),
        ((), variable, "/nowhere/variable"),
        (("--model", "/nowhere/option"), variable, "/nowhere/option"),
    ):
        done = process("engine", *options, cwd=tmp_path, env=env)
        assert done.returncode == 1
        assert f"there is no folder {said};" in done.stderr
    refused = process("engine", cwd=tmp_path, env={"HALLMARK_EMBEDDED_MAX_BATCH": "0"})
    assert refused.returncode == 2
    assert "setting embedded.max_batch:" in refused.stderr


def test_every_setting_of_the_embedded_engine_is_one_of_its_options():
    given = dict.fromkeys(EmbeddedSettings.model_fields, 7) | {"enabled": True, "model": "-m", "dtype": "fp32"}
    engine = settings_from(engine_options(EmbeddedSettings(**given)))
    assert {name: getattr(engine, name) for name in given if name != "enabled"} == {
        name: value for name, value in given.items() if name != "enabled"
    }
    assert settings_from(engine_options(EmbeddedSettings())) == EngineSettings()


# --- serve ---


def test_serving_needs_an_engine(tmp_path):
    result = run("serve", "--data-dir", tmp_path)
    assert result.exit_code == 2
    assert "HALLMARK_ENGINE_URL" in result.stderr
    assert "--local-engine" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_taken_port_is_told_before_anything_is_opened(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        env = {"HALLMARK_ENGINE_URL": "http://127.0.0.1:1", "HALLMARK_PROT": "1", "HALLMARK_XYZZY": "1"}
        done = process("serve", "--port", port, "--data-dir", "data", cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()
    # A typo in a variable does not go unnoticed.
    assert "HALLMARK_PROT is no setting; did you mean HALLMARK_PORT?" in done.stderr
    assert "HALLMARK_XYZZY is no setting, and is ignored." in done.stderr
    assert done.stderr.count("is no setting") == 2


def cannot_start(data_dir: Path) -> str:
    """Why serving from a folder is refused."""
    env = {"HALLMARK_ENGINE_URL": "http://127.0.0.1:1", "COLUMNS": "400"}
    done = run("serve", "--port", "0", "--data-dir", data_dir, env=env)
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    return done.stderr.partition("cannot start:")[2]


def test_a_data_directory_in_use_is_told(tmp_path):
    with own_directory(tmp_path / "data"):
        assert str(tmp_path / "data") in cannot_start(tmp_path / "data")


@pytest.mark.parametrize("data_dir", ["file", "file/data"])
def test_a_data_directory_that_is_a_file_is_told_with_its_setting(tmp_path, data_dir):
    (tmp_path / "file").write_text("I am no directory")
    said = f"the data directory {str(tmp_path / data_dir)!r} cannot be made: there is a file of that name, or above it."
    assert cannot_start(tmp_path / data_dir).strip().startswith(said)
    worked = run("worker", "--data-dir", tmp_path / data_dir, env={"COLUMNS": "400"})
    assert (worked.exit_code, type(worked.exception)) == (1, SystemExit)
    assert f"cannot work: {said} Name another by HALLMARK_DATA_DIR" in worked.stderr


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_prompt_file_that_cannot_be_read_is_told_with_its_setting(tmp_path, monkeypatch, content):
    if content is not None:
        (tmp_path / "prompt.txt").write_bytes(content)
    monkeypatch.setenv("HALLMARK_RELEASE_PROMPT_FILE", str(tmp_path / "prompt.txt"))
    said = cannot_start(tmp_path / "data").strip()
    assert said.startswith(f"`release.prompt_file`: {str(tmp_path / 'prompt.txt')!r} cannot be read: ")
    assert "Errno" not in said


def test_a_database_that_is_none_is_told(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "hallmark.db").write_bytes(b"I am no database" * 100)
    assert "hallmark.db" in cannot_start(tmp_path / "data")


def test_tables_that_are_not_ours_are_told(tmp_path):
    (tmp_path / "data").mkdir()
    with closing(sqlite3.connect(tmp_path / "data" / "hallmark.db")) as connection:
        connection.execute("CREATE TABLE predictions (id TEXT)")
    assert "already exists" in cannot_start(tmp_path / "data")
    listed = run("keys", "list", "--data-dir", tmp_path / "data", env={"COLUMNS": "400"})
    assert (listed.exit_code, type(listed.exception)) == (1, SystemExit)
    assert "already exists" in listed.stderr


# --- the rest ---


def test_the_description_is_printed_as_it_is_served(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("openapi")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == description()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("keys",)])
def test_without_a_command_the_commands_are_shown(arguments: tuple[Any, ...]):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Commands" in result.output


def test_an_unknown_command_is_refused():
    assert run("fly").exit_code == 2
