"""`python -m forgetfilter`."""

from forgetfilter.cli import main

main()
