"""The deploy files name settings, routes and parts that there are."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from pydantic import BaseModel
from typer.main import get_command

from app.cli import app as hallmark
from app.engines.dialects import DIALECTS
from app.serving import GRACE_SECONDS
from app.settings import Settings, unknown_variables
from tests.service import description

DEPLOY = Path(__file__).parents[2] / "deploy"
LOADING_SECONDS = 900
"""A quarter of an hour: what an engine may take to download and load its model."""

SECRETS = {
    "HALLMARK_DATABASE_URL": "postgresql://hallmark:secret@postgres/hallmark",
    "HALLMARK_LIMITS_REDIS_URL": "redis://redis:6379/0",
    "HALLMARK_PRIVACY_MASTER_KEY": "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
}
"""What the variables might hold whose values are in a secret."""


def objects() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))


def found(kind: str, name: str) -> dict[str, Any]:
    (match,) = [each for each in objects() if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return match


def container(kind: str, name: str) -> dict[str, Any]:
    (only,) = found(kind, name)["spec"]["template"]["spec"]["containers"]
    return dict(only)


def variables() -> dict[str, dict[str, str]]:
    """The gateway's environment in each file, and the worker's; of a secret a value that might be in it."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return {
        "compose.yaml": compose["services"]["gateway"]["environment"],
        "kubernetes.yaml": environment("StatefulSet", "gateway"),
        "kubernetes.yaml, worker": environment("Deployment", "worker"),
    }


def environment(kind: str, name: str) -> dict[str, str]:
    given = container(kind, name)
    (source,) = given["envFrom"]
    settings = found("ConfigMap", source["configMapRef"]["name"])["data"]
    return settings | {each["name"]: each.get("value") or SECRETS[each["name"]] for each in given["env"]}


def secret_variables() -> Iterator[str]:
    """The settings that are secrets."""
    for name, field in Settings.model_fields.items():
        inner = type(field.default).model_fields if isinstance(field.default, BaseModel) else {"": field}
        for each, inner_field in inner.items():
            if "SecretStr" in str(inner_field.annotation):
                yield "_".join(filter(None, ("HALLMARK", name.upper(), each.upper())))


