"""Ground floor: pure functions. They import torch and the standard library only, and fit any training loop."""
