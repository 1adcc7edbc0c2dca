"""What a run is asked to do: the YAML, checked before anything heavy is imported. Imports core."""
