"""A mixture in, a score out: merged, ensemble, trained. Imports scoring and training."""