@pytest.mark.parametrize("file", variables())
def test_the_gateways_variables_are_settings_with_values_that_are_taken(
    file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # Where there is no hallmark.toml.
    for name, value in variables()[file].items():
        assert isinstance(value, str), f"{name}: Kubernetes and compose want a string, so quote {value!r}"
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.engine.members
    assert list(unknown_variables()) == []


def test_secrets_come_from_a_secret() -> None:
    secrets = set(secret_variables())
    assert {"HALLMARK_DATABASE_URL", "HALLMARK_ENGINE_TOKEN", "HALLMARK_LIMITS_REDIS_URL"} <= secrets
    assert not secrets & found("ConfigMap", "hallmark")["data"].keys()
    for each in container("StatefulSet", "gateway")["env"] + container("Deployment", "worker")["env"]:
        assert ("valueFrom" in each) == (each["name"] in secrets), each["name"]
        if "valueFrom" in each:
            assert each["valueFrom"]["secretKeyRef"]["name"] == "hallmark"


def test_probes_ask_for_routes_that_there_are() -> None:
    gateway, engine = container("StatefulSet", "gateway"), container("Deployment", "engine")
    routes = description()["paths"]
    asked = {probe: gateway[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")}
    assert asked == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
    assert set(asked.values()) <= routes.keys()
    dialect = DIALECTS[variables()["kubernetes.yaml"]["HALLMARK_ENGINE_DIALECT"]]
    assert {engine[f"{probe}Probe"]["httpGet"]["path"] for probe in asked} == {dialect.health_path}


def test_there_is_a_minimum_of_each_and_it_is_kept_while_nodes_are_drained() -> None:
    gateways, engines = found("StatefulSet", "gateway")["spec"], found("Deployment", "engine")["spec"]
    assert gateways["replicas"] >= 2
    assert engines["replicas"] >= 1
    assert engines["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    probe = container("Deployment", "engine")["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= LOADING_SECONDS
    assert gateways["template"]["spec"]["terminationGracePeriodSeconds"] > GRACE_SECONDS
    for name, spec in (("gateway", gateways), ("engine", engines)):
        budget = found("PodDisruptionBudget", name)["spec"]
        assert budget["minAvailable"] >= 1
        assert budget["selector"] == spec["selector"]


def test_workers_do_the_periodic_work_of_the_gateways_under_the_same_settings() -> None:
    gateway, worker = container("StatefulSet", "gateway"), container("Deployment", "worker")
    assert (worker["image"], worker["securityContext"]) == (gateway["image"], gateway["securityContext"])
    assert get_command(hallmark).commands.keys() >= {worker["command"][1]} == {"worker"}
    pods = [found(*each)["spec"]["template"]["spec"] for each in (("StatefulSet", "gateway"), ("Deployment", "worker"))]
    assert pods[0]["securityContext"] == pods[1]["securityContext"]
    assert found("Deployment", "worker")["spec"]["replicas"] >= 2  # One takes over when the other's node goes.
    of_gateway, of_worker = environment("StatefulSet", "gateway"), environment("Deployment", "worker")
    assert of_gateway.items() - of_worker.items() == {
        ("HALLMARK_LIMITS_REDIS_URL", SECRETS["HALLMARK_LIMITS_REDIS_URL"])
    }
    assert of_worker.items() <= of_gateway.items()
    assert {"HALLMARK_DATABASE_URL", "HALLMARK_PRIVACY_MASTER_KEY", "HALLMARK_PRIVACY_CONTENT"} <= of_worker.keys()
    ((data,), (mount,)) = pods[1]["volumes"], worker["volumeMounts"]
    assert (data, mount) == ({"name": "data", "emptyDir": {}}, {"name": "data", "mountPath": "/data"})


@pytest.mark.parametrize("file", ["kubernetes.yaml", "retraining.yaml", "training.yaml"])
def test_no_service_sets_variables_of_a_pod(file: str) -> None:
    """Of a Service named hallmark each pod would have HALLMARK_PORT=tcp://..., with which hallmark does not start."""
    specs = list(pod_specs(yaml.safe_load_all((DEPLOY / file).read_text(encoding="utf-8"))))
    assert specs
    assert all(spec.get("enableServiceLinks") is False for spec in specs)


def pod_specs(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict) and "containers" in part:
        yield part
    elif not isinstance(part, str) and isinstance(part, Iterable):
        for each in part.values() if isinstance(part, dict) else part:
            yield from pod_specs(each)


def test_retraining_calls_the_service_of_the_gateways() -> None:
    (spec,) = pod_specs(yaml.safe_load((DEPLOY / "retraining.yaml").read_text(encoding="utf-8")))
    (url,) = [each["value"] for each in spec["containers"][0]["env"] if each["name"] == "HALLMARK_URL"]
    parts = urlsplit(url)
    service = found("Service", parts.hostname or "")["spec"]
    assert (parts.port or 80) in {port["port"] for port in service["ports"]}
    assert service["selector"] == found("StatefulSet", "gateway")["spec"]["selector"]["matchLabels"]


def test_services_lead_to_the_pods() -> None:
    pods = {
        each["metadata"]["name"]: each["spec"]["template"] for each in objects() if "template" in each.get("spec", {})
    }
    for service in (each for each in objects() if each["kind"] == "Service"):
        (template,) = [
            each for each in pods.values() if service["spec"]["selector"].items() <= each["metadata"]["labels"].items()
        ]
        named = {port["name"] for each in template["spec"]["containers"] for port in each["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
    assert found("Service", found("StatefulSet", "gateway")["spec"]["serviceName"])["spec"]["clusterIP"] == "None"
    url = variables()["kubernetes.yaml"]["HALLMARK_ENGINE_URL"]
    (port,) = found("Service", "engine")["spec"]["ports"]
    assert url == f"http://engine:{port['port']}"


def test_every_gateway_keeps_its_data_directory() -> None:
    gateway = found("StatefulSet", "gateway")["spec"]
    (claim,) = gateway["volumeClaimTemplates"]
    mounts = {each["name"]: each["mountPath"] for each in container("StatefulSet", "gateway")["volumeMounts"]}
    image = (DEPLOY.parent / "Dockerfile").read_text(encoding="utf-8")
    assert f"HALLMARK_DATA_DIR={mounts[claim['metadata']['name']]}" in image
