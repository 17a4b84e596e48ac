"""What training takes: bytes by part, what would save most, and what fits a budget."""
