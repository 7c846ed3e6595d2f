"""`python -m slsam_ds.estimate`."""

import sys

from slsam_ds.cli.estimate import main

sys.exit(main())
