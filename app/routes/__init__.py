"""HTTP only: each route parses, calls once, and shapes the reply."""
