"""`python -m dsv4_plugin` is the `dsv4` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
