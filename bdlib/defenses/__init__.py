"""One file a defense; each is a function from a model and clean images to a model."""
