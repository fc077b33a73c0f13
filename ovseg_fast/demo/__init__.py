"""The demo: a scene of the procedural world, segmented by words."""
