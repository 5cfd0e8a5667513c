"""Every annotated shape of the package is checked at every call; see tests/conftest.py."""

import sys

from jaxtyping import install_import_hook

if not any(name.split(".")[0] == "micro_diffusion" for name in sys.modules):
    install_import_hook("micro_diffusion", "shape_checks.check")
