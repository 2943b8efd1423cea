"""Models: weights, batches, training, reading, generation; of the other rooms only workshop and evaluation enter."""
