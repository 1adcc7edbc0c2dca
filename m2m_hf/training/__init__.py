"""One fine-tune, and the bank of them. Imports merging, modeling, data and storage."""
