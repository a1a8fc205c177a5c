"""`python -m unpaint ...` is the `unpaint` command."""

import sys

from unpaint.cli import main

if __name__ == "__main__":
    sys.exit(main())
