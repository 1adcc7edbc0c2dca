"""The run folder on disk: whole files, fingerprints, the journal of trials. Imports core."""
