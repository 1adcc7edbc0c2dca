"""The outcome for others: recipe, export, Hub. Imports reporting."""
