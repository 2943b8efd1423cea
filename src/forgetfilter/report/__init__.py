"""Pages to look at and change the decisions of a run, and to mark a sample: one file each, without network."""
