"""Traces, metrics and logs: one home for each name, and no content in any of them."""
