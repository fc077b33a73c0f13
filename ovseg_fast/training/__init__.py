"""Training as published: what is trained, on which labels, how fast it moves, and the loop around it."""
