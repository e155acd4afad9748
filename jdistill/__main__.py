"""`python -m jdistill`."""

from jdistill.cli import main

main()
