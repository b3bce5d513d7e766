"""What was asked, what happened, what is best."""
