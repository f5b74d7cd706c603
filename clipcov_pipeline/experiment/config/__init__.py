"""The YAML: one file a section, checked before anything runs."""
