"""What fits on which device and how fast, and what would fit if nothing does."""
