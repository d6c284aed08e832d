"""Submits bodies with a client that openapi-python-client has generated.

A program, not a module: it runs in the generator's environment, which has what the client imports. Takes the client's
folder, the server's URL and an API key as arguments, and bodies as a JSON array on standard input. Prints, for each,
the body as the client sent it, the class of the answer and the answer.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main(folder: Path, url: str, key: str) -> None:
    sys.path.insert(0, str(folder.parent))
    models: Any = importlib.import_module(f"{folder.name}.models")
    submit_job: Any = importlib.import_module(f"{folder.name}.api.jobs.submit_job")
    client = importlib.import_module(f"{folder.name}.client").AuthenticatedClient(base_url=url, token=key)
    calls = []
    for body in json.load(sys.stdin):
        submission = models.Submission.from_dict(body)
        answer = submit_job.sync(client=client, body=submission)
        calls.append({"sent": submission.to_dict(), "shape": type(answer).__name__, "answer": answer.to_dict()})
    json.dump(calls, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
