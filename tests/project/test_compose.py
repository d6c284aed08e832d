"""The containers, as far as they can be checked without a Docker engine: every name in their files exists here."""

import os
import re
import shutil
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import redis
import yaml
from botocore.config import Config

from tests.services import process
from tests.waiting import wait_until
from zcore.settings import ENVIRONMENT_RESERVED, load_settings
from zcore.stages import Stage

CHOSEN = "chosen-and-long-enough"
TREE = Path(__file__).resolve().parents[2]
# As ${NAME}, ${NAME:-default} and ${NAME:?reason}.
SUBSTITUTION = re.compile(r"(?<!\$)\$\{(?P<name>\w+)(?::-(?P<default>[^}]*)|:\?[^}]*)?\}")
SECRET = re.compile(r"KEY|SECRET|PASSWORD|AUTH")


@pytest.fixture
def compose() -> dict[str, Any]:
    """The file, with every variable set."""
    text = (TREE / "docker-compose.yml").read_text()
    return yaml.safe_load(SUBSTITUTION.sub(lambda found: found["default"] or CHOSEN, text))


@pytest.mark.parametrize("service", ["migration", "api", "worker", "encoder", "maintenance", "gpu-worker"])
def test_the_environment_of_a_container_is_a_valid_set_of_settings(compose: dict[str, Any], service: str) -> None:
    environment: dict[str, str] = compose["services"][service]["environment"]
    settings = load_settings(environment)
    assert settings.server.api_keys == {"compose": CHOSEN}
    assert settings.database_url == f"postgresql+psycopg://zimage:{CHOSEN}@postgres:5432/zimage"
    assert all(name in ENVIRONMENT_RESERVED or name.startswith("ZIMAGE_") for name in environment)


def test_the_optional_encoder_only_encodes_on_the_cpu(compose: dict[str, Any]) -> None:
    encoder = load_settings(compose["services"]["encoder"]["environment"])
    assert (encoder.worker.stages, encoder.encoder.device) == ((Stage.ENCODE,), "cpu")
    assert compose["services"]["encoder"]["profiles"] == ["encoder"], "it must be requested by its profile"
    assert load_settings(compose["services"]["gpu-worker"]["environment"]).worker.stages == tuple(Stage)


def test_addresses_in_the_settings_name_services_of_the_file(compose: dict[str, Any]) -> None:
    environment: dict[str, str] = compose["services"]["api"]["environment"]
    named = {
        httpx.URL(environment[name].replace("postgresql+psycopg", "http").replace("redis://", "http://")).host
        for name in ("ZIMAGE_DATABASE__URL", "ZIMAGE_BROKER__URL", "ZIMAGE_STORAGE__ENDPOINT_URL")
    }
    assert named == {"postgres", "redis", "s3"} <= set(compose["services"])


