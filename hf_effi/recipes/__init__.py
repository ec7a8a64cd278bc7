"""Settings of papers, as functions that return trainer arguments and configs, and launch files."""
