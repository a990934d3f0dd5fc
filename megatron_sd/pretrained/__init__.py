"""Local Hugging Face directories: what lies in them, and models with all of their weights or none."""
