"""`python -m worker`: one GPU worker. Keys of the settings may be given as arguments: `python -m worker
worker.upkeep=false`.
"""

import sys

from worker.app import run_worker
from zcore.settings import overrides_from_arguments

run_worker(overrides_from_arguments(sys.argv[1:]))
