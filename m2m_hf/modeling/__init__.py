"""Models, tokenizers, image processors and frozen heads, loaded as transformers and TRL load them.

Imports merging and storage."""
