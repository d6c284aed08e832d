"""What can be held of the containers without a Docker engine: that every name in their files means something here."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import yaml
from botocore.config import Config

from tests.services import process
from tests.waiting import wait_until
from zcore.settings import ENVIRONMENT_RESERVED, load_settings
from zcore.stages import Stage

TREE = Path(__file__).resolve().parents[2]
# As ${NAME}, ${NAME:-otherwise} and ${NAME:?why it is needed}.
SUBSTITUTION = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<otherwise>[^}]*)|:\?[^}]*)?\}")


@pytest.fixture
def compose() -> dict[str, Any]:
    """The file, with everything that has to be chosen chosen."""
    text = (TREE / "docker-compose.yml").read_text()
    return yaml.safe_load(SUBSTITUTION.sub(lambda found: found["otherwise"] or "chosen", text))


@pytest.mark.parametrize("service", ["migration", "api", "worker", "encoder", "gpu-worker"])
def test_a_containers_environment_is_a_valid_set_of_settings(compose: dict[str, Any], service: str) -> None:
    environment: dict[str, str] = compose["services"][service]["environment"]
    settings = load_settings(environment)
    assert settings.server.api_keys == {"compose": "chosen"}
    assert settings.database_url == "postgresql+psycopg://zimage:zimage@postgres:5432/zimage"
    assert all(name in ENVIRONMENT_RESERVED or name.startswith("ZIMAGE_") for name in environment)


def test_the_optional_encoder_encodes_on_the_cpu_and_nothing_else(compose: dict[str, Any]) -> None:
    encoder = load_settings(compose["services"]["encoder"]["environment"])
    assert (encoder.worker.stages, encoder.encoder.device) == ((Stage.ENCODE,), "cpu")
    assert compose["services"]["encoder"]["profiles"] == ["encoder"], "nobody gets it who does not ask"
    assert load_settings(compose["services"]["gpu-worker"]["environment"]).worker.stages == tuple(Stage)


def test_addresses_in_the_settings_name_services_of_the_file(compose: dict[str, Any]) -> None:
    environment: dict[str, str] = compose["services"]["api"]["environment"]
    named = {
        httpx.URL(environment[name].replace("postgresql+psycopg", "http").replace("redis://", "http://")).host
        for name in ("ZIMAGE_DATABASE__URL", "ZIMAGE_BROKER__URL", "ZIMAGE_STORAGE__ENDPOINT_URL")
    }
    assert named == {"postgres", "redis", "s3"} <= set(compose["services"])


def test_whoever_others_wait_for_says_when_it_is_healthy(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for name, wish in service.get("depends_on", {}).items():
            assert wish["condition"] == "service_completed_successfully" or services[name]["healthcheck"]["test"]


def test_everything_is_started_again_but_the_migration(compose: dict[str, Any]) -> None:
    restarts = {name: service["restart"] for name, service in compose["services"].items()}
    assert {name for name, restart in restarts.items() if restart != "unless-stopped"} == {"migration"}


def test_a_container_outlives_the_grace_that_its_process_is_given(compose: dict[str, Any]) -> None:
    for name, section in (("api", "server"), ("worker", "worker"), ("encoder", "worker"), ("gpu-worker", "worker")):
        service = compose["services"][name]
        grace_s = getattr(load_settings(service["environment"]), section).shutdown_grace_s
        assert float(service["stop_grace_period"].removesuffix("s")) > grace_s


def test_every_stage_that_is_asked_for_is_built_and_installs_only_its_part(compose: dict[str, Any]) -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)$(.*?)(?=^FROM|\Z)", (TREE / "Dockerfile").read_text(), re.M | re.S))
    asked = {service["build"]["target"] for service in compose["services"].values() if "build" in service}
    assert asked <= set(stages)
    for name in asked:
        assert f"'.[{name}]'" in stages[name]
        assert f'CMD ["python", "-m", "{name}"]' in stages[name]


def test_the_s3_container_s_command_serves_its_bucket_to_its_account_alone(
    compose: dict[str, Any], tmp_path: Path
) -> None:
    """The same program is here without its container; only its ports and folder are other ones."""
    service = compose["services"]["s3"]
    program = shutil.which("weed", path=str(Path(sys.executable).parent))
    assert program
    ports = process.free_ports(10)
    elsewhere = {
        "-dir": tmp_path,
        "-ip.bind": "127.0.0.1",
        "-ip": "127.0.0.1",
        "-s3.port": ports[0],
        "-s3.port.grpc": ports[1],
    }
    for number, part in enumerate(("master", "volume", "filer", "admin"), 1):
        elsewhere |= {f"-{part}.port": ports[2 * number], f"-{part}.port.grpc": ports[2 * number + 1]}
    elsewhere |= {
        "-s3.port.iceberg": 0,
        "-s3.port.lance": 0,
        "-s3.localSocket": tmp_path / "s3.sock",
        "-filer.localSocket": tmp_path / "filer.sock",
    }
    given = [option for option in service["command"][1:] if option.partition("=")[0] not in elsewhere]
    command = [program, service["command"][0], *given, *(f"{name}={value}" for name, value in elsewhere.items())]
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
        wait_until(lambda: [found["Name"] for found in client.list_buckets()["Buckets"]] == ["pictures"])
        client.put_object(Bucket="pictures", Key="one", Body=b"pixels")
        assert httpx.get(f"{address}/pictures/one").status_code == 403
    finally:
        client.close()
        server.stop(signal.SIGTERM)
