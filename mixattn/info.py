"""What this machine has, which of mixattn's kernels run on it, and what the compiled ones take.

python -m mixattn.info             as ``mixattn-engine info``
python -m mixattn.info --kernels   every CUDA kernel: registers, shared memory and blocks per SM, by architecture
"""

from __future__ import annotations

import argparse

from mixattn.engine.info import info_lines
from mixattn.ops.cuda_images import kernel_lines


def main() -> None:
    """Prints it."""
    parser = argparse.ArgumentParser(prog="python -m mixattn.info", description="What this machine can run.")
    parser.add_argument("--kernels", action="store_true", help="the CUDA kernels that the package was built with")
    print("\n".join(kernel_lines() if parser.parse_args().kernels else info_lines()))


if __name__ == "__main__":
    main()
