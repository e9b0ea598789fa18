"""`python -m broker` is `compute-broker`."""

from broker.cli import main

main()
