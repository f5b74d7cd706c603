"""The files of a subset, and what is said of it before anything trains: covariance, classes, duplicates."""
