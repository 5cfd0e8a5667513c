"""`python -m micro_diffusion` is the command `micro-diffusion`."""

import sys

from micro_diffusion.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
