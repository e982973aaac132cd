"""Many methods on the same images: the grid, the ablations, the leaderboard."""
