"""`python -m transformers_liquid`: the command line."""

import sys

from transformers_liquid_cli import main


if __name__ == "__main__":
    sys.exit(main())
