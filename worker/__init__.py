"""The worker: copies the ranges it is leased, over connections of its own."""
