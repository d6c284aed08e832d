"""Schemathesis, which knows only the OpenAPI document, finds nothing that the service does otherwise.

Both modes together send some 900 requests, with every check of Schemathesis. Stateful sequences, which follow the
identifiers in answers, take minutes and are run by hand, against `make run`:

    .venv/bin/st run http://127.0.0.1:8000/schema/openapi.json --checks all --continue-on-failure --max-time 300
"""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.api.conftest import KEYS
from tests.integration.installation import Installation

ST = Path(sys.executable).with_name("st")
ADMIN_KEY = "admin-key-0123456789"
KEYED = {"server.api_keys": KEYS, "server.admin_key": ADMIN_KEY}
# Most valid bodies of `coverage` have every field, with sizes that exclude each other, so only its wrong ones are sent.
KEYED_CONFIG = f"""
[auth.openapi]
key = {{ bearer = "{KEYS["anna"]}" }}
admin_key = {{ bearer = "{ADMIN_KEY}" }}
[[operations]]
include-path = "/api/generate"
[operations.phases.coverage.generation]
mode = "negative"
"""
OPTIONS = ("--checks", "all", "--continue-on-failure", "--no-shrink", "--generation-deterministic", "--seed", "1")
# `coverage` tries every bound of every parameter, and every kind of wrong value; `fuzzing` tries random values. The
# body of /api/format-prompt is that of /api/generate.
KEYED_RUN = ("--phases", "examples,coverage", "--exclude-path", "/api/format-prompt")
KEYLESS_RUN = ("--phases", "examples,fuzzing", "--max-examples", "4")
# What the document cannot say, and the details of problems about it.
REFUSALS = {
    "which fields exclude or need each other": "cannot be combined with|requires an image|has no effect without",
    "how numbers compare": "must be above start|scales must not decrease",
    "that entries differ in one field": "list each LoRA once",
    "what a file has to contain": "is not a complete image file|must be a complete safetensors file",
    "how many layers this checkpoint has": "this text encoder has layers|this checkpoint has layers",
    "what earlier requests contained": "was already used with a different body",
}


@pytest.mark.parametrize(("given", "run"), [({}, KEYLESS_RUN), (KEYED, KEYED_RUN)], ids=["keyless", "keyed"])
def test_requests_made_from_the_document_are_answered_as_it_says(
    tmp_path: Path, migrated_file: Path, given: dict[str, Any], run: tuple[str, ...]
) -> None:
    shutil.copy(migrated_file, tmp_path / "zimage.db")
    report = tmp_path / "report.ndjson"
    config = tmp_path / "schemathesis.toml"
    config.write_text(KEYED_CONFIG if given else "")
    # A limit that refuses valid sizes is the operator's, so the document does not state it.
    with Installation(tmp_path, {"limits.max_pixels": 8192 * 8192, **given}).serving() as server:
        command = [ST, "--config-file", config, "run", f"{server.url}/schema/openapi.json", *OPTIONS, *run]
        ran = subprocess.run(
            [*command, "--report-ndjson-path", report], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    events = [json.loads(line) for line in report.read_text().splitlines()]
    recorders = [event["ScenarioFinished"]["recorder"] for event in events if "ScenarioFinished" in event]
    assert sum(len(recorder.get("interactions", ())) for recorder in recorders) > 40
    assert not [event for event in events if event.keys() & {"NonFatalError", "FatalError"}]
    assert [failure for recorder in recorders for failure in _failures(recorder)] == []


def _failures(recorder: dict[str, Any]) -> Iterator[str]:
    """Yield the failures of a scenario, but those that `REFUSALS` explains, each with its request and response."""
    for case, checks in recorder.get("checks", {}).items():
        for check in checks:
            if check["status"] != "success":
                exchange = recorder["interactions"][case]
                answer = base64.b64decode(exchange["response"]["content"]["$base64"])
                if check["name"] != "positive_data_acceptance" or not _is_documented(answer):
                    request = exchange["request"]
                    yield f"{check['name']}: {request['method']} {request['uri']} {request.get('body')}: {answer!r}"


def _is_documented(answer: bytes) -> bool:
    problem = json.loads(answer)
    details = [error["detail"] for error in problem.get("errors", ())] or [problem["detail"]]
    return all(any(re.search(known, detail) for known in REFUSALS.values()) for detail in details)
