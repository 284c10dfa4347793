"""What surrounds a run: commands, the report, converters, several GPUs. No training needs it."""
