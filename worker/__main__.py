"""`python -m worker`: one GPU worker. Keys of the settings may be given as arguments: `python -m worker
worker.upkeep=false`.
"""

import sys

from worker.app import run_worker

run_worker(sys.argv[1:])
