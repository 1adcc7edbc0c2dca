"""A finished run as tables, plots, a page and a status. Imports config, storage, search and analysis."""
