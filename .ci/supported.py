"""Ends with one line where the CPU installation of OpenRLHF cannot work."""

import platform
import sys

if platform.system() != "Linux":
    sys.exit(
        f"make: vLLM's CPU build is for Linux, and this is {platform.system()}; use a Linux container, for instance "
        "docker run -it -v $PWD:/sdpo -w /sdpo python:3.11 make demo"
    )
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit(
        f"make: OpenRLHF and vLLM need Python 3.10 to 3.12, and this is {platform.python_version()}; give one, "
        "make PYTHON=python3.11 ..."
    )
