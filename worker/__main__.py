"""Command line of the worker.

`python -m worker [name=value ...]` starts a worker; the arguments are settings.
`python -m worker maintenance [name=value ...]` runs only maintenance and webhook delivery, for a host without a GPU.
"""

import sys

from worker.app import run_maintenance, run_worker

if __name__ == "__main__":
    if sys.argv[1:2] == ["maintenance"]:
        run_maintenance(sys.argv[2:])
    else:
        run_worker(sys.argv[1:])
