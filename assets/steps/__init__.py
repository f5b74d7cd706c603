"""How the stage files build their entries, and what a cancelled or killed run leaves."""
