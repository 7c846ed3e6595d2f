"""`python -m slsam_ds.report`."""

import sys

from slsam_ds.report.command import main

sys.exit(main())
