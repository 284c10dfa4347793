"""What surrounds a run: commands, the report, converters, several GPUs. Training needs none of it."""
