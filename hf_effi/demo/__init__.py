"""The main job: a small policy, a verifiable task, and TRL's trainer beside ours on the same work."""

from .toy import Toy, logged, toy

__all__ = ["Toy", "logged", "toy"]
