"""Which mixtures are scored and which is chosen; knows nothing of models. Imports core and storage."""
