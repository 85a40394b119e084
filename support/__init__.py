"""What all scripts share: command line, ranks, hardware, optimizers, files, training state. The method can be
understood without reading it. Nothing here imports anything else of the project."""
import sys

if sys.platform == "win32":
    sys.exit("error: Windows is not supported; use the Windows Subsystem for Linux (WSL)")
