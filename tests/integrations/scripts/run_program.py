"""Runs the program that is given as the first argument."""

import sys

exec(sys.argv[1])
