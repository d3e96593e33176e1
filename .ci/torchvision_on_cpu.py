"""Let PyPI's torchvision be imported beside a torch without CUDA, which PyTorch's own build for CPUs needs not.

Its operators are built for CUDA and do not load, and registering their shapes then fails. Image processors use none.
"""

import importlib.metadata
import subprocess
import sys

if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
    path = importlib.metadata.distribution("torchvision").locate_file("torchvision/_meta_registrations.py")
    path.write_text("")
