"""`python -m slsam_ds.compare`."""

import sys

from slsam_ds.cli.compare.command import main

sys.exit(main())
