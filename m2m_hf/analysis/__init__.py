"""What the scores mean: selection bias, Shapley values, fidelity. Imports search and objectives, and what these import."""
