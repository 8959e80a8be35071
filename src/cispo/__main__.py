"""`python -m cispo` is `cispo`."""

import sys

from cispo.cli import main

sys.exit(main())
