"""Values that a search speaks in: mixtures, scores, trials. Imports nothing else of this package but errors."""
