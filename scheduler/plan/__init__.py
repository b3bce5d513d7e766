"""What fits on which device, how fast, and what would fit where nothing does."""
