"""The procedural world, drawn from a seed: its classes (words and unseen split), drawing and scenes."""
