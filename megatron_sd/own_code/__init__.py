"""Functions of the user's own in the place of ours: found and tried before the run (seam.py, loading.py),
watched while it lasts (watching.py)."""
