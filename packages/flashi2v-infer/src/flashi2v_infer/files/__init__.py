"""What is read for sampling, and what is written."""
