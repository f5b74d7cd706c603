"""What Dagster and the terminal show: tables and plots, checks, what is out of date, progress."""
