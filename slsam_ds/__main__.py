"""`python -m slsam_ds`: the command `slsam`."""

import sys

from slsam_ds.cli.dispatch import main

sys.exit(main())
