"""Settings come from the environment before the file, one by one, and a wrong one is named."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import PrivacySettings, Settings, unknown_variables


@pytest.fixture(autouse=True)
def _an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str) -> None:
    Path("hallmark.toml").write_text(text, encoding="utf-8")


def test_nothing_needs_to_be_set():
    settings = Settings()
    assert (settings.host, settings.port, settings.record) == ("127.0.0.1", 8080, "required")
    assert settings.open_metrics is False


@pytest.mark.parametrize(
    ("variable", "value", "path", "expected"),
    [
        ("HALLMARK_PORT", "9000", "port", 9000),
        ("HALLMARK_DATA_DIR", "/srv/x", "data_dir", Path("/srv/x")),
        ("HALLMARK_ENGINE_URL", "http://e:1", "engine.url", "http://e:1"),
        ("HALLMARK_ENGINE_FIRST_TOKEN_TIMEOUT_SECONDS", "1.5", "engine.first_token_timeout_seconds", 1.5),
        ("HALLMARK_ENGINE_ADAPTERS", '["a", "b"]', "engine.adapters", ("a", "b")),
        ("HALLMARK_QDRANT_URL", "http://q:6333", "qdrant.url", "http://q:6333"),
        ("HALLMARK_RETRIEVAL_PASSAGE_TOKENS", "64", "retrieval.passage_tokens", 64),
        ("HALLMARK_LIMITS_MAX_CONCURRENT_ANSWERS", "3", "limits.max_concurrent_answers", 3),
        ("HALLMARK_ENGINE_ADAPTER_FOLDER", "/srv/adapters", "engine.adapter_folder", Path("/srv/adapters")),
        ("HALLMARK_RELEASE_CHECK", "end", "release.check", "end"),
        ("HALLMARK_RECORD", "best_effort", "record", "best_effort"),
        ("HALLMARK_CORS_ORIGINS", '["https://a.example", "*"]', "cors_origins", ("https://a.example", "*")),
    ],
)
def test_a_variable_sets_one_setting_over_the_file_s(monkeypatch, variable, value, path, expected):
    write('port = 7000\n[engine]\nurl = "http://file:1"\ntoken = "from-file"\n[limits]\nrequest_timeout_seconds = 9\n')
    monkeypatch.setenv(variable, value)
    settings = Settings()
    found: object = settings
    for name in path.split("."):
        found = getattr(found, name)
    assert found == expected
    # What the file says beside it still holds.
    assert settings.engine.token is not None
    assert settings.limits.request_timeout_seconds == 9


def test_the_file_sets_what_the_environment_leaves_open():
    write('log_level = "debug"\n[release]\nname = "support"\ntop_k = 3\n')
    settings = Settings()
    assert (settings.log_level, settings.release.name, settings.release.top_k) == ("debug", "support", 3)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot = 1\n", "prot"),
        ("[engine]\nurll = 1\n", "engine.urll"),
        ("port = 70000\n", "port"),
        ("[limits]\nmax_concurrent_answers = 0\n", "limits.max_concurrent_answers"),
        ("[limits]\nmax_waiting_answers = -1\n", "limits.max_waiting_answers"),
        ("[limits]\nmax_wait_seconds = 0\n", "limits.max_wait_seconds"),
        ('[limits]\nredis_url = "redis-1:6379"\n', "limits.redis_url"),
        ('[limits]\nredis_url = "redis://"\n', "limits.redis_url"),
        ("[retrieval]\npassage_tokens = 8\n", "retrieval.passage_tokens"),
        ('[release]\nname = "Not A Name"\n', "release.name"),
        ('[release]\nfallback = "guess"\n', "release.fallback"),
        ('record = "maybe"\n', "record"),
        ('host = ""\n', "host"),
        ("[engine]\nconnect_timeout_seconds = 0\n", "engine.connect_timeout_seconds"),
        ("[engine]\nconnect_timeout_seconds = inf\n", "engine.connect_timeout_seconds"),
        ("[limits]\nrequest_timeout_seconds = nan\n", "limits.request_timeout_seconds"),
        *(
            (f"[privacy]\n{name} = {days}\n", f"privacy.{name}")
            for name in PrivacySettings.model_fields
            if name.endswith("_days")
            for days in ("0", "36501", "inf", "nan")
        ),
        ('[qdrant]\ncollection = "a b"\n', "qdrant.collection"),
        ('[engine]\nurl = "localhost:8000"\n', "engine.url"),
        ('[engine]\nurl = "http://"\n', "engine.url"),
        ('[engine]\nurl = "http://gpu:port"\n', "engine.url"),
        ('[engine]\nurls = ["http://a:1", "b:1"]\n', "engine.urls.1"),
        ('[engine]\nurls = ["vlm+http://a:1"]\n', "engine.urls.0"),
        ("[engine]\nwarmup_requests = -1\n", "engine.warmup_requests"),
        ('[engines.big]\nurl = "gpu"\n', "engines.big.url"),
        ('[engines."Big One"]\nurl = "http://a:1"\n', "engines.Big One.[key]"),
        ('[engines.big]\ndialect = "vllm"\n', ""),
        ('[engines.tgi]\nurl = "http://a:1"\n', ""),
        ('[release]\nengine_fallback = "small"\n', "release.engine_fallback"),
        ('[qdrant]\nurl = "qdrant:6333"\n', "qdrant.url"),
        ('public_url = "answers.example.com"\n', "public_url"),
        ('cors_origins = ["https://a.example/page"]\n', "cors_origins.0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(text, named):
    write(text)
    with pytest.raises(ValidationError) as raised:
        Settings()
    assert [".".join(map(str, error["loc"])) for error in raised.value.errors()] == [named]


def test_settings_do_not_change_once_read():
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.engine.url = "http://x"  # type: ignore[misc]


def test_a_secret_is_not_shown_where_settings_are(monkeypatch):
    monkeypatch.setenv("HALLMARK_ENGINE_TOKEN", "hunter2")
    monkeypatch.setenv("HALLMARK_QDRANT_API_KEY", "hunter3")
    monkeypatch.setenv("HALLMARK_LIMITS_REDIS_URL", "rediss://me:hunter4@redis-1:6379/0")
    settings = Settings()
    assert settings.engine.token is not None
    assert settings.engine.token.get_secret_value() == "hunter2"
    for shown in (repr(settings), str(settings), settings.model_dump_json()):
        assert "hunter" not in shown


def test_a_database_is_given_by_a_url_that_is_never_shown(monkeypatch):
    monkeypatch.setenv("HALLMARK_DATABASE_URL", "postgresql://me:hunter2@host/name")
    settings = Settings()
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value().endswith("@host/name")
    assert "hunter2" not in repr(settings)
    monkeypatch.setenv("HALLMARK_DATABASE_URL", "mysql://me:hunter2@host/name")
    with pytest.raises(ValidationError, match="postgresql://user:password@host/name") as raised:
        Settings()
    assert all("hunter2" not in problem["msg"] for problem in raised.value.errors())


def test_engines_of_a_group_are_url_and_urls_each_once_and_with_a_dialect_of_its_own():
    write(
        '[engine]\nurl = "http://a:1"\nurls = ["http://b:1", "vllm+https://c/v1", "http://a:1"]\ndialect = "sglang"\n'
        '[engines.big]\nurls = ["http://d:1"]\ndialect = "vllm"\nmodel = "org/big"\n'
    )
    settings = Settings()
    assert settings.engine.members == [("sglang", "http://a:1"), ("sglang", "http://b:1"), ("vllm", "https://c/v1")]
    assert settings.engines["big"].members == [("vllm", "http://d:1")]
    assert (settings.main_engine, settings.engines["big"].model) == ("sglang", "org/big")


def test_groups_come_from_the_environment_as_json(monkeypatch):
    monkeypatch.setenv("HALLMARK_ENGINES", '{"big": {"urls": ["http://d:1"]}}')
    assert Settings().engines["big"].members == [("tgi", "http://d:1")]
    monkeypatch.setenv("HALLMARK_ENGINES_SMALL", '{"urls": ["http://e:1"]}')
    assert "small" in Settings().engines
    assert list(unknown_variables()) == []


def test_the_embedded_engine_s_name_is_its_own():
    write('[embedded]\nenabled = true\n[engines.tgi]\nurl = "http://a:1"\n')
    assert Settings().main_engine == "embedded"
