"""The main job: a small policy, a verifiable task, and TRL's trainer beside ours on the same work."""
