"""From a model to a score: packing rows, forward passes, scorers and metrics.

Imports config, core, storage, merging, modeling and data."""
