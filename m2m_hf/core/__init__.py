"""Values without torch: mixtures, the space of them, scores, trials, and the objective that makes one of the other.

Imports nothing of this package but `errors`.
"""
