"""``python -m modelfs``: the same commands as the ``modelfs`` program."""

import sys

from modelfs.cli import main

sys.exit(main())
