"""Every annotated shape of the package is checked at every call; see tests/conftest.py."""

import os
import sys

from jaxtyping import install_import_hook

os.environ["TRITON_INTERPRET"] = "1"  # for tests/unit/kernels; read when a kernel is defined
if not any(name.split(".")[0] == "micro_diffusion" for name in sys.modules):
    install_import_hook("micro_diffusion", "shape_checks.check")
