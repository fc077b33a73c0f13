"""How the embedded tiny models were made: pretraining of their CLIP, training, measurement."""
