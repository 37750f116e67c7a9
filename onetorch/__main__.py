"""`python -m onetorch`."""

import sys

from onetorch.cli import main

sys.exit(main())
