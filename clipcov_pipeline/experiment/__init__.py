"""The experiment: its YAML, what should exist, what is out of date, and the store that holds it."""
