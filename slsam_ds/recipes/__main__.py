"""`python -m slsam_ds.recipes`."""

import sys

from slsam_ds.cli.recipes import main

if __name__ == "__main__":
    sys.exit(main())
