"""`python -m slsam_ds.estimate`."""

import sys

from slsam_ds.integrations.estimate import main

sys.exit(main())
