"""Bulk jobs in Modal containers: what is asked of them, what they record, how to follow it."""
