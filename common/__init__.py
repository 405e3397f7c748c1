"""What at least two roles need; knows no role."""
