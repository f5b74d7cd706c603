"""What brings the graph up to date: commands, runs, processes, the interfaces."""
