"""Data in and out: any row of any source to token ids, and the source's own bytes back."""
