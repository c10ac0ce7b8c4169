"""`python -m ondevice`."""

from .cli import main

main()
