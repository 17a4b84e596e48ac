"""`python -m loftq` is the command `loftq`."""

import sys

from loftq.cli.main import main

sys.exit(main())
