"""Measures of filters and models; with data/, the only room that reads labels."""
