"""Readers of the files that hold texts: Parquet, CSV, JSON Lines, text."""
