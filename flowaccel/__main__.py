"""`python -m flowaccel`."""

from flowaccel.cli import main

main()
