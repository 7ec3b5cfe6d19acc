"""Engines turn texts into vectors: one protocol (`base`), one module each."""