def test_no_secret_has_a_default() -> None:
    text = (TREE / "docker-compose.yml").read_text()
    defaults = {found["name"]: found["default"] for found in SUBSTITUTION.finditer(text)}
    secrets = {name for name in defaults if SECRET.search(name) and not name.endswith("_ID")}
    assert {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_SECRET_ACCESS_KEY", "ZIMAGE_API_KEY"} <= secrets
    assert {name: defaults[name] for name in secrets if defaults[name] is not None} == {}
    given = set(re.findall(r"[A-Z0-9_]{5,}", text.partition("x-settings")[0]))
    assert secrets <= given, "the commands at the top of the file generate every secret"


def test_ports_are_published_on_loopback_only(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert set(published) == {"api", "s3"}
    for ports in published.values():
        for port in ports:
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port


def test_every_container_is_read_only_and_without_capabilities_and_root(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert any(str(folder).startswith("/tmp") for folder in service["tmpfs"]), name
        # The entry point of the S3 server changes to its own user itself.
        is_unprivileged = "build" in service or service.get("user") not in (None, "root", "0")
        assert is_unprivileged or name == "s3", name
        assert name == "s3" or "cap_add" not in service
    text = (TREE / "Dockerfile").read_text()
    for stage in ("server", "worker"):
        assert re.search(rf"AS {stage}$.*?^USER zimage$", text, re.M | re.S)
    assert "--uid 10001" in text, "docker-compose.yml mounts /app/var for this user"


def test_redis_requires_its_password(compose: dict[str, Any], tmp_path: Path) -> None:
    """Run the container's command with another folder and port."""
    service = compose["services"]["redis"]
    program = shutil.which("redis-server", path=str(Path(sys.executable).parent)) or shutil.which("redis-server")
    assert program
    port = process.free_port()
    script = service["command"][2].replace("$$", "$").replace("/tmp/redis.conf", str(tmp_path / "redis.conf"))
    script = script.replace("exec redis-server", f"exec {program}") + f" --port {port} --dir {tmp_path}"
    environment = {**os.environ, **service["environment"]}
    server = process.start(["/bin/sh", "-c", script], tmp_path / "redis.log", environment=environment, folder=tmp_path)

    def answer(url: str) -> str:
        server.check()
        with closing(redis.Redis.from_url(url, socket_timeout=5)) as client:
            try:
                return str(client.ping())
            except redis.exceptions.RedisError as fault:
                return type(fault).__name__

    try:
        url = compose["services"]["api"]["environment"]["ZIMAGE_BROKER__URL"].replace("redis:6379", f"127.0.0.1:{port}")
        wait_until(lambda: answer(url) == "True", timeout_s=30)
        assert answer(f"redis://127.0.0.1:{port}/0") == "AuthenticationError"
        assert CHOSEN not in Path(f"/proc/{server.process.pid}/cmdline").read_text()
    finally:
        server.stop(signal.SIGTERM)


def test_every_service_that_others_depend_on_has_a_health_check(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for name, dependency in service.get("depends_on", {}).items():
            assert dependency["condition"] == "service_completed_successfully" or services[name]["healthcheck"]["test"]


def test_every_service_but_the_migration_is_restarted(compose: dict[str, Any]) -> None:
    restarts = {name: service["restart"] for name, service in compose["services"].items()}
    assert {name for name, restart in restarts.items() if restart != "unless-stopped"} == {"migration"}


def test_a_container_outlives_the_grace_period_of_its_process(compose: dict[str, Any]) -> None:
    workers = [(name, "worker") for name in ("worker", "encoder", "maintenance", "gpu-worker")]
    for name, section in (("api", "server"), *workers):
        service = compose["services"][name]
        # With the profile that the containers are run with for real.
        settings = load_settings({**service["environment"], "ZIMAGE_PROFILE": "production"})
        grace_s = getattr(settings, section).shutdown_grace_s
        drain_s = settings.server.drain_s if section == "server" else 0
        assert float(service["stop_grace_period"].removesuffix("s")) > grace_s + drain_s


def test_every_target_that_is_used_exists_and_installs_only_its_part(compose: dict[str, Any]) -> None:
    targets = dict(re.findall(r"^FROM \S+ AS (\w+)$(.*?)(?=^FROM|\Z)", (TREE / "Dockerfile").read_text(), re.M | re.S))
    used = {service["build"]["target"] for service in compose["services"].values() if "build" in service}
    assert used <= set(targets)
    for name in used:
        assert f"'.[{name}]'" in targets[name]
        assert f'CMD ["python", "-m", "{name}"]' in targets[name]


def test_the_command_of_the_s3_container_serves_its_bucket_only_to_its_account(
    compose: dict[str, Any], tmp_path: Path
) -> None:
    """Run the same program without its container, with other ports and another folder."""
    service = compose["services"]["s3"]
    program = shutil.which("weed", path=str(Path(sys.executable).parent))
    assert program
    ports = process.free_ports(10)
    replaced = {
        "-dir": tmp_path,
        "-ip.bind": "127.0.0.1",
        "-ip": "127.0.0.1",
        "-s3.port": ports[0],
        "-s3.port.grpc": ports[1],
    }
    for number, part in enumerate(("master", "volume", "filer", "admin"), 1):
        replaced |= {f"-{part}.port": ports[2 * number], f"-{part}.port.grpc": ports[2 * number + 1]}
    replaced |= {
        "-s3.port.iceberg": 0,
        "-s3.port.lance": 0,
        "-s3.localSocket": tmp_path / "s3.sock",
        "-filer.localSocket": tmp_path / "filer.sock",
    }
    given = [option for option in service["command"][1:] if option.partition("=")[0] not in replaced]
    command = [program, service["command"][0], *given, *(f"{name}={value}" for name, value in replaced.items())]
    server = process.start(
        command, tmp_path / "weed.log", environment={**os.environ, **service["environment"]}, folder=tmp_path
    )
    address = f"http://127.0.0.1:{ports[0]}"

    def is_healthy() -> bool:
        server.check()
        try:
            return httpx.get(f"{address}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    client = boto3.client(
        "s3", endpoint_url=address, region_name="us-east-1", config=Config(s3={"addressing_style": "path"}),
        aws_access_key_id=service["environment"]["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=service["environment"]["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    try:
        wait_until(is_healthy, timeout_s=60, every_s=0.1)
        wait_until(lambda: [found["Name"] for found in client.list_buckets()["Buckets"]] == ["images"])
        client.put_object(Bucket="images", Key="one", Body=b"pixels")
        assert httpx.get(f"{address}/images/one").status_code == 403
    finally:
        client.close()
        server.stop(signal.SIGTERM)
