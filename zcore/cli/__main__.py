"""Entry point of `python -m zcore.cli`, the same command as `zimage`."""

import sys

from zcore.cli import main

sys.exit(main())
