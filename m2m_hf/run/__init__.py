"""The parts of one run, loaded when they are first asked for, and the refusals that need all of them.

Imports every package but cli."""
