"""``python -m experiments.reproduce``."""

from experiments.reproduce.driver import main

main()
