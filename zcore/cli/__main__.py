"""`python -m zcore.cli`: the same as `zimage`."""

import sys

from zcore.cli import main

sys.exit(main())
