"""`python -m mka` is `mka`."""

import sys

from mka.cli import main

sys.exit(main())
