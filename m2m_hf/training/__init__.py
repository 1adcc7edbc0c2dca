"""One fine-tune, and the bank of them. Imports storage, search, merging, modeling and data."""
