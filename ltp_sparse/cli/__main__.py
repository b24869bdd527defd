"""`python -m ltp_sparse.cli`."""

import sys

from ltp_sparse.cli import main

sys.exit(main())
