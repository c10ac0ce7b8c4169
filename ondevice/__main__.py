"""`python -m ondevice`, and the command `ondevice`."""

import gc
import sys


def main() -> None:
    """An interruption while modules are still being loaded ends as quietly as one later on."""
    gc.set_threshold(100_000)  # modules and a vocabulary are hundreds of thousands of objects, and no garbage
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
