"""Measures retrieval, citations and abstention on questions whose answers are known. No model judges anything."""
