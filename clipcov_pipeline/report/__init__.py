"""What people look at: leaderboard, report, galleries, search, lineage."""
