"""Objectives: a mixture in, a score out. Merged (averaged parameters), ensemble (averaged probabilities), trained (the truth).

Imports `scoring` and `training`, and what these import.
"""
