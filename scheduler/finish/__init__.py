"""What follows the last trial: final scores, the conclusion, exports, answers."""
