"""The outcome for others: recipe, export, Hub. Imports config, storage, modeling, data, training and reporting."""
