"""What the scores mean: selection bias, Shapley values, fidelity. Imports objectives and search."""
