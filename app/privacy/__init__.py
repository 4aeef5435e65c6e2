"""What is kept of what people said: decided before it is written, and gone when it is to be gone."""
