"""The procedural world: scenes of patterned shapes on grounds, drawn from a seed."""
