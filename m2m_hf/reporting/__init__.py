"""A finished run as tables, plots, a page and a status. Imports storage and analysis."""
