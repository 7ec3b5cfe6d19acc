"""Bulk jobs in Modal containers: their specification, their records, their status."""
