"""What the operators share: input checks, tiles, attention, the MLP, registration."""
