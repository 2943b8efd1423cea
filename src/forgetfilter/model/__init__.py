"""Models: weights, batches, training, reading, generation. Filters and defenses use them through workshop.py."""
