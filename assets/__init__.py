"""The Dagster code location: what exists, one file a stage."""
