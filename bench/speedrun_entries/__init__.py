"""Entries of the speed run, one file each; `bench/speedrun.py` has the rules."""
