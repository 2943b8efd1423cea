"""The page to look at what a run decided, to decide otherwise, and to mark a sample: one file, no network."""
