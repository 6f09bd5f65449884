"""`python -m study`: see `study/execution.py`."""

import sys

from study.execution import main
from study.tasks import politely

if __name__ == "__main__":
    sys.exit(politely(lambda: main(sys.argv[1:])))
