"""The serving process: one async API in front of a team's own text-generation engine."""
