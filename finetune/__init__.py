"""LoRA training and evaluation; shares files with the serving process, never code."""
