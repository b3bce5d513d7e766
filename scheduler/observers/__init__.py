"""What watches a study from outside: notifications and advice."""
