"""`python -m cprune`: the same as the console script `cprune`."""

import sys

from cprune.run import main

if __name__ == "__main__":
    sys.exit(main())
