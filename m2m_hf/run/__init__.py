"""The parts of one run, loaded when they are first asked for. Imports everything below the searcher."""
