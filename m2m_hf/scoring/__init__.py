"""From a model to a score: packing, forward passes, scorers and metrics. Imports merging, modeling and data."""
