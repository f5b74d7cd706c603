"""Measurements: speed of the selection and diagnostics, quality of subsets on pools whose truth is known."""
